"""What several operators share: the dtype of sums, and the choice between a Triton kernel and plain PyTorch."""

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no wheel for this platform: everything runs in PyTorch
    triton = None

INTERPRET = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors
_left_free = 0
BACKENDS = ("auto", "triton", "torch")


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, decays and states: fp32, or float64 when the input already is."""
    return torch.promote_types(x.dtype, torch.float32)


def leave_free(sms: int) -> None:
    """Keep kernels that stay on their multiprocessor to the end (grouped products, the head's) off this many.

    A collective that runs beside them occupies some, and a program that waits for one of those starts when the others
    are done: the kernel then takes twice its time.
    """
    global _left_free
    _left_free = sms


def free_sms(device: torch.device) -> int:
    """The multiprocessors that such a kernel may fill."""
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count - _left_free)


def use_triton(x: Tensor, backend: str = "auto") -> bool:
    """Whether an operator on `x` runs its Triton kernel.

    auto: on a CUDA tensor of at most 32 bits a number, and under TRITON_INTERPRET=1; PyTorch otherwise.  Raises
    ValueError on an unknown backend, or if "triton" is asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; choose from {', '.join(BACKENDS)}")
    able = triton is not None and (x.is_cuda or INTERPRET) and x.dtype != torch.float64
    if backend == "triton" and not able:
        raise ValueError(
            f"backend='triton' needs triton and a CUDA tensor of at most fp32 (or TRITON_INTERPRET=1); got {x.dtype} "
            f"on {x.device}"
        )
    return able and backend != "torch"

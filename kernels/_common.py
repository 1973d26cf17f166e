"""What several operators share: the dtype of sums, and the choice between a Triton kernel and plain PyTorch."""

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no wheel for this platform: everything runs in PyTorch
    triton = None

INTERPRET = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors
BACKENDS = ("auto", "triton", "torch")


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, decays and states: fp32, or float64 when the input already is."""
    return torch.promote_types(x.dtype, torch.float32)


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

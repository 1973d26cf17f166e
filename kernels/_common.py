"""What several operators share: the dtype of sums, and the choice between a Triton kernel and plain PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no wheel for this platform: everything runs in PyTorch
    triton = None

INTERPRET = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors
_left_free = 0
_again = False
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


@contextmanager
def computing_again() -> Iterator[None]:
    """For the second forward pass of a block whose activations were not kept.

    What the block adds to the stream is known from the first pass and read by nobody.  Operators that end a block may
    ask `result_is_known` and leave their result undefined, as long as they keep for backward what they always keep.
    """
    global _again
    before, _again = _again, True
    try:
        yield
    finally:
        _again = before


def result_is_known() -> bool:
    return _again


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

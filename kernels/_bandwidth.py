"""What the bandwidth-limited kernels share: how they are launched, the sum of their partials, a cheap sigmoid.

Strides of what may be columns of a wider tensor are constants of a kernel: the compiler then knows their divisors.  Of
a number given at run time it learns only whether 16 is one, and where it is not, elements move one by one.  A width of
1,288 (Nano's in_proj at tp=8) is such a case.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

from typing import NamedTuple

import torch
from torch import Tensor

from kernels._common import triton

if triton is not None:
    import triton.language as tl

    jit = triton.jit
else:  # kernels are defined all the same, and never run
    tl = None

    def jit(kernel=None, **options):
        return kernel or jit


class Launch(NamedTuple):
    """How a row kernel is launched: `tile` elements at least (several short rows), or one row if that is longer."""

    tile: int
    warps: int
    programs_per_sm: int = 0  # of a kernel that walks over the rows; 0: one tile per program
    stages: int = 1  # loads of this many iterations are in flight, through shared memory


@jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32 to 4e-7 relative, in half the instructions of tl.sigmoid.

    exp2 and rsqrt are single instructions that flush denormals; tl.exp and a division are scaled around them.
    """
    r = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # log2(e); exp2 = inf gives 0, as it should
    return r * r


def tile_of(width: int, launch: Launch) -> tuple[int, int, int]:
    """Rows and columns of the tile a program works on, and its warps: at most 16 elements a thread when it walks."""
    block = triton.next_power_of_2(width)
    rows = max(1, launch.tile // block)
    per_warp = 512 if launch.programs_per_sm else 1024
    return rows, block, min(16, max(launch.warps, rows * block // per_warp))


def walk(tiles: int, launch: Launch, x: Tensor) -> tuple[int, int]:
    """Programs of a kernel that walks over `tiles`, and the steps of each; or as many as tiles, of one step.

    The same on every call on one device: sums come out bit for bit alike.  On a CPU (interpreted) few, but not one.
    """
    if not launch.programs_per_sm:
        return tiles, 1
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    steps = triton.cdiv(tiles, sms * launch.programs_per_sm)
    return triton.cdiv(tiles, steps), steps


def stages_of(launch: Launch, elements: int, x: Tensor) -> int:
    """launch.stages, or fewer if loading `elements` of x's dtype a step would want over 96 KB of shared memory."""
    return max(1, min(launch.stages, 1 + 98304 // (elements * x.element_size())))


@jit
def _sum_kernel(partial_ptr, out_ptr, P, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK columns.  partial (P, N) fp32, out (N,), both contiguous; always in the same order."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, P, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial_ptr + rows.to(tl.int64) * N + cols, mask=(rows < P) & (cols < N), other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0, keep_dims=True), mask=cols < N)


def sum_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, N) fp32, contiguous -> the sum over P, (N,), rounded to `dtype`: one launch where sum and cast are two."""
    P, N = partial.shape
    out = torch.empty(N, dtype=dtype, device=partial.device)
    _sum_kernel[(triton.cdiv(N, 32),)](partial, out, P, N, ROWS=128, BLOCK=32, num_warps=4)
    return out


def as_rows(t: Tensor) -> Tensor:
    """(..., D) -> (T, D) with a contiguous last dimension: a view wherever the strides allow one."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()

"""Tensor descriptors (TMA) that stop at the end of one expert's rows, and accumulators stored in parts.

A descriptor checks its bounds against one fixed shape, but where an expert's rows end is known on the GPU only.  So the
bound is a large constant, LIMIT, and the coordinates are moved instead: row r of a slice that ends at `end` is asked
for at coordinate r - end + LIMIT, which passes the bound exactly where r passes `end`.  Two further dimensions move the
address back: one adds end * stride, the other, at coordinate LIMIT, subtracts LIMIT * stride, because addresses wrap
around at 2^64 (its stride is 2^34 - stride elements, and LIMIT * 2^34 is 2^64).  Triton's own tools (ragged_tma) rest
on the same wrap-around.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._descriptors import descriptor
from kernels.grouped_gemm_configs import tma_reads

LIMIT = tl.constexpr(1 << 30)
_ANY = (1 << 31) - (1 << 16)  # a bound that no coordinate reaches


def describe_ragged(x: Tensor, rows: int, cols: int) -> TensorDescriptor | None:
    """A descriptor for load_ragged and store_ragged of blocks (rows, cols) of x (R, width), R < 2^30.

    None where TMA cannot read x.
    """
    if not tma_reads(x) or not cols:
        return None
    stride, limit = x.stride(0), LIMIT.value
    shape, strides = [_ANY, _ANY, limit, x.shape[1]], [2**34 - stride, stride, stride, 1]
    return descriptor(x, [1, 1, rows, cols], shape, strides)


@triton.jit
def load_ragged(desc, end, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] from (row, col) on; zeros from row `end` on and past the last column."""
    return tl.reshape(desc.load([LIMIT, end, row - end + LIMIT, col]), [ROWS, COLS])


@triton.jit
def store_ragged(desc, end, row, col, x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Stores x [ROWS, COLS] from (row, col) on; nothing from row `end` on or past the last column."""
    desc.store([LIMIT, end, row - end + LIMIT, col], tl.reshape(x, [1, 1, ROWS, COLS]))


@triton.jit
def halves(acc, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right columns of acc [ROWS, COLS]; each thread keeps what it holds, so nothing moves."""
    return tl.split(tl.permute(tl.reshape(acc, [ROWS, 2, COLS // 2]), [0, 2, 1]))

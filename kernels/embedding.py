"""The gradient of an embedding, added to where gradients are summed: only the rows of ids that occur are touched.

PyTorch makes a gradient of the whole table of it, zeros and all, which is then added to the sums: 131,072 rows for the
at most 8,192 that a row of tokens can touch.  Here

    sums_v += sum over t with ids_t = v of dy_t        in fp32, and always in the same order, without atomics.

The positions are sorted by id, so an id's are a run, and cut into cells of CELL positions.  What a run has in one cell
is a piece.  A program sums one piece: a run that is one piece is done with it, a longer one leaves a partial sum for
each of its pieces, of which a second kernel makes one.  So padding, thousands of equal ids, takes no longer than text.

    ids      3 3 5 5 | 5 5 5 5 | 5 7 7 9       pieces: 33, 55 | 5555 | 5, 77, 9;  partial sums: those of 5

A cell has at most two pieces of runs that go on beyond it: its first, in slot 0, and its last, in slot 1.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._bandwidth import jit, tl
from kernels._common import INTERPRET, accumulate_dtype, triton, use_triton
from kernels.gradient_sink import GradientSink

# Under the interpreter the cells are small, so that tiny inputs still have several.
CELL = 4 if INTERPRET else 32
BLOCK, WARPS = 1024, 4
CELLS_AT_ONCE = 16  # of which the second kernel adds up the partial sums


def embedding_gradient_reference_(sums: Tensor, ids: Tensor, dy: Tensor) -> None:
    found, place = ids.unique(return_inverse=True)
    rows = torch.zeros(len(found), dy.shape[1], dtype=accumulate_dtype(sums), device=sums.device)
    rows.index_add_(0, place, dy.to(rows.dtype))
    sums.index_copy_(0, found, (sums.index_select(0, found) + rows).to(sums.dtype))


@jit
def _add_row(sums_ptr, v, D, cols, row):
    at = sums_ptr + v.to(tl.int64) * D + cols
    tl.store(at, tl.load(at, mask=cols < D, other=0.0).to(tl.float32) + row, mask=cols < D)


@jit
def _pieces_kernel(
    ids_ptr, order_ptr, dy_ptr, sums_ptr, partial_ptr, T, D, CELL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK columns of the piece that begins at a sorted position; nothing if none does.

    ids (T,), sorted, and order (T,), the token of each; dy (T, D); sums (V, D); partial (cells, 2, D) fp32.
    """
    t = tl.program_id(0)
    cell = t // CELL
    first = cell * CELL
    v = tl.load(ids_ptr + t)
    continues = tl.load(ids_ptr + t - 1, mask=t > 0, other=-1) == v
    if (t == first) | (not continues):
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ahead = t + tl.arange(0, CELL)
        here = (ahead < first + CELL) & (ahead < T)
        n = tl.sum((tl.load(ids_ptr + ahead, mask=here, other=-1) == v).to(tl.int32), 0)
        row = tl.zeros([BLOCK], tl.float32)
        for i in range(0, n):
            token = tl.load(order_ptr + t + i).to(tl.int64)
            row += tl.load(dy_ptr + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        goes_on = tl.load(ids_ptr + t + n, mask=t + n < T, other=-1) == v
        if continues | goes_on:
            slot = 2 * cell.to(tl.int64) + (t != first)
            tl.store(partial_ptr + slot * D + cols, row, mask=cols < D)
        else:
            _add_row(sums_ptr, v, D, cols, row)


@jit
def _runs_kernel(
    ids_ptr, partial_ptr, sums_ptr, T, D, CELL: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK columns of the run that begins in a cell and goes on beyond it; nothing if none does."""
    cell, cells = tl.program_id(0), tl.num_programs(0)
    first = cell * CELL
    v = tl.load(ids_ptr + tl.minimum(first + CELL, T) - 1)
    goes_on = tl.load(ids_ptr + first + CELL, mask=first + CELL < T, other=-1) == v
    began_before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1) == v
    if goes_on & (not began_before):
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        slot = 2 * cell.to(tl.int64) + (tl.load(ids_ptr + first) != v)
        row = tl.load(partial_ptr + slot * D + cols, mask=cols < D, other=0.0)
        for c in range(cell + 1, cells, CELLS):
            later = c + tl.arange(0, CELLS)
            same = tl.load(ids_ptr + later * CELL, mask=later < cells, other=-1) == v
            at = partial_ptr + later.to(tl.int64)[:, None] * (2 * D) + cols[None, :]
            row += tl.sum(tl.load(at, mask=same[:, None] & (cols < D)[None, :], other=0.0), 0)
        _add_row(sums_ptr, v, D, cols, row)


def embedding_gradient_(sums: Tensor, ids: Tensor, dy: Tensor, holds: bool = True, backend: str = "auto") -> None:
    """sums: (V, D), contiguous, fp32 or the dtype of dy; ids: (T,), 0 .. V - 1; dy: (T, D).  Adds to the sums in place.

    holds: whether there is anything in the sums; if not, they are made zero first.  A row is added to in fp32 at least,
    and rounded once.  The kernels give the same bits for the same inputs; PyTorch's path on a GPU does not.  Raises
    ValueError on shapes that do not fit, and as `use_triton` does.
    """
    if dy.ndim != 2 or ids.shape != dy.shape[:1] or sums.shape[1:] != dy.shape[1:] or not sums.is_contiguous():
        raise ValueError(
            f"embedding_gradient_: sums {tuple(sums.shape)} with strides {sums.stride()}, ids {tuple(ids.shape)} and "
            f"dy {tuple(dy.shape)} do not fit (V, D) contiguous, (T,), (T, D)"
        )
    if not holds:
        sums.zero_()
    (T, D), kernels = dy.shape, use_triton(dy, backend)
    if T == 0 or D == 0:
        return
    if not kernels or sums.dtype == torch.float64:
        embedding_gradient_reference_(sums, ids, dy)
        return
    ids, order = ids.sort(stable=True)
    dy = dy.contiguous()
    cells, blocks = triton.cdiv(T, CELL), triton.cdiv(D, BLOCK)
    partial = torch.empty(cells, 2, D, dtype=torch.float32, device=dy.device)
    _pieces_kernel[(T, blocks)](ids, order, dy, sums, partial, T, D, CELL=CELL, BLOCK=BLOCK, num_warps=WARPS)
    _runs_kernel[(cells, blocks)](
        ids, partial, sums, T, D, CELL=CELL, CELLS=CELLS_AT_ONCE, BLOCK=BLOCK, num_warps=WARPS
    )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, sink: GradientSink, backend: str) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sink, ctx.backend = sink, backend
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        sums, holds = ctx.sink.open()
        dy = dy.flatten(0, -2) if ids.ndim else dy.unsqueeze(0)
        embedding_gradient_(sums, ids.flatten(), dy, holds, ctx.backend)
        ctx.sink.close()
        return None, None, None, None


def embedding(ids: Tensor, weight: Tensor, sink: GradientSink | None = None, backend: str = "auto") -> Tensor:
    """ids: (...), weight: (V, D) -> (..., D).  With a sink the gradient goes there, and autograd gets none."""
    if sink is None or not weight.requires_grad or not torch.is_grad_enabled():
        return F.embedding(ids, weight)
    return _Embedding.apply(ids, weight, sink, backend)

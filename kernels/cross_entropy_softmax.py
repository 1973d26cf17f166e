"""The row kernels of `kernels.cross_entropy`: statistics and gradient of a softmax over a long row of logits.

    m = max_v z_v      s = sum_v exp(z_v - m)      lse = m + log s      dz_v = (exp(z_v - lse) - [v = label]) * weight

One program owns a row.  `logits_loss_gradient_` needs the statistics before it can write, so it walks its row twice;
the second walk goes backwards, so that it begins with what the first one left in the L2 cache, and the first and last
block of the row never leave the registers.  HBM then sees one read and one write of the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = tl.constexpr(8)  # neighbouring logits of one thread: 16 bytes of bf16, reduced without talking to other threads
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # a start for running maxima: finite, so that LOWEST - LOWEST is 0 and not NaN

# Row block and warps.  1024 threads with at most 64 registers fill an SM with one row, so that 132 rows (35 MB of
# bf16 at V = 131072) are in flight and their second walk hits the 50 MB of L2; two rows an SM would not fit.
BLOCK, WARPS = 16384, 32


@triton.jit
def _fold(x, m, s):
    """Running maximum m and sum of exponentials s, both per line of x: (LINES, LANES) -> (LINES,)."""
    new = tl.maximum(m, tl.max(x, axis=1))
    s = s * tl.exp2((m - new) * LOG2_E) + tl.sum(tl.exp2((x - new[:, None]) * LOG2_E), axis=1)
    return new, s


@triton.jit
def _finish(m, s):
    """Maximum and sum of exponentials of the whole row from those of its lines."""
    top = tl.max(m, axis=0)
    return top, tl.sum(s * tl.exp2((m - top) * LOG2_E), axis=0)


@triton.jit
def _gradient(x, lse, cols, label, weight):
    p = tl.exp2((x.to(tl.float32) - lse) * LOG2_E)
    return tl.where(cols == label, p - 1.0, p) * weight


@triton.jit
def _statistics_kernel(logits_ptr, labels_ptr, stats_ptr, rows, V, vocab_offset, BLOCK: tl.constexpr):
    """One program: a row of logits (rows, V), contiguous -> its column of stats (3, rows), fp32."""
    t = tl.program_id(0)
    row = logits_ptr + t.to(tl.int64) * V
    label = tl.load(labels_ptr + t) - vocab_offset
    mine = (label >= 0) & (label < V)
    at_label = tl.load(row + label, mask=mine, other=0.0).to(tl.float32)
    offs = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full([BLOCK // LANES], LOWEST, tl.float32)
    s = tl.zeros([BLOCK // LANES], tl.float32)
    for start in tl.range(0, V, BLOCK):
        x = tl.load(row + start + offs, mask=start + offs < V, other=-float("inf")).to(tl.float32)
        m, s = _fold(x, m, s)
    top, total = _finish(m, s)
    tl.store(stats_ptr + t, top)
    tl.store(stats_ptr + rows + t, total)
    tl.store(stats_ptr + 2 * rows + t, at_label)


@triton.jit
def _gradient_kernel(
    logits_ptr, labels_ptr, weight_ptr, lse_ptr, V, vocab_offset, IGNORE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK logits of a row, overwritten by their gradient."""
    blocks = tl.cdiv(V, BLOCK)
    t = tl.program_id(0) // blocks
    row = logits_ptr + t.to(tl.int64) * V
    label = tl.load(labels_ptr + t)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    if label == IGNORE:
        tl.store(row + cols, tl.zeros([BLOCK], tl.float32).to(logits_ptr.dtype.element_ty), mask=cols < V)
    else:
        x = tl.load(row + cols, mask=cols < V, other=0.0)
        dx = _gradient(x, tl.load(lse_ptr + t), cols, label - vocab_offset, tl.load(weight_ptr + t).to(tl.float32))
        tl.store(row + cols, dx.to(logits_ptr.dtype.element_ty), mask=cols < V)


@triton.jit
def _loss_gradient_kernel(
    logits_ptr, labels_ptr, weight_ptr, losses_ptr, V, IGNORE: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: a row of logits (rows, V), contiguous -> its loss, and its gradient in the same place.

    EVEN: V is a multiple of BLOCK, so no access needs a mask.
    """
    t = tl.program_id(0)
    row = logits_ptr + t.to(tl.int64) * V
    label = tl.load(labels_ptr + t)
    offs = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    blocks = tl.cdiv(V, BLOCK)
    if label == IGNORE:
        tl.store(losses_ptr + t, 0.0)
        nothing = tl.zeros([BLOCK // LANES, LANES], tl.float32).to(logits_ptr.dtype.element_ty)
        for start in tl.range(0, V, BLOCK):
            tl.store(row + start + offs, nothing, mask=start + offs < V)
    else:
        # A label outside the vocabulary shows as NaN, instead of as a logit of the row before.
        at_label = tl.load(row + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
        kept = tl.load(row + offs, mask=EVEN | (offs < V), other=-float("inf"))  # stays in registers until the end
        m = tl.full([BLOCK // LANES], LOWEST, tl.float32)
        s = tl.zeros([BLOCK // LANES], tl.float32)
        m, s = _fold(kept.to(tl.float32), m, s)
        cols = tl.minimum(1, blocks - 1) * BLOCK + offs
        x = tl.load(row + cols, mask=EVEN | (cols < V), other=-float("inf"))
        for i in tl.range(1, blocks):
            cols = tl.minimum(i + 1, blocks - 1) * BLOCK + offs
            ahead = tl.load(row + cols, mask=EVEN | (cols < V), other=-float("inf"))  # on its way during the sums
            m, s = _fold(x.to(tl.float32), m, s)
            x = ahead
        top, total = _finish(m, s)
        lse = top + tl.log2(total) / LOG2_E
        weight = tl.load(weight_ptr + t).to(tl.float32)
        tl.store(losses_ptr + t, lse - at_label)
        # x is the last block here: the first walk ended with it, and the second begins with it.
        for i in tl.range(1, blocks):
            cols = (blocks - i - 1) * BLOCK + offs
            ahead = tl.load(row + cols, mask=EVEN | (cols < V), other=0.0)
            cols += BLOCK
            dx = _gradient(x, lse, cols, label, weight)
            tl.store(row + cols, dx.to(logits_ptr.dtype.element_ty), mask=EVEN | (cols < V))
            x = ahead
        dx = _gradient(kept, lse, offs, label, weight)
        tl.store(row + offs, dx.to(logits_ptr.dtype.element_ty), mask=EVEN | (offs < V))


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, numel, BLOCK: tl.constexpr):
    """x *= scale over a flat array, by a few programs that step through it; nothing is touched when the scale is 1."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, numel, tl.num_programs(0) * BLOCK):
            offs = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs, mask=offs < numel).to(tl.float32) * scale
            tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=offs < numel)


def _row_block(V: int) -> int:
    return min(BLOCK, max(triton.next_power_of_2(V), 128))


def logits_statistics(logits: Tensor, labels: Tensor, vocab_offset: int) -> Tensor:
    """(rows, V) -> (3, rows) fp32: maximum, sum of exp(logit - maximum), logit at the label (0: not in here)."""
    rows, V = logits.shape
    stats = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    _statistics_kernel[(rows,)](logits, labels, stats, rows, V, vocab_offset, BLOCK=_row_block(V), num_warps=WARPS)
    return stats


def logits_gradient_(
    logits: Tensor, lse: Tensor, labels: Tensor, token_weight: Tensor, vocab_offset: int, ignore: int
) -> Tensor:
    """Overwrites logits (rows, V) with (exp(logits - lse) - onehot) * token_weight; 0 where the label is `ignore`."""
    rows, V = logits.shape
    block = min(8192, _row_block(V))
    _gradient_kernel[(triton.cdiv(V, block) * rows,)](
        logits, labels, token_weight, lse, V, vocab_offset, IGNORE=ignore, BLOCK=block, num_warps=8
    )
    return logits


def logits_loss_gradient_(
    logits: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    losses: Tensor,
    ignore: int,
    block: int = BLOCK,
    warps: int = WARPS,
) -> Tensor:
    """Overwrites logits (rows, V) with the gradient of sum(token_weight * losses) and writes losses (rows,), fp32."""
    rows, V = logits.shape
    block = min(block, _row_block(V))
    _loss_gradient_kernel[(rows,)](
        logits, labels, token_weight, losses, V, IGNORE=ignore, EVEN=V % block == 0, BLOCK=block, num_warps=warps
    )
    return logits


def scale_(x: Tensor, scale: Tensor) -> Tensor:
    """x *= scale, a number on the device; free of traffic, and of a look from the host, when it is 1."""
    _scale_kernel[(min(1024, triton.cdiv(x.numel(), 8192)),)](x, scale, x.numel(), BLOCK=8192, num_warps=8)
    return x

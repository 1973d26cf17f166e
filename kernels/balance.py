"""What the balance loss of a mixture sums over a row's tokens (`nano3/model/moe.py` makes the loss of it).

    p_ti = s_ti / sum_j s_tj,     counts_i = #{t : s_ti among the K largest of token t},     sums_i = sum_t p_ti

Two launches where PyTorch takes some twenty and a sort.  Programs leave partial sums, which are added in a fixed order.
The backward computes p again:  ds_ti = (g_i - sum_j g_j p_tj) / sum_j s_tj,  with g the gradient of sums.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._bandwidth import jit, tl
from kernels._common import triton, use_triton

if triton is not None:
    from kernels.routing_kernels import _sort_key

TINY = 1e-20  # keeps a token whose scores all underflow from dividing by zero
BLOCK_T = 32


def balance_terms(scores_BSE: Tensor, top_k: int, real_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """p and, without gradient, 1 where an expert is among a token's K largest; both 0 where there is no token."""
    p = scores_BSE / (scores_BSE.sum(-1, keepdim=True) + TINY)
    with torch.no_grad():
        chosen = torch.zeros_like(p).scatter_(-1, scores_BSE.topk(top_k, dim=-1).indices, 1.0)
    if real_BS is not None:
        p, chosen = p * real_BS.unsqueeze(-1), chosen * real_BS.unsqueeze(-1)
    return p, chosen


def balance_sums_reference(scores_BSE: Tensor, top_k: int, real_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    p, chosen = balance_terms(scores_BSE, top_k, real_BS)
    return chosen.sum(1), p.sum(1)


@jit
def _tokens(
    scores_ptr, real_ptr, b, block, S,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, HAS_REAL: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_T, E_PAD] of a block of row b's tokens, zeros where there is none, their sums, and which count."""
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < S
    if HAS_REAL:
        live = live & (tl.load(real_ptr + b * S + t, mask=live, other=0) != 0)
    col = tl.arange(0, E_PAD)
    where = (b * S + t)[:, None] * E + col[None, :]
    inside = (t < S)[:, None] & (col < E)[None, :]
    scores = tl.load(scores_ptr + where, mask=inside & live[:, None], other=0.0)
    return scores, tl.sum(scores, 1) + 1e-20, live, where, inside


@jit
def _fwd_kernel(
    scores_ptr, real_ptr, partial_ptr, B, S, E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr, HAS_REAL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of a row.  scores (B, S, E) fp32, partial (2, B, blocks, E)."""
    b = (tl.program_id(0) % B).to(tl.int64)
    block = tl.program_id(0) // B
    scores, total, live, _, _ = _tokens(scores_ptr, real_ptr, b, block, S, E, E_PAD, BLOCK_T, HAS_REAL)
    col = tl.arange(0, E_PAD)
    LOWEST: tl.constexpr = -(2**63)
    key = tl.where((col < E)[None, :], _sort_key(scores, col[None, :], E_PAD), LOWEST)
    taken = tl.zeros([BLOCK_T, E_PAD], tl.float32)
    for _ in tl.static_range(K):
        best = key == tl.max(key, 1)[:, None]
        taken += best.to(tl.float32)
        key = tl.where(best, LOWEST, key)
    counts = tl.sum(tl.where(live[:, None], taken, 0.0), 0)
    sums = tl.sum(scores / total[:, None], 0)
    at = b * tl.cdiv(S, BLOCK_T) + block
    second = tl.num_programs(0).to(tl.int64)
    tl.store(partial_ptr + at * E + col, counts, mask=col < E)
    tl.store(partial_ptr + (second + at) * E + col, sums, mask=col < E)


@jit
def _bwd_kernel(
    scores_ptr, real_ptr, dsums_ptr, dscores_ptr, B, S, E: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, HAS_REAL: tl.constexpr,
):  # fmt: skip
    """dsums (B, E), dscores (B, S, E)."""
    b = (tl.program_id(0) % B).to(tl.int64)
    block = tl.program_id(0) // B
    scores, total, live, where, inside = _tokens(scores_ptr, real_ptr, b, block, S, E, E_PAD, BLOCK_T, HAS_REAL)
    col = tl.arange(0, E_PAD)
    g = tl.load(dsums_ptr + b * E + col, mask=col < E, other=0.0)
    mean = tl.sum(g[None, :] * scores, 1) / total
    dscores = (g[None, :] - mean[:, None]) / total[:, None]
    tl.store(dscores_ptr + where, tl.where(live[:, None], dscores, 0.0), mask=inside)


class _BalanceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, top_k: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
        B, S, E = scores.shape
        blocks = triton.cdiv(S, BLOCK_T)
        partial = torch.empty(2, B, blocks, E, dtype=torch.float32, device=scores.device)
        sizes = {"E": E, "E_PAD": triton.next_power_of_2(E), "BLOCK_T": BLOCK_T, "HAS_REAL": real is not None}
        _fwd_kernel[(B * blocks,)](scores, real, partial, B, S, K=top_k, **sizes)
        ctx.save_for_backward(scores, real)
        ctx.sizes = sizes
        counts, sums = partial.sum(2)
        ctx.mark_non_differentiable(counts)
        return counts, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dcounts: Tensor, dsums: Tensor) -> tuple[Tensor, None, None]:
        scores, real = ctx.saved_tensors
        B, S, _ = scores.shape
        dscores = torch.empty_like(scores)
        _bwd_kernel[(B * triton.cdiv(S, BLOCK_T),)](scores, real, dsums.contiguous(), dscores, B, S, **ctx.sizes)
        return dscores, None, None


def balance_sums(
    scores: Tensor, top_k: int, real: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """scores: (B, S, E) fp32, not negative; real: (B, S) bool, False for a token that does not count.

    Returns counts and sums, (B, E) each, in scores' dtype.  Differentiable once, through sums only.  Among equal scores
    the kernel takes the lower expert, PyTorch any.  Raises ValueError on shapes or a top_k that do not fit, and as
    `use_triton` does.
    """
    if scores.ndim != 3 or (real is not None and real.shape != scores.shape[:2]):
        given = "" if real is None else f" and real {tuple(real.shape)}"
        raise ValueError(f"balance_sums: scores {tuple(scores.shape)}{given} do not fit (B, S, E), (B, S)")
    if not 0 < top_k <= scores.shape[2]:
        raise ValueError(f"balance_sums: top_k={top_k} does not fit {scores.shape[2]} experts; give 1 to that number")
    if not use_triton(scores, backend) or scores.dtype != torch.float32 or scores.numel() == 0:
        return balance_sums_reference(scores, top_k, real)
    return _BalanceSums.apply(scores.contiguous(), top_k, None if real is None else real.contiguous())

"""Tokens on their way to the ranks that hold their experts: who goes where, in what order, with which papers.

A token travels once to each rank that holds at least one of its K experts.  The messages to all ranks are one tensor,
rank by rank, each rank's tokens in their order, so equal inputs give equal messages.  place_tr is the row of token t's
copy for rank r, or -1 if it does not go there; everything else follows from it:

    spread     rows[place_tr] = x_t                the rows that are sent; its gradient is a collection
    collect    y_t = sum_r rows[place_tr]          what comes back, added in fp32, r by r; its gradient spreads
    papers     for each row its K ids, as the rank it goes to counts its experts, and its K routing weights; an expert
               of another rank has the id `local`, one past the last, and the weight 0

Suffixes: T tokens, K choices, R ranks, D width.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._bandwidth import jit, tl
from kernels._common import accumulate_dtype, result_is_known, triton, use_triton

if triton is not None:
    from kernels.permute import copy_rows, plan_rows, sum_rows

BLOCK = 64  # tokens of a program


def departures(experts_TK: Tensor, local: int, ranks: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """experts_TK: (T, K) integers, of which rank r holds ids r * local .. (r + 1) * local - 1.

    Returns place_TR (T, R) and the number of tokens for each rank (R,) int64, on the device; nothing is read on the
    host.
    """
    T, K = experts_TK.shape
    home_TK = experts_TK.long() // local
    if T and use_triton(experts_TK, backend):
        to_TR = torch.full((T, ranks), ranks, dtype=torch.int32, device=home_TK.device)
        to_TR.scatter_(1, home_TK, home_TK.int())
        plan = plan_rows(to_TR, ranks, 128, T * min(K, ranks))
        return plan.place_TK, plan.tiles.offsets_E1.diff().long()
    wanted_TR = torch.zeros(T, ranks, dtype=torch.bool, device=home_TK.device).scatter_(1, home_TK, True)
    flat = wanted_TR.T.flatten()
    place = (flat.cumsum(0) - 1).where(flat, -1)
    return place.view(ranks, T).T.contiguous(), wanted_TR.sum(0)


def _travellers(place_TR: Tensor) -> tuple[Tensor, Tensor]:
    """The rank that each row goes to, and its token.  Reads a number on the host."""
    rank, token = (place_TR.T >= 0).nonzero(as_tuple=True)
    return rank, token


def _spread(x_TD: Tensor, place_TR: Tensor, rows: int, kernels: bool) -> Tensor:
    if kernels:
        return copy_rows(x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous(), place_TR, rows)
    return x_TD.index_select(0, _travellers(place_TR)[1])


def _collect(rows_D: Tensor, place_TR: Tensor, kernels: bool) -> Tensor:
    if kernels:
        return sum_rows(rows_D.contiguous(), place_TR)
    total = torch.zeros(len(place_TR), rows_D.shape[1], dtype=accumulate_dtype(rows_D), device=rows_D.device)
    for place_T in place_TR.unbind(1):
        token = (place_T >= 0).nonzero().squeeze(1)
        total.index_add_(0, token, rows_D[place_T[token]].to(total.dtype))
    return total.to(rows_D.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, place_TR: Tensor, rows: int, kernels: bool) -> Tensor:
        ctx.save_for_backward(place_TR)
        ctx.kernels = kernels
        return _spread(x_TD, place_TR, rows, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows: Tensor) -> tuple[Tensor | None, ...]:
        return _collect(drows, *ctx.saved_tensors, ctx.kernels), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_D: Tensor, place_TR: Tensor, kernels: bool) -> Tensor:
        ctx.save_for_backward(place_TR)
        ctx.kernels, ctx.rows = kernels, rows_D.shape[0]
        if result_is_known():
            return rows_D.new_empty(len(place_TR), rows_D.shape[1])
        return _collect(rows_D, place_TR, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(dy, *ctx.saved_tensors, ctx.rows, ctx.kernels), None, None


def spread(x_TD: Tensor, place_TR: Tensor, rows: int, backend: str = "auto") -> Tensor:
    """x: (T, D); place: of `departures`; rows: how many places are not -1 -> (rows, D).  Differentiable once."""
    return _Spread.apply(x_TD, place_TR, rows, len(x_TD) > 0 and use_triton(x_TD, backend))


def collect(rows_D: Tensor, place_TR: Tensor, backend: str = "auto") -> Tensor:
    """rows: (rows, D), as `spread` lays them -> (T, D) in their dtype.  Differentiable once.

    It ends a block: under `computing_again` the result is left undefined.
    """
    return _Collect.apply(rows_D, place_TR, len(place_TR) > 0 and use_triton(rows_D, backend))


@jit(do_not_specialize=["T"])
def _papers_kernel(
    experts_ptr, weights_ptr, place_ptr, papers_ptr, T,
    LOCAL: tl.constexpr, R: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the papers of BLOCK tokens for every rank.  experts, weights (T, K); place (T, R)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K_PAD)
    mask = (t < T)[:, None] & (k < K)[None, :]
    e = tl.load(experts_ptr + t[:, None] * K + k[None, :], mask=mask, other=0).to(tl.int32)
    w = tl.load(weights_ptr + t[:, None] * K + k[None, :], mask=mask, other=0.0)
    for r in range(R):
        row = tl.load(place_ptr + t * R + r, mask=t < T, other=-1).to(tl.int64)
        here = e // LOCAL == r
        paper = papers_ptr + row[:, None] * (2 * K) + k[None, :]
        goes = mask & (row >= 0)[:, None]
        tl.store(paper, tl.where(here, e - r * LOCAL, LOCAL).to(tl.float32), mask=goes)
        tl.store(paper + K, tl.where(here, w, 0.0), mask=goes)


@jit(do_not_specialize=["T"])
def _papers_backward_kernel(
    experts_ptr, place_ptr, dpapers_ptr, dweights_ptr, T,
    LOCAL: tl.constexpr, R: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK tokens' weights, each from the row that went to its expert's rank."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K_PAD)
    mask = (t < T)[:, None] & (k < K)[None, :]
    e = tl.load(experts_ptr + t[:, None] * K + k[None, :], mask=mask, other=0).to(tl.int32)
    row = tl.load(place_ptr + t[:, None] * R + e // LOCAL, mask=mask, other=-1).to(tl.int64)
    dw = tl.load(dpapers_ptr + row * (2 * K) + K + k[None, :], mask=mask & (row >= 0), other=0.0)
    tl.store(dweights_ptr + t[:, None] * K + k[None, :], dw, mask=mask)


class _Papers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights_TK: Tensor, experts_TK: Tensor, place_TR: Tensor, rows: int, local: int) -> Tensor:
        T, K = weights_TK.shape
        ctx.save_for_backward(experts_TK, place_TR)
        ctx.sizes = {"LOCAL": local, "R": place_TR.shape[1], "K": K, "K_PAD": triton.next_power_of_2(K)}
        out = torch.empty(rows, 2 * K, dtype=weights_TK.dtype, device=weights_TK.device)
        _papers_kernel[(triton.cdiv(T, BLOCK),)](experts_TK, weights_TK, place_TR, out, T, **ctx.sizes, BLOCK=BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dpapers: Tensor) -> tuple[Tensor | None, ...]:
        experts_TK, place_TR = ctx.saved_tensors
        dweights = torch.empty(experts_TK.shape, dtype=dpapers.dtype, device=dpapers.device)
        grid, dpapers = (triton.cdiv(len(experts_TK), BLOCK),), dpapers.contiguous()
        _papers_backward_kernel[grid](
            experts_TK, place_TR, dpapers, dweights, len(experts_TK), **ctx.sizes, BLOCK=BLOCK
        )
        return dweights, None, None, None, None


def papers(
    weights_TK: Tensor, experts_TK: Tensor, place_TR: Tensor, rows: int, local: int, backend: str = "auto"
) -> Tensor:
    """weights: (T, K) fp32 or float64; experts, place, local: as in `departures`; rows: as in `spread`.

    Returns (rows, 2 K) in the weights' dtype, in which ids are exact: K ids, then K weights.  Differentiable in the
    weights, once.
    """
    if len(weights_TK) and use_triton(weights_TK, backend):
        return _Papers.apply(weights_TK.contiguous(), experts_TK.contiguous(), place_TR, rows, local)
    rank, token = _travellers(place_TR)
    experts, rank = experts_TK[token], rank.unsqueeze(1)
    here = experts // local == rank
    ids = (experts - rank * local).where(here, local)
    return torch.cat([ids.to(weights_TK.dtype), weights_TK[token].where(here, 0)], dim=1)

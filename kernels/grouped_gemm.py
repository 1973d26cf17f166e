"""The routed experts: y_t = sum_k w_tk * down_e relu(up_e x_t)^2,  e = experts_tk.

Rows are ordered by expert, each expert multiplies its slice, and each token gathers its K results back: no capacity, no
dropped token, no atomics, so equal inputs give equal bits.  Suffixes: T tokens, K chosen, R = T * K rows, D, F, E.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common import accumulate_dtype


def experts_reference(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """The formula: every expert on every token, weighted by zero where it was not chosen."""
    dense_TE = weights_TK.new_zeros(x_TD.shape[0], up_EFD.shape[0]).scatter_add(-1, experts_TK, weights_TK)
    hidden = torch.einsum("td,efd->tef", x_TD, up_EFD).relu().square() * dense_TE.unsqueeze(-1).to(x_TD.dtype)
    return torch.einsum("tef,edf->td", hidden, down_EDF)


class _Gather(torch.autograd.Function):
    """Rows of x in expert order.  Backward: each token sums the gradients of its K rows, in a fixed order."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, order_R // place_TK.shape[1])

    @staticmethod
    def backward(ctx, drows_RD: Tensor) -> tuple[Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return _sum_rows(drows_RD, place_TK), None, None


class _Combine(torch.autograd.Function):
    """The conjugate of _Gather: each token sums its K rows; backward hands its gradient to each of them."""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.top_k = place_TK.shape[1]
        return _sum_rows(rows_RD, place_TK)

    @staticmethod
    def backward(ctx, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return dy_TD.index_select(0, order_R // ctx.top_k), None, None


def _sum_rows(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    gathered = rows_RD.index_select(0, place_TK.flatten()).unflatten(0, place_TK.shape)
    return gathered.sum(1, dtype=accumulate_dtype(rows_RD)).to(rows_RD.dtype)


def sort_by_expert(experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """order (R,): the flat (token, choice) index of each row in expert order, stable; place (T, K): its inverse."""
    order = experts_TK.flatten().argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return order, place.view_as(experts_TK)


def experts(x: Tensor, weights: Tensor, experts_TK: Tensor, counts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x: (T, D); weights: (T, K) fp32; experts_TK: (T, K); counts: (E,); up: (E, F, D); down: (E, D, F) -> (T, D).

    Experts without rows cost nothing and get a zero gradient.  The routing weight multiplies the activation, before the
    down projection, as Megatron does; the K rows of a token are summed in fp32.  Reads `counts` on the host.
    """
    order, place = sort_by_expert(experts_TK)
    rows = _Gather.apply(x, order, place)
    scale = weights.flatten()[order].unsqueeze(-1)
    sizes = counts.tolist()
    out = []
    for xe, we, up_e, down_e in zip(rows.split(sizes), scale.split(sizes), up.unbind(0), down.unbind(0), strict=True):
        hidden = F.linear(xe, up_e).relu()
        out.append(F.linear((hidden * hidden * we).to(x.dtype), down_e))
    return _Combine.apply(torch.cat(out), order, place)

"""Sigmoid top-k routing with a selection bias (arXiv:2408.15664) and optional group limits (arXiv:2412.19437, 2.1.2).

    s = sigmoid(x W^T),  I = the K largest of s + bias,  w = scale * s_I / sum s_I

The kernels (routing_kernels.py) do all of it in one launch and save only s and I beside the inputs.

Suffixes: T tokens, D width, E experts, K chosen per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._common import accumulate_dtype, triton, use_triton

if triton is not None:
    from kernels.permute import count_experts
    from kernels.routing_kernels import route_backward, route_forward

MAX_EXPERTS = 1024  # a program of the kernel holds the scores of all experts


class Routes(NamedTuple):
    scores_TE: Tensor  # sigmoid(x W^T), fp32
    weights_TK: Tensor  # what each chosen expert counts, fp32
    experts_TK: Tensor  # which experts, int64


def route_reference(
    x_TD: Tensor,
    w_ED: Tensor,
    bias_E: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> Routes:
    acc = accumulate_dtype(x_TD)
    scores_TE = F.linear(x_TD.to(acc), w_ED.to(acc)).sigmoid()  # fp32: bf16 scores tie, and a tie changes experts
    with torch.no_grad():
        select_TE = scores_TE + bias_E  # the bias decides who is chosen, never how much it counts
        if n_group > 1:
            groups = select_TE.unflatten(-1, (n_group, -1))  # (T, n_group, E / n_group)
            best = groups.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
            select_TE = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        experts_TK = select_TE.topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, experts_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return Routes(scores_TE, weights_TK * scale, experts_TK)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, top_k, n_group, topk_group, norm, scale):
        ctx.set_materialize_grads(False)  # without a balance loss the scores have no gradient
        scores, weights, experts = route_forward(x, w, bias, top_k, n_group, topk_group, norm, scale)
        ctx.save_for_backward(x, w, scores, experts)
        ctx.norm, ctx.scale = norm, scale
        ctx.mark_non_differentiable(experts)
        return scores, weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx, dscores: Tensor | None, dweights: Tensor | None, _) -> tuple[Tensor | None, ...]:
        dscores, dweights = (g if g is None else g.contiguous() for g in (dscores, dweights))
        dx = dw = None
        if dscores is not None or dweights is not None:
            dx, dw = route_backward(
                dscores, dweights, *ctx.saved_tensors, ctx.norm, ctx.scale, *ctx.needs_input_grad[:2]
            )
        return dx, dw, *(None,) * 6


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scale: float = 1.0,
    backend: str = "auto",
) -> Routes:
    """x: (T, D), any dtype; weight: (E, D); bias: (E,) fp32, no gradient.  Returns Routes, all fp32 but the ids.

    Group limits (n_group > 1): a group scores by its two best experts; only the topk_group best groups are chosen from.
    The order of the K experts of a token is not specified.  Scores are fp32-accurate also for bf16 inputs, because the
    choice depends on their last bits.  Raises ValueError on shapes and numbers that do not fit.
    """
    E = weight.shape[0]
    options = (top_k, n_group, topk_group, norm_topk_prob, scale)
    if not x.ndim == weight.ndim == 2 or x.shape[1] != weight.shape[1] or bias.shape != (E,):
        raise ValueError(
            f"route: x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit (T, D), "
            "(E, D), (E,)"
        )
    if not 0 < top_k <= E:
        raise ValueError(f"top_k={top_k} does not fit {E} experts")
    if n_group < 1:
        raise ValueError(f"n_group={n_group} must be at least 1, which means no groups")
    if n_group > 1 and (E % n_group or E // n_group < 2 or not 0 < topk_group <= n_group):
        raise ValueError(f"n_group={n_group}, topk_group={topk_group}: groups of {E} experts need at least two each")
    if n_group > 1 and top_k > topk_group * (E // n_group):
        raise ValueError(
            f"top_k={top_k}: the topk_group={topk_group} groups that a token may choose from hold "
            f"{topk_group * (E // n_group)} of {E} experts"
        )
    if use_triton(x, backend) and x.shape[0] > 0 and E <= MAX_EXPERTS and weight.dtype != torch.float64:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return Routes(*_Route.apply(x, weight.contiguous(), bias.contiguous(), *options))
    return route_reference(x, weight, bias, *options)


def expert_counts(experts_TK: Tensor, num_experts: int, backend: str = "auto") -> Tensor:
    """Rows per expert, (E,) int64.  On a GPU without asking the host, which torch.bincount does.

    An id outside 0 .. E - 1 (E itself stands for an expert of another rank) is counted nowhere.
    """
    if use_triton(experts_TK, backend) and experts_TK.numel() > 0:
        return count_experts(experts_TK, num_experts)
    ids = experts_TK.flatten()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    return torch.bincount(ids, minlength=num_experts + 1)[:num_experts]

"""Sigmoid top-k routing with a selection bias (arXiv:2408.15664) and optional group limits (arXiv:2412.19437, 2.1.2).

Suffixes: T tokens, D width, E experts, K chosen per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common import accumulate_dtype


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


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scale: float = 1.0,
) -> Routes:
    """x: (T, D), any dtype; weight: (E, D); bias: (E,) fp32, no gradient.  Returns Routes, all fp32 but the ids.

    Group limits (n_group > 1): a group scores by its two best experts; only the topk_group best groups can be chosen from.
    The order of the K experts of a token is not specified.
    """
    return route_reference(x, weight, bias, top_k, n_group, topk_group, norm_topk_prob, scale)


def expert_counts(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Rows per expert, (E,) int64."""
    return torch.bincount(experts_TK.flatten(), minlength=num_experts)

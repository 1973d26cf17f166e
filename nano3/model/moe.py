"""Mixture of experts: a sigmoid router with a selection bias, squared-ReLU experts and a shared one; the dense MLP.

Two forces keep the experts balanced (arXiv:2408.15664, arXiv:2412.19437 section 2.1.2).  After each optimizer step the
selection bias moves by a fixed amount towards the experts that got too few tokens; and a small auxiliary loss per
sequence pushes the scores themselves.  Routing and both statistics are fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.grouped_gemm import experts
from kernels.routing import Routes, expert_counts, route
from nano3.config import ModelConfig


class Balance(NamedTuple):
    """What a mixture layer reports about its routing."""

    aux_B: Tensor  # the auxiliary loss of each sequence, before its coefficient; 1 at perfect balance
    counts_E: Tensor  # rows each expert was given, int64


class MLP(nn.Module):
    """down relu(up x)^2, without a gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None, cache: None = None) -> Tensor:  # (..., D) -> (..., D)
        return self.down_proj(self.up_proj(u).relu().square())

    def step(self, u: Tensor, cache: None) -> Tensor:
        return self(u)


class Router(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.options = (c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, c.routed_scaling_factor)
        self.backend = c.kernels.routing
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(c.n_routed_experts))

    def forward(self, x_TD: Tensor) -> Routes:
        return route(x_TD, self.weight, self.e_score_correction_bias, *self.options, self.backend)


class Experts(nn.Module):
    """All experts in two tensors, one matrix [out, in] per expert."""

    def __init__(self, E: int, D: int, F: int, backend: str) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(E, F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        self.backend = backend

    def forward(self, x_TD: Tensor, routes: Routes, counts_E: Tensor) -> Tensor:
        weights, ids = routes.weights_TK, routes.experts_TK
        return experts(x_TD, weights, ids, counts_E, self.up_proj, self.down_proj, self.backend)


class MoE(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.E, self.K = c.n_routed_experts, c.num_experts_per_tok
        self.gate = Router(c)
        self.experts = Experts(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, c.kernels.experts)
        self.shared_experts = MLP(c.hidden_size, c.moe_shared_expert_intermediate_size)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None, cache: None = None) -> Tensor | tuple[Tensor, Balance]:
        """(B, S, D) -> (B, S, D); in training mode also the Balance of this layer."""
        x = u.flatten(0, -2)
        routes = self.gate(x)
        counts = expert_counts(routes.experts_TK, self.E, self.gate.backend)
        y = self.experts(x, routes, counts).view_as(u) + self.shared_experts(u)
        if not self.training:
            return y
        return y, Balance(sequence_balance_loss(routes.scores_TE.view(*u.shape[:-1], self.E), self.K), counts)

    def step(self, u: Tensor, cache: None) -> Tensor:
        y = self(u)
        return y[0] if self.training else y


def sequence_balance_loss(scores_BSE: Tensor, top_k: int) -> Tensor:
    """E / (K S^2) * sum_i c_i sum_t p_ti per sequence, (B,): 1 when every expert is chosen equally often.

    p are the scores normalised over all experts; c_i counts the tokens whose K largest p, without bias or group limits,
    hold expert i.  The gradient flows through p only.  Convention of Megatron's seq_aux_loss; a packed row is one
    sequence.
    """
    S, E = scores_BSE.shape[1:]
    p = scores_BSE / (scores_BSE.sum(-1, keepdim=True) + 1e-20)
    with torch.no_grad():
        chosen = torch.zeros_like(p).scatter_(-1, p.topk(top_k, dim=-1).indices, 1.0)
        counts = chosen.sum(1)  # (B, E)
    return (counts * p.sum(1)).sum(-1) * (E / (top_k * S * S))


@torch.no_grad()
def update_selection_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """bias_i += rate * sign(mean load - load_i), in place; once per optimizer step, with the whole step's counts."""
    load = counts_E.to(bias_E.dtype)
    bias_E += rate * torch.sign(load.mean() - load)

"""Mixture of experts: a sigmoid router with a selection bias, squared-ReLU experts and a shared one; the dense MLP.

Two forces keep the experts balanced (arXiv:2408.15664, arXiv:2412.19437 section 2.1.2).  After each optimizer step the
selection bias moves by a fixed amount towards the experts that got too few tokens; and a small auxiliary loss per
sequence pushes the scores themselves.  Routing and both statistics are fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.balance import balance_sums, balance_terms
from kernels.gradient_sink import sink_of
from kernels.grouped_gemm import experts
from kernels.relu2 import relu2
from kernels.routing import Routes, expert_counts, route
from nano3.config import ModelConfig
from nano3.model.cache import Rows
from nano3.model.linear import Linear
from nano3.parallel.collectives import all_sum, arrive
from nano3.parallel.expert import Trip
from nano3.parallel.mesh import ALONE, Axis, Mesh
from nano3.parallel.tensor import depart_enter, depart_leave, enter, leave


class Balance(NamedTuple):
    """What a mixture layer reports about its routing."""

    aux_B: Tensor  # auxiliary loss of each row, before its coefficient, 1 at perfect balance; this tp rank's summand
    counts_E: Tensor  # rows that the tokens of this rank gave each expert, int64


class MLP(nn.Module):
    """down relu(up x)^2, without a gate.  Each tp rank has hidden / tp of the hidden units."""

    def __init__(self, width: int, hidden: int, mesh: Mesh = ALONE, backend: str = "auto") -> None:
        super().__init__()
        self.tp, self.backend = mesh.tp, backend
        self.up_proj = Linear(width, hidden // self.tp.size)
        self.down_proj = Linear(hidden // self.tp.size, width, ends_block=True)

    def hidden(self, u: Tensor) -> Tensor:
        return relu2(self.up_proj(u), self.backend)

    def forward(self, u: Tensor, rows: Rows, cache: None, whole: bool) -> Tensor:  # (..., D) -> (..., D)
        return leave(self.down_proj(self.hidden(enter(u, self.tp, whole))), self.tp, whole)

    def step(self, u: Tensor, cache: None) -> Tensor:
        return self(u, Rows(), None, whole=True)


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
    """A rank's experts in two tensors, one matrix [out, in] per expert."""

    def __init__(self, E: int, D: int, F: int, backend: str) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(E, F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        self.backend = backend

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, counts_E: Tensor, rows: int) -> Tensor:
        """The id E stands for a choice that is computed elsewhere; `rows` choices are computed here.

        In training the weights have a sink, which takes their gradients past autograd (`Gradients`).
        """
        weights = self.up_proj, self.down_proj
        sinks = dict(zip(("up_grad", "down_grad"), map(sink_of, weights), strict=True))
        return experts(x_TD, weights_TK, experts_TK, counts_E, *weights, self.backend, rows=rows, **sinks)


class MoE(nn.Module):
    """Routing looks at the tokens that a rank holds, while those of the other tp ranks come in for the shared expert.
    Its first product is computed while tokens travel to their experts' ranks, its second while they travel back.

    The input comes by three names, for the shared expert, the router and the routed experts: their gradients are then
    added where they arrive.  The output, likewise, is in summands.
    """

    READERS = 3

    def __init__(self, c: ModelConfig, mesh: Mesh = ALONE) -> None:
        super().__init__()
        self.tp, self.ep = mesh.tp, mesh.ep
        self.E, self.K = c.n_routed_experts, c.num_experts_per_tok
        self.gate = Router(c)
        mine = c.n_routed_experts // self.ep.size
        self.experts = Experts(mine, c.hidden_size, c.moe_intermediate_size, c.kernels.experts)
        self.shared_experts = MLP(c.hidden_size, c.moe_shared_expert_intermediate_size, mesh, c.kernels.relu2)

    def forward(
        self, inputs: Sequence[Tensor], rows: Rows, cache: None, whole: bool
    ) -> tuple[tuple[Tensor, ...], Balance | None]:  # each (B, S / tp, D)
        u, for_router, for_experts = inputs
        gathering = depart_enter(u, self.tp, whole)
        divided = whole and self.tp.size > 1  # ranks that hold all tokens share them
        mine = slice(self.tp.rank, None, self.tp.size)

        def part(t: Tensor) -> Tensor:
            t = t.flatten(0, -2)
            return t[mine] if divided else t  # not t[:], whose gradient is a copy into a tensor of zeros

        routes = self.gate(part(for_router))
        counts = expert_counts(routes.experts_TK, self.E, self.gate.backend)
        trip = Trip(part(for_experts), routes.weights_TK, routes.experts_TK, counts, self.ep, self.gate.backend)
        hidden = self.shared_experts.hidden(arrive(gathering))
        trip.depart_home(self.experts(*trip.arrive()))
        y = self.shared_experts.down_proj(hidden)
        if divided:
            x = u.flatten(0, -2)
            place = torch.arange(len(x), device=x.device)[mine]
            routed = torch.zeros_like(x).index_copy(0, place, trip.arrive_home())
            return (leave(y + routed.view_as(u), self.tp, whole),), None
        scattering = depart_leave(y, self.tp, whole)
        routed = trip.arrive_home().view_as(u)
        out = arrive(scattering), routed
        if not self.training:
            return out, None
        scores = routes.scores_TE.view(*u.shape[:-1], self.E)
        if rows.real is not None:  # padding is computed like any token, and counted nowhere
            real = routes.experts_TK.where(rows.real.reshape(-1, 1), self.E)
            counts = expert_counts(real, self.E + 1, self.gate.backend)[:-1]
        aux = sequence_balance_loss(scores, self.K, self.tp, rows.real, rows.document, self.gate.backend)
        return out, Balance(aux, counts)

    def step(self, u: Tensor, cache: None) -> Tensor:
        summands, _ = self((u,) * self.READERS, Rows(), None, whole=True)
        return functools.reduce(torch.add, summands)


def sequence_balance_loss(
    scores_BSE: Tensor,
    top_k: int,
    tp: Axis = ALONE.tp,
    real_BS: Tensor | None = None,
    document_BS: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """E sum_i f_i mean_t p_ti per row, (B,): 1 when every expert is chosen equally often.

    p are the scores normalised over all experts; f_i is the share that expert i has in the choices of the sequence,
    each token choosing its K largest p, without bias or group limits.  The gradient flows through p only.  Convention
    of Megatron's seq_aux_loss, but that here each document is a sequence: where a row holds several (document_BS, see
    `Rows`), f is that of the token's own document, which makes the result the mean of the documents' losses, weighted
    by their tokens.  With the sequence split over tp, f is the whole sequence's and the mean's sum this rank's, so the
    ranks' results add up to the loss.  Where real_BS is False there is no token.
    """
    B, S, E = scores_BSE.shape
    length = torch.full((B,), S * tp.size, device=scores_BSE.device)
    if real_BS is not None:
        length = all_sum(real_BS.sum(1), tp.group).clamp_min(1)
    if document_BS is None:
        counts, sums = balance_sums(scores_BSE, top_k, real_BS, backend)  # (B, E)
        counts = all_sum(counts, tp.group)
        share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
        return (share * sums).sum(-1) * E / length
    p, chosen = balance_terms(scores_BSE, top_k, real_BS)
    counts = torch.zeros(B * S * tp.size, E, dtype=p.dtype, device=p.device)  # as many documents as tokens, at most
    counts = all_sum(counts.index_add_(0, document_BS.flatten(), chosen.flatten(0, 1)), tp.group)
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return (share[document_BS] * p).sum((1, 2)) * E / length


@torch.no_grad()
def update_selection_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """bias_i += rate * sign(mean load - load_i), in place; once per optimizer step, with the whole step's counts."""
    load = counts_E.to(bias_E.dtype)
    bias_E += rate * torch.sign(load.mean() - load)

"""Expert parallelism: tokens travel to the ranks that hold their experts, and their results travel back.

A token goes once to each rank that holds at least one of its K experts, with its weights for them; that rank adds up
its experts' results, so one row comes back.  At ep = 8, K = 6 of 128 experts that is 3.9 rows a token abroad instead
of the 5.25 that one row per (token, expert) takes, and at ep = 2 half a row instead of 3.  No capacity, no dropped
token; rows lie in the order of their ranks and tokens, so equal inputs give equal bits.

    x (T, D) --exchange--> x of all senders (N, D) --this rank's experts--> (N, D) --exchange--> sum per token (T, D)

The sizes of the messages must be known to the host: one small exchange and one copy to it per layer.  The shared
expert's two products are meant to run between departure and arrival.

Suffixes: T tokens here, N tokens that arrive, K choices, D width, R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nano3.parallel.collectives import arrive, depart_rows
from nano3.parallel.mesh import Axis


class _Spread(torch.autograd.Function):
    """Rows of x in the order they are sent.  Backward: each token sums the gradients of its rows, rank by rank."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, token: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(token)
        ctx.sizes, ctx.tokens = sizes, x_TD.shape[0]
        return x_TD.index_select(0, token)

    @staticmethod
    def backward(ctx, drows: Tensor) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return _sum_per_token(drows, token, ctx.sizes, ctx.tokens), None, None


class _Collect(torch.autograd.Function):
    """The conjugate of _Spread: each token sums its rows; backward hands its gradient to each of them."""

    @staticmethod
    def forward(ctx, rows: Tensor, token: Tensor, sizes: list[int], tokens: int) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_per_token(rows, token, sizes, tokens)

    @staticmethod
    def backward(ctx, dy_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (token,) = ctx.saved_tensors
        return dy_TD.index_select(0, token), None, None, None


def _sum_per_token(rows: Tensor, token: Tensor, sizes: list[int], tokens: int) -> Tensor:
    """A token occurs once per rank at most, so each rank's rows can be added at once and in a fixed order."""
    total = torch.zeros(tokens, rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    for index, part in zip(token.split(sizes), rows.split(sizes), strict=True):
        total.index_add_(0, index, part.to(total.dtype))
    return total.to(rows.dtype)


class Trip:
    """One layer's tokens on their way through the ranks of an ep axis; with one rank, nothing moves.

    x_TD: (T, D); weights_TK: (T, K) fp32; experts_TK: (T, K), over all experts; counts_E: rows per expert.
    """

    def __init__(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, counts_E: Tensor, ep: Axis) -> None:
        self.ep, self.T = ep, x_TD.shape[0]
        self.local = counts_E.shape[0] // ep.size
        if ep.size == 1:
            self.arrived = (x_TD, weights_TK, experts_TK, counts_E, experts_TK.numel())
            return
        home_TK = experts_TK // self.local
        wanted_RT = torch.zeros(self.T, ep.size, dtype=torch.bool, device=x_TD.device).scatter_(1, home_TK, True).T
        self.send, self.receive, self.counts, self.rows = self._sizes(wanted_RT, counts_E)
        place = wanted_RT.flatten().nonzero_static(size=sum(self.send)).squeeze(1)
        self.token = place % max(1, self.T)
        rank = (place // max(1, self.T)).unsqueeze(1)
        here = home_TK[self.token] == rank  # which of the K choices are this rank's
        ids = (experts_TK[self.token] - rank * self.local).where(here, self.local)
        weights = weights_TK[self.token].where(here, 0)
        papers = torch.cat([ids.to(weights.dtype), weights], dim=1)  # one message; ids are small, so exact
        self.papers = depart_rows(papers, self.send, self.receive, ep.group)
        self.x = depart_rows(_Spread.apply(x_TD, self.token, self.send), self.send, self.receive, ep.group)

    def _sizes(self, wanted_RT: Tensor, counts_E: Tensor) -> tuple[list[int], list[int], Tensor, int]:
        """Tokens to and from each rank, rows per expert here, their sum.  The layer's one wait of the host."""
        mine = torch.cat([wanted_RT.sum(1, keepdim=True), counts_E.view(self.ep.size, -1)], dim=1)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self.ep.group)
        counts = theirs[:, 1:].sum(0)
        *sizes, rows = torch.cat([mine[:, 0], theirs[:, 0], counts.sum().unsqueeze(0)]).tolist()
        return sizes[: self.ep.size], sizes[self.ep.size :], counts, rows

    def arrive(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """x (N, D); weights (N, K); experts (N, K), counted from this rank's first, and for a choice that is computed
        elsewhere one past its last; rows per expert; the number of rows in all, on the host."""
        if self.ep.size == 1:
            return self.arrived
        papers = arrive(self.papers)
        ids, weights = papers.tensor_split(2, dim=1)
        return arrive(self.x), weights, ids.detach().long(), self.counts, self.rows

    def depart_home(self, y_ND: Tensor) -> None:
        self.y = (y_ND, None) if self.ep.size == 1 else depart_rows(y_ND, self.receive, self.send, self.ep.group)

    def arrive_home(self) -> Tensor:
        """(T, D): each token's sum over the ranks it went to."""
        y = arrive(self.y)
        return y if self.ep.size == 1 else _Collect.apply(y, self.token, self.send, self.T)

"""Expert parallelism: tokens travel to the ranks that hold their experts, and their results travel back.

A token goes once to each rank that holds at least one of its K experts, with its weights for them; that rank adds up
its experts' results, so one row comes back.  At ep = 8, K = 6 of 128 experts that is 3.9 rows a token abroad instead
of the 5.25 that one row per (token, expert) takes, and at ep = 2 half a row instead of 3.  No capacity, no dropped
token; rows lie in the order of their ranks and tokens, so equal inputs give equal bits.

    x (T, D) --exchange--> x of all senders (N, D) --this rank's experts--> (N, D) --exchange--> sum per token (T, D)

The sizes of the messages must be known to the host: one small exchange and one copy to it per layer, not repeated when
the layer is recomputed (`remember`).  The shared expert's two products are meant to run between departure and arrival.

Suffixes: T tokens here, N tokens that arrive, K choices, D width, R ranks, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels._common import result_is_known
from kernels.dispatch import collect, departures, papers, spread
from nano3.parallel.collectives import arrive, depart_rows
from nano3.parallel.mesh import Axis


class Plan(NamedTuple):
    """Where a layer's tokens go, and what comes."""

    place_TR: Tensor  # `kernels.dispatch`
    send: list[int]  # tokens to each rank
    receive: list[int]  # and from each
    counts: Tensor  # rows per expert of this rank
    rows: int  # their sum


_recorded: list[Plan] | None = None  # while a forward pass that will be repeated runs
_repeated: list[Plan] | None = None  # while it is repeated


def remember() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Two contexts for activation checkpointing: what is planned in the first is repeated in the second.

    Routing gives the same bits again, so the second pass needs no exchange of sizes, and the host does not wait.
    """
    plans: list[Plan] = []

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        global _recorded
        outer, _recorded = _recorded, plans
        try:
            yield
        finally:
            _recorded = outer

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        global _repeated
        outer, _repeated = _repeated, [*plans]
        try:
            yield
        finally:
            _repeated = outer

    return first(), again()


class Trip:
    """One layer's tokens on their way through the ranks of an ep axis; with one rank, nothing moves.

    x_TD: (T, D); weights_TK: (T, K) fp32; experts_TK: (T, K), over all experts; counts_E: rows per expert.
    """

    def __init__(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, counts_E: Tensor, ep: Axis, backend: str = "auto"
    ) -> None:
        self.ep, self.backend = ep, backend
        self.local = counts_E.shape[0] // ep.size
        if ep.size == 1:
            self.arrived = (x_TD, weights_TK, experts_TK, counts_E, experts_TK.numel())
            return
        self.plan = _repeated.pop(0) if _repeated else self._plan(experts_TK, counts_E)
        if _recorded is not None:
            _recorded.append(self.plan)
        place, send, receive, _, _ = self.plan
        slips = papers(weights_TK, experts_TK, place, sum(send), self.local, backend)  # one message for ids and weights
        self.papers = depart_rows(slips, send, receive, ep.group)
        self.x = depart_rows(spread(x_TD, place, sum(send), backend), send, receive, ep.group)

    def _plan(self, experts_TK: Tensor, counts_E: Tensor) -> Plan:
        """The layer's one wait of the host."""
        R = self.ep.size
        place, sent_R = departures(experts_TK, self.local, R, self.backend)
        mine = torch.cat([sent_R.unsqueeze(1), counts_E.view(R, -1)], dim=1)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self.ep.group)
        counts = theirs[:, 1:].sum(0)
        *sizes, rows = torch.cat([mine[:, 0], theirs[:, 0], counts.sum().unsqueeze(0)]).tolist()
        return Plan(place, sizes[:R], sizes[R:], counts, rows)

    def arrive(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """x (N, D); weights (N, K); experts (N, K), counted from this rank's first, and for a choice that is computed
        elsewhere one past its last; rows per expert; the number of rows in all, on the host."""
        if self.ep.size == 1:
            return self.arrived
        ids, weights = arrive(self.papers).tensor_split(2, dim=1)
        return arrive(self.x), weights, ids.detach().long(), self.plan.counts, self.plan.rows

    def depart_home(self, y_ND: Tensor) -> None:
        if self.ep.size == 1:
            self.y = y_ND, None
        else:
            self.y = depart_rows(y_ND, self.plan.receive, self.plan.send, self.ep.group, result_is_known())

    def arrive_home(self) -> Tensor:
        """(T, D): each token's sum over the ranks it went to; undefined where the block is computed again, and nobody
        reads it."""
        y = arrive(self.y)
        return y if self.ep.size == 1 else collect(y, self.plan.place_TR, self.backend)

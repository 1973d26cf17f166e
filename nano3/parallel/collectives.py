"""All collectives that meet autograd, each beside its conjugate.

A collective and the gradient of it are a pair because every rank's loss is a part of one global loss:

    gather_sequence   all-gather of pieces of the sequence    <->  reduce-scatter: each rank used the whole
    scatter_sequence  reduce-scatter of summands              <->  all-gather: each summand feeds every piece
    copy_to           identity (all ranks read it)            <->  all-reduce: the readers' gradients add up
    reduce_from       all-reduce of summands                  <->  identity: each summand counts once
    exchange_rows     all-to-all of rows                      <->  all-to-all with the sizes swapped

Every function returns a new tensor (or its argument) and makes no call where the group is None.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# torch 2.13 renames these two and warns about the old names
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_sum(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group.  No gradient."""
    if group is None:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def all_stack(x: Tensor, group: Group) -> Tensor:
    """x (...) of every rank -> (ranks, ...).  No gradient."""
    if group is None:
        return x.unsqueeze(0)
    out = x.new_empty(group.size(), *x.shape)
    _all_gather(out.flatten(0, 1) if x.ndim else out, x.detach().contiguous(), group=group)
    return out


def reduce_scatter(flat: Tensor, group: Group, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """(ranks, n) -> this rank's row of the sum, (n,).  No gradient."""
    if group is None:
        return flat[0], None
    out = flat.new_empty(flat.shape[1])
    work = _reduce_scatter(out, flat.flatten(), group=group, async_op=async_op)
    return out, work


def all_gather(flat: Tensor, group: Group, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """(n,) of every rank -> (ranks, n).  No gradient."""
    if group is None:
        return flat.unsqueeze(0), None
    out = flat.new_empty(group.size(), flat.numel())
    work = _all_gather(out.flatten(), flat, group=group, async_op=async_op)
    return out, work


def _gather_dim1(x: Tensor, group: dist.ProcessGroup) -> Tensor:  # (B, S / t, ...) -> (B, S, ...)
    return all_stack(x, group).transpose(0, 1).flatten(1, 2)


def _scatter_dim1(x: Tensor, group: dist.ProcessGroup) -> Tensor:  # (B, S, ...) -> (B, S / t, ...), summed
    parts = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(parts[0])
    _reduce_scatter(out, parts.flatten(0, 1), group=group)
    return out


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather_dim1(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return _scatter_dim1(dy, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter_dim1(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return _gather_dim1(dy, ctx.group), None


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return all_sum(dy, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_sum(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """(B, S / t, ...) pieces of the sequence -> (B, S, ...) on every rank."""
    return x if group is None else _GatherSequence.apply(x, group)


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """(B, S, ...) summands, one a rank -> (B, S / t, ...), this rank's piece of their sum."""
    return x if group is None else _ScatterSequence.apply(x, group)


def copy_to(x: Tensor, group: Group) -> Tensor:
    """The same x on every rank, about to be used in different ways."""
    return x if group is None else _CopyTo.apply(x, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Summands, one a rank -> their sum on every rank."""
    return x if group is None else _ReduceFrom.apply(x, group)


class Flight:
    """An exchange of rows under way, in either direction: what its two ends share."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        self.send, self.receive, self.group = send, receive, group
        self.work: dist.Work | None = None
        self.gradient: Tensor | None = None

    def launch(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = x.new_empty(sum(receive), *x.shape[1:])
        self.work = dist.all_to_all_single(out, x.contiguous(), receive, send, group=self.group, async_op=True)
        return out

    def land(self) -> None:
        self.work.wait()
        self.work = None


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.launch(x, flight.send, flight.receive)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:  # the gradient proper is on its way since _Arrive.backward
        flight = ctx.flight
        flight.land()
        gradient, flight.gradient = flight.gradient, None
        return gradient, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.land()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.gradient = flight.launch(dy, flight.receive, flight.send)
        return dy, None


def depart(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> tuple[Tensor, Flight]:
    """Start an exchange: send[r] consecutive rows of x go to rank r, receive[r] rows come from it, in rank order.

    The result may be read only after `arrive`.  What is computed between the two, and in the backward pass between
    the gradients of the two, runs while the rows travel.
    """
    flight = Flight(send, receive, group)
    return _Depart.apply(x, flight), flight


def arrive(x: Tensor, flight: Flight) -> Tensor:
    """The rows of an exchange that `depart` started."""
    return _Arrive.apply(x, flight)

"""All collectives that meet autograd, each beside its conjugate.

A collective and the gradient of it are a pair because every rank's loss is a part of one global loss:

    gather_sequence   all-gather of pieces of the sequence    <->  reduce-scatter: each rank used the whole
    scatter_sequence  reduce-scatter of summands              <->  all-gather: each summand feeds every piece
    copy_to           identity (all ranks read it)            <->  all-reduce: the readers' gradients add up
    reduce_from       all-reduce of summands                  <->  identity: each summand counts once
    depart_rows       all-to-all of rows                      <->  all-to-all with the sizes swapped

Every function returns a new tensor (or its argument) and makes no call where the group is None.
"""

from __future__ import annotations

import abc

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


def all_gather(
    flat: Tensor, group: Group, async_op: bool = False, out: Tensor | None = None
) -> tuple[Tensor, dist.Work | None]:
    """(n,) of every rank -> (ranks, n).  No gradient.  out: where to, contiguous; `flat` may be a row of it."""
    if group is None:
        return flat.unsqueeze(0), None
    out = flat.new_empty(group.size(), flat.numel()) if out is None else out
    work = _all_gather(out.view(-1), flat, group=group, async_op=async_op)
    return out, work


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


def copy_to(x: Tensor, group: Group) -> Tensor:
    """The same x on every rank, about to be used in different ways."""
    return x if group is None else _CopyTo.apply(x, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Summands, one a rank -> their sum on every rank."""
    return x if group is None else _ReduceFrom.apply(x, group)


# What follows takes two calls: depart_... starts a message, arrive waits for it.  What is computed between the two runs
# while the message travels; and in the backward pass, where arrive's gradient starts the conjugate message and
# depart's waits for it, so does what lies between those.


class Flight(abc.ABC):
    """A message under way, forward or back: what its two ends share.

    silent: nothing is sent, and the buffer means nothing, because nobody will read it.
    """

    def __init__(self, group: dist.ProcessGroup, unread: bool = False) -> None:
        self.group, self.unread, self.silent = group, unread, False
        self.work: dist.Work | None = None
        self.gradient: Tensor | None = None

    @abc.abstractmethod
    def launch(self, x: Tensor, back: bool) -> Tensor:
        """Start the message.  Returns the buffer that it will fill."""

    def land(self, buffer: Tensor, back: bool) -> Tensor:
        """Wait for it.  Returns what it means."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return buffer.view_as(buffer)


class _Gather(Flight):
    """(B, S / t, ...) -> (B, S, ...), and back the sum of what all ranks have for this rank's piece."""

    def launch(self, x: Tensor, back: bool) -> Tensor:
        t = self.group.size()
        if back:
            parts = x.unflatten(1, (t, -1)).transpose(0, 1).contiguous()
            out = torch.empty_like(parts[0])
            if not self.silent:
                self.work = _reduce_scatter(out, parts.flatten(0, 1), group=self.group, async_op=True)
        else:
            out = x.new_empty(t, *x.shape)
            self.work = _all_gather(out.flatten(0, 1), x.contiguous(), group=self.group, async_op=True)
        return out

    def land(self, buffer: Tensor, back: bool) -> Tensor:
        out = super().land(buffer, back)
        return out if back else out.transpose(0, 1).flatten(1, 2)


class _Scatter(_Gather):
    """The conjugate: (B, S, ...) summands -> (B, S / t, ...), and back the pieces of all ranks."""

    def launch(self, x: Tensor, back: bool) -> Tensor:
        return super().launch(x, not back)

    def land(self, buffer: Tensor, back: bool) -> Tensor:
        return super().land(buffer, not back)


class _Exchange(Flight):
    """send[r] consecutive rows go to rank r, receive[r] come from it; its own conjugate with the sizes swapped."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup, unread: bool) -> None:
        super().__init__(group, unread)
        self.send, self.receive = send, receive

    def launch(self, x: Tensor, back: bool) -> Tensor:
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        out = x.new_empty(sum(receive), *x.shape[1:])
        if not self.silent:
            self.work = dist.all_to_all_single(out, x.contiguous(), receive, send, group=self.group, async_op=True)
        return out


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.silent = flight.unread  # the gradient will travel all the same
        buffer = flight.launch(x, back=False)
        flight.silent = False
        return buffer

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:  # the gradient proper is on its way since _Arrive.backward
        flight = ctx.flight
        gradient, flight.gradient = flight.land(flight.gradient, back=True), None
        return gradient, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer: Tensor, flight: Flight) -> Tensor:
        ctx.flight, ctx.shape = flight, buffer.shape
        return flight.land(buffer, back=False)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        ctx.flight.gradient = ctx.flight.launch(dy, back=True)
        return dy.new_zeros(()).expand(ctx.shape), None  # a token: autograd wants something of this shape


Travelling = tuple[Tensor, Flight | None]


def _depart(x: Tensor, flight: Flight) -> Travelling:
    return _Depart.apply(x, flight), flight


def depart_gather(x: Tensor, group: Group) -> Travelling:
    """Start to bring (B, S / t, ...) pieces of the sequence together: (B, S, ...) on every rank."""
    return (x, None) if group is None else _depart(x, _Gather(group))


def depart_scatter(x: Tensor, group: Group, unread: bool = False) -> Travelling:
    """Start to add up (B, S, ...) summands, one a rank, and to give each rank its piece, (B, S / t, ...).

    unread, here and below: nobody will look at the result, only its gradient will come back; so nothing is sent.
    """
    return (x, None) if group is None else _depart(x, _Scatter(group, unread))


def depart_rows(x: Tensor, send: list[int], receive: list[int], group: Group, unread: bool = False) -> Travelling:
    """Start an exchange: send[r] consecutive rows of x go to rank r, receive[r] rows come from it, in rank order."""
    return (x, None) if group is None else _depart(x, _Exchange(send, receive, group, unread))


def arrive(travelling: Travelling) -> Tensor:
    """Wait for what a depart_... function started."""
    x, flight = travelling
    return x if flight is None else _Arrive.apply(x, flight)


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """(B, S / t, ...) pieces of the sequence -> (B, S, ...) on every rank."""
    return arrive(depart_gather(x, group))


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """(B, S, ...) summands, one a rank -> (B, S / t, ...), this rank's piece of their sum."""
    return arrive(depart_scatter(x, group))

"""Data parallelism with a sharded optimizer: each rank keeps gradients, masters and moments for some rows of a tensor.

Gradients are added up in flat buckets while the backward pass runs.  A bucket whose tensors are complete is
reduce-scattered at once, in a fixed order, and the backward pass goes on; each rank then owns the summed rows
[r * n, (r + 1) * n) of every tensor in it.  After the optimizer step the rows are gathered back the same way, bucket by
bucket, while the next forward pass begins: a block waits for its own tensors only.

    bucket (ranks, width):   row r is what rank r will own:  | rows of tensor a | rows of tensor b | ... |

A product may put a gradient where it is summed (`Bucket.open`) instead of handing it to autograd.

The loss of a step is already divided by the global number of tokens, so a sum is all that is left to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nano3.parallel.collectives import all_gather, reduce_scatter
from nano3.parallel.mesh import Axis


@dataclass(frozen=True)
class Member:
    """One tensor of a bucket: where its rows lie."""

    name: str
    parameter: Tensor
    rows: int  # per rank; the last ranks may own fewer, or none
    start: int  # of its columns in the bucket
    width: int  # rows * elements per row

    def owned(self, rank: int) -> slice:
        """The rows of the tensor that a rank owns."""
        n = self.parameter.shape[0]
        return slice(min(n, rank * self.rows), min(n, (rank + 1) * self.rows))

    def shard(self, row: Tensor, rank: int) -> Tensor:
        """The view of a bucket's row that holds what `rank` owns of this tensor, shaped like its rows."""
        mine = self.owned(rank)
        shape = (mine.stop - mine.start, *self.parameter.shape[1:])
        return row.narrow(0, self.start, math.prod(shape)).view(shape)

    def pairs(self, tensor: Tensor, bucket: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the tensor and of the bucket (ranks, width) that hold the same elements: one pair if the rows divide
        evenly, two otherwise."""
        flat = tensor.view(-1)
        full = flat.numel() // self.width if self.width else 0
        columns = bucket.narrow(1, self.start, self.width)
        if full:
            yield flat[: full * self.width].view(full, self.width), columns[:full]
        if rest := flat.numel() - full * self.width:
            yield flat[full * self.width :], columns[full, :rest]

    def padding(self, bucket: Tensor) -> Iterator[Tensor]:
        """Views of what lies in the tensor's columns of a bucket beside the tensor; none if the rows divide evenly."""
        columns = bucket.narrow(1, self.start, self.width)
        full, rest = divmod(self.parameter.numel(), self.width) if self.width else (len(bucket), 0)
        if rest:
            yield columns[full, rest:]
            full += 1
        if full < len(bucket):
            yield columns[full:]


class Bucket:
    """Tensors of one dtype that are reduced and gathered in one message over one axis.

    dtype: of the sums; wire: of the messages.

    The sums of a step are not zero at first: the first gradient of each tensor overwrites them, and what none came for
    is made zero at the end.  A tensor's rows lie one after the other, as in the tensor itself, if it is the bucket's
    only one or if there is one rank: then whoever computes its gradient may do so in place.
    """

    def __init__(self, axis: Axis, dtype: torch.dtype, wire: torch.dtype) -> None:
        self.axis, self.dtype, self.wire = axis, dtype, wire
        self.members: list[Member] = []
        self.width = 0
        self.total: Tensor | None = None  # (ranks, width), the gradients of this step so far
        self.held: set[str] = set()  # tensors whose part of it means something
        self.aside: dict[str, Tensor] = {}  # gradients of `open` that will be added when they are complete
        self.row: Tensor | None = None  # (width,), the sum over the ranks of what this rank owns
        self.arrived: set[str] = set()  # tensors whose last gradient of the step has come
        self.work: dist.Work | None = None
        self.gathered: Tensor | None = None  # (ranks, width), parameters on their way back

    def add(self, name: str, parameter: Tensor) -> None:
        rows = -(-parameter.shape[0] // self.axis.size)
        width = rows * (parameter.numel() // parameter.shape[0])
        self.members.append(Member(name, parameter, rows, self.width, width))
        self.width += width

    def _empty(self) -> Tensor:
        """Sums that mean nothing yet; only padding is zero."""
        out = torch.empty(self.axis.size, self.width, dtype=self.dtype, device=self.members[0].parameter.device)
        for m in self.members:
            for padding in m.padding(out):
                padding.zero_()
        return out

    def _take(self, member: Member) -> tuple[Tensor, bool]:
        """The sums of the step, and whether the tensor's part of them holds anything; from now on it does."""
        if self.total is None:
            self.total = self._empty()
        holds = member.name in self.held
        self.held.add(member.name)
        return self.total, holds

    def open(self, member: Member) -> tuple[Tensor, bool]:
        """A contiguous buffer shaped like the tensor, and whether to add a gradient to it or to overwrite it.

        The caller does so at once, and calls `close` then or later.  It is the tensor's part of the sums where that is
        contiguous; otherwise a buffer of its own, which `close` adds to them.
        """
        p = member.parameter
        if len(self.members) == 1 or self.axis.size == 1:
            total, holds = self._take(member)
            return total.view(-1).narrow(0, member.start, p.numel()).view_as(p), holds
        holds = member.name in self.aside
        if not holds:
            self.aside[member.name] = torch.empty(p.shape, dtype=self.dtype, device=p.device)
        return self.aside[member.name], holds

    def close(self, member: Member) -> None:
        """Every gradient that `open` was called for is in its buffer."""
        if (gradient := self.aside.pop(member.name, None)) is not None:
            self.accumulate(member, gradient)

    @torch.no_grad()
    def accumulate(self, member: Member, gradient: Tensor) -> None:
        total, holds = self._take(member)
        for mine, sums in member.pairs(gradient.contiguous(), total):
            sums.add_(mine) if holds else sums.copy_(mine)

    def reduce(self) -> None:
        """Start the sum over the ranks; `finish_reduce` ends it."""
        total = self._empty() if self.total is None else self.total
        for m in self.members:
            if m.name not in self.held:
                total.narrow(1, m.start, m.width).zero_()
        self.row, self.work = reduce_scatter(total.to(self.wire), self.axis.group, async_op=True)
        self.total = None
        self.held.clear()
        self.aside.clear()

    def finish_reduce(self) -> dict[str, Tensor]:
        """This rank's rows of the summed gradients, by name."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        self.arrived.clear()
        row, self.row = self.row.to(self.dtype), None
        return {m.name: m.shard(row, self.axis.rank) for m in self.members}

    @property
    def in_place(self) -> bool:
        """Whether the bucket is laid out as the one tensor in it, so that rows can be gathered where they belong."""
        p = self.members[0].parameter
        return len(self.members) == 1 and p.is_contiguous() and p.numel() == self.axis.size * self.width

    @torch.no_grad()
    def gather(self) -> None:
        """Start to bring every rank's rows of the parameters to all; `finish_gather` ends it."""
        if self.axis.group is None:
            return
        p = self.members[0].parameter
        if self.in_place:
            self.gathered = p.view(self.axis.size, self.width)
            row = self.gathered[self.axis.rank]
        else:
            row = torch.zeros(self.width, dtype=p.dtype, device=p.device)
            for m in self.members:
                m.shard(row, self.axis.rank).copy_(m.parameter[m.owned(self.axis.rank)])
        self.gathered, self.work = all_gather(row, self.axis.group, async_op=True, out=self.gathered)

    @torch.no_grad()
    def finish_gather(self) -> None:
        if self.gathered is None:
            return
        self.work.wait()
        for m in self.members if not self.in_place else ():
            for mine, theirs in m.pairs(m.parameter, self.gathered):
                mine.copy_(theirs)
        self.gathered = self.work = None


def _alone(name: str, parameter: Tensor, size: int) -> bool:
    """Whether a tensor has a bucket of its own: routed experts' weights have, and other tensors of some size.

    So the gradients that are costly to move can be added up in place.  The others, of which there are many, share a few
    messages.
    """
    return name.endswith((".experts.up_proj", ".experts.down_proj")) or 4 * parameter.numel() >= size


def _backward_order(names: Iterable[str]) -> list[str]:
    """Names of parameters, in the order of the model, in the order in which their gradients are complete.

    A mixture's shared expert begins before the routed experts and ends after them, so its first product's gradient
    comes last: what the routed experts have to send, most of all, must not wait for it.
    """
    known, late, out = list(names), {}, []
    for name in reversed(known):
        block, shared, _ = name.rpartition(".shared_experts.up_proj.")
        if shared and f"{block}.experts.up_proj" in known:
            late[f"{block}.experts.up_proj"] = name
            continue
        out.append(name)
        if name in late:
            out.append(late.pop(name))
    return out


def make_buckets(
    parameters: dict[str, Tensor],
    axis_of: Callable[[str], Axis],
    wire: torch.dtype | None,
    size: int = 1 << 24,
    *,
    sum_bf16: bool = False,
) -> list[Bucket]:
    """Buckets in the order in which a backward pass completes them: the last layers first.

    A tensor of a quarter of `size` elements or more has a bucket of its own, whose rows are then the tensor's; and so
    have the weights of routed experts.  Smaller ones share, whatever lies between them, until their bucket has `size`
    elements; it comes where the last of them comes.  wire: dtype of the messages for gradients of parameters of that
    dtype.  Everything else travels in fp32, and is summed over micro-batches in fp32; or, sum_bf16, gradients of bf16
    parameters in bf16.
    """
    complete: dict[Bucket, int] = {}  # the place of the last tensor in the backward pass
    shared: dict[object, Bucket] = {}
    for place, name in enumerate(_backward_order(parameters)):
        p = parameters[name]
        axis, alone = axis_of(name), _alone(name, p, size)
        key = (axis.ranks, p.dtype)
        bucket = None if alone else shared.get(key)
        if bucket is None or bucket.width * axis.size + p.numel() > size:
            wide = torch.promote_types(p.dtype, torch.float32)
            sent = wire if wire is not None and p.dtype == wire else wide
            sums = p.dtype if sum_bf16 and p.dtype == torch.bfloat16 else wide
            bucket = Bucket(axis, sums, sums if axis.size == 1 else sent)  # no copy where nothing travels
            if not alone:
                shared[key] = bucket
        bucket.add(name, p)
        complete[bucket] = place
    return sorted(complete, key=complete.get)

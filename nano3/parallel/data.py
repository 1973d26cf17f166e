"""Data parallelism with a sharded optimizer: each rank keeps gradients, masters and moments for some rows of a tensor.

Gradients are added up in flat buckets while the backward pass runs.  A bucket whose tensors are complete is
reduce-scattered at once, in a fixed order, and the backward pass goes on; each rank then owns the summed rows
[r * n, (r + 1) * n) of every tensor in it.  After the optimizer step the rows are gathered back the same way, bucket by
bucket, while the next forward pass begins: a block waits for its own tensors only.

    bucket (ranks, width):   row r is what rank r will own:  | rows of tensor a | rows of tensor b | ... |

The loss of a step is already divided by the global number of tokens, so a sum is all that is left to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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


class Bucket:
    """Tensors of one dtype that are reduced and gathered in one message over one axis.

    dtype: of the sums; wire: of the messages.
    """

    def __init__(self, axis: Axis, dtype: torch.dtype, wire: torch.dtype) -> None:
        self.axis, self.dtype, self.wire = axis, dtype, wire
        self.members: list[Member] = []
        self.width = 0
        self.total: Tensor | None = None  # (ranks, width), the gradients of this step so far
        self.row: Tensor | None = None  # (width,), the sum over the ranks of what this rank owns
        self.arrived: set[str] = set()  # tensors whose last gradient of the step has come
        self.work: dist.Work | None = None
        self.gathered: Tensor | None = None  # (ranks, width), parameters on their way back

    def add(self, name: str, parameter: Tensor) -> None:
        rows = -(-parameter.shape[0] // self.axis.size)
        width = rows * (parameter.numel() // parameter.shape[0])
        self.members.append(Member(name, parameter, rows, self.width, width))
        self.width += width

    def _new(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.axis.size, self.width, dtype=dtype, device=self.members[0].parameter.device)

    def open(self, member: Member) -> tuple[Tensor, bool]:
        """The sums of the bucket's only tensor, shaped like it, and whether they hold anything yet."""
        holds, p = self.total is not None, member.parameter
        if not holds:
            make = torch.empty if p.numel() == self.axis.size * self.width else torch.zeros  # padding has to be zero
            self.total = make(self.axis.size, self.width, dtype=self.dtype, device=p.device)
        return self.total.view(-1)[: p.numel()].view_as(p), holds

    @torch.no_grad()
    def accumulate(self, member: Member, gradient: Tensor) -> None:
        if self.total is None:
            self.total = self._new(self.dtype)
        for mine, sums in member.pairs(gradient.contiguous(), self.total):
            sums.add_(mine)

    def reduce(self) -> None:
        """Start the sum over the ranks; `finish_reduce` ends it."""
        total = self._new(self.dtype) if self.total is None else self.total
        self.row, self.work = reduce_scatter(total.to(self.wire), self.axis.group, async_op=True)
        self.total = None

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
        if self.in_place:
            self.gathered = self.members[0].parameter.view(self.axis.size, self.width)
            row = self.gathered[self.axis.rank]
        else:
            row = self._new(self.members[0].parameter.dtype)[self.axis.rank]
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


def is_direct(name: str) -> bool:
    """Whether a weight's gradient is added to its bucket by the product that computes it: those of routed experts."""
    return name.endswith((".experts.up_proj", ".experts.down_proj"))


def make_buckets(
    parameters: dict[str, Tensor],
    axis_of: Callable[[str], Axis],
    wire: torch.dtype | None,
    size: int = 1 << 24,
    *,
    sum_bf16: bool = False,
) -> list[Bucket]:
    """Buckets of about `size` elements in the order in which a backward pass completes them: the last layers first.

    A tensor of that size has a bucket of its own, whose rows are then the tensor's; so has one that is added to it
    directly.  wire: dtype of the messages for gradients of parameters of that dtype.  Everything else travels in fp32,
    and is summed over micro-batches in fp32; or, sum_bf16, gradients of bf16 parameters in bf16.
    """
    out: list[Bucket] = []
    open_buckets: dict[object, Bucket] = {}
    for name, p in reversed(parameters.items()):
        axis = axis_of(name)
        key = (axis.ranks, p.dtype)
        bucket = None if is_direct(name) else open_buckets.get(key)
        if bucket is None or bucket.width * axis.size + p.numel() > size:
            wide = torch.promote_types(p.dtype, torch.float32)
            sent = wire if wire is not None and p.dtype == wire else wide
            sums = p.dtype if sum_bf16 and p.dtype == torch.bfloat16 else wide
            bucket = Bucket(axis, sums, sums if sum_bf16 and axis.size == 1 else sent)  # no copy where none travels
            out.append(bucket)
            if not is_direct(name):
                open_buckets[key] = bucket
        bucket.add(name, p)
    return out

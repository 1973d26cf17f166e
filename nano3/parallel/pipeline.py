"""Running a pipeline schedule: what `pipeline_schedule` lists, with the messages between the stages.

Messages of one direction between two ranks have a channel of their own, which is first in first out (`Mesh.channels`).
Sends never wait, and a receive is posted one operation ahead, so a message travels while the operation before computes.

On a GPU a receive is a kernel that runs until its message comes, and a kernel used for the first time has to be loaded,
for which the driver waits until the GPU is idle: two stages that both load while they receive wait for each other
without end.  So micro-batches of a kind that is new to the pipeline go through it carefully: nothing is posted ahead,
and the host waits for each message before it launches anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from nano3.parallel.mesh import Mesh
from nano3.parallel.pipeline_schedule import Link, Op, forward_only, transfers

# (chunk, micro-batch, input or None at the model's start) -> (output, loss or None): the loss is what this chunk adds
# to the step's loss by itself, and in the model's last chunk the loss itself.
Forward = Callable[[int, int, Tensor | None], tuple[Tensor, Tensor | None]]


class Wire:
    """This rank's messages along the pipeline, all of one shape and dtype.

    kinds: what else decides which kernels run (packed rows, say), of every micro-batch.
    """

    def __init__(
        self,
        mesh: Mesh,
        chunks: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kinds: Iterable[tuple[object, ...]] = ((),),
    ) -> None:
        self.mesh, self.chunks, self.shape, self.dtype = mesh, chunks, shape, dtype
        self.kinds = {(shape, dtype, torch.is_grad_enabled(), *kind) for kind in kinds}
        self.careful = not self.kinds <= mesh.familiar
        self.sent: list[tuple[dist.Work, Tensor]] = []  # tensors stay alive until they have left
        self.posted: dict[Op, tuple[dist.Work, Tensor]] = {}

    def links(self, op: Op) -> tuple[Link | None, Link | None]:
        return transfers(op, self.mesh.pp.rank, self.mesh.pp.size, self.chunks)

    def post(self, op: Op) -> None:
        """Start to receive what `op` needs, if anything."""
        link, _ = self.links(op)
        if link is not None and op not in self.posted:
            source = self.mesh.pp.ranks[link.peer]
            channel = self.mesh.channels[source, self.mesh.rank, link.direction]
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.mesh.device)
            self.posted[op] = dist.irecv(buffer, source, group=channel), buffer

    def receive(self, op: Op) -> Tensor | None:
        self.post(op)
        if op not in self.posted:
            return None
        work, buffer = self.posted.pop(op)
        work.wait()
        if self.careful and buffer.is_cuda:
            torch.cuda.current_stream().synchronize()
        return buffer

    def send(self, op: Op, x: Tensor) -> None:
        """Send what `op` gave, if anybody waits for it."""
        _, link = self.links(op)
        if link is not None:
            target = self.mesh.pp.ranks[link.peer]
            channel = self.mesh.channels[self.mesh.rank, target, link.direction]
            x = x.detach().contiguous()
            self.sent = [(w, t) for w, t in self.sent if not w.is_completed()]
            self.sent.append((dist.isend(x, target, group=channel), x))

    def finish(self) -> None:
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()
        self.mesh.familiar.update(self.kinds)


def run(ops: list[Op], wire: Wire, forward: Forward, before_backward: Callable[[Op], None] | None = None) -> None:
    """Do a rank's list of operations: forward passes through `forward`, backward passes through autograd."""
    held: dict[tuple[int, int], tuple[Tensor | None, Tensor, Tensor | None]] = {}
    for op, following in zip(ops, [*ops[1:], None], strict=True):
        wire.post(op)
        # What comes in answer to this operation's result is posted after that is sent: a GPU may put both messages into
        # one queue.
        if following is not None and following.micro != op.micro and not wire.careful:
            wire.post(following)
        arrived = wire.receive(op)
        if op.kind == "F":
            x = arrived if arrived is None or not torch.is_grad_enabled() else arrived.requires_grad_()
            y, loss = forward(op.chunk, op.micro, x)
            wire.send(op, y)
            if torch.is_grad_enabled():
                held[op.chunk, op.micro] = x, y, loss
            continue
        if before_backward is not None:
            before_backward(op)
        x, y, loss = held.pop((op.chunk, op.micro))
        roots = [(loss, None), (y, arrived)]
        # Where everything up to here is frozen, nothing has a gradient: the one that arrived goes no further.
        roots = [(t, g) for t, g in roots if t is not None and t.requires_grad and (t is loss or g is not None)]
        if roots:
            torch.autograd.backward(*map(list, zip(*roots, strict=True)))
        if x is not None:
            wire.send(op, x.grad)
    wire.finish()


def relay(wire: Wire, forward: Callable[[int, Tensor | None], Tensor]) -> Tensor:
    """One forward pass through all stages, for decoding.  Returns what this rank's last chunk gave."""
    for op in forward_only(wire.mesh.pp.size, wire.chunks, 1):
        y = forward(op.chunk, wire.receive(op))
        wire.send(op, y)
    wire.finish()
    return y


def broadcast_int(value: int, source: int, mesh: Mesh) -> int:
    """The value that the rank `source` has, on every rank."""
    if mesh.all.group is None:
        return value
    box = torch.tensor([value], device=mesh.device)
    dist.broadcast(box, source, group=mesh.all.group)
    return int(box)

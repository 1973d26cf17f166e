"""One rank of any layout in one process: the ranks it talks to do just what it does, and every message is written down.

Gathering repeats its own part, a sum multiplies by the number of ranks, an exchange returns what was sent, and a stage
receives random numbers.  The results mean nothing; calls, shapes and sizes are those of a real run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nano3.config import Config
from nano3.parallel import collectives
from nano3.parallel.layout import Layout
from nano3.parallel.mesh import Mesh
from nano3.train.memory import place


class Group:
    """What the code sees of a process group."""

    def __init__(self, axis: str, ranks: int, rank: int = 0) -> None:
        self.axis, self.ranks, self.rank = axis, ranks, rank

    def size(self) -> int:
        return self.ranks


class Done:
    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return True


class Channels(dict):
    def __missing__(self, key: tuple[int, int, str]) -> Group:
        return Group("pp", 2)


def mirror_mesh(config: Config, layout: Layout, rank: int) -> Mesh:
    axes = {
        name: replace(axis, group=Group(name, axis.size, axis.rank) if axis.size > 1 else None)
        for name, axis in place(config, layout, rank).items()
    }
    return Mesh(rank, layout.world, torch.device("cpu"), layout, **axes, channels=Channels())


class Mirror:
    """In place of torch.distributed: (axis, call) -> messages, bytes sent by the ring algorithm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: dict[tuple[str, str], int] = defaultdict(int)
        self.bytes: dict[tuple[str, str], float] = defaultdict(float)
        self.rows: list[int] = []  # sent to other ranks, of each exchange whose sizes differ from rank to rank
        monkeypatch.setattr(collectives, "_all_gather", self.all_gather)
        monkeypatch.setattr(collectives, "_reduce_scatter", self.reduce_scatter)
        for name in ("all_reduce", "all_to_all_single", "isend", "irecv"):
            monkeypatch.setattr(dist, name, getattr(self, name))

    def note(self, group: Group, call: str, sent: float) -> None:
        self.messages[group.axis, call] += 1
        self.bytes[group.axis, call] += sent

    def all_gather(self, out: Tensor, x: Tensor, group: Group, async_op: bool = False) -> Done:
        assert out.numel() == group.ranks * x.numel()
        self.note(group, "all_gather", (group.ranks - 1) * x.nbytes)
        out.view(group.ranks, -1).copy_(x.reshape(1, -1).expand(group.ranks, -1))
        return Done()

    def reduce_scatter(self, out: Tensor, x: Tensor, group: Group, async_op: bool = False) -> Done:
        assert x.numel() == group.ranks * out.numel()
        self.note(group, "reduce_scatter", (group.ranks - 1) * out.nbytes)
        out.view(-1).copy_(x.reshape(group.ranks, -1)[group.rank] * group.ranks)
        return Done()

    def all_reduce(self, x: Tensor, group: Group) -> None:
        self.note(group, "all_reduce", 2 * (group.ranks - 1) / group.ranks * x.nbytes)
        x.mul_(group.ranks)

    def all_to_all_single(
        self,
        out: Tensor,
        x: Tensor,
        receive: list[int] | None = None,
        send: list[int] | None = None,
        group: Group | None = None,
        async_op: bool = False,
    ) -> Done:
        assert out.shape == x.shape
        assert receive == send
        parts = x.split(send if send is not None else x.shape[0] // group.ranks)
        self.note(group, "all_to_all", x.nbytes - parts[group.rank].nbytes)
        if send is not None:
            self.rows.append(x.shape[0] - send[group.rank])
        out.copy_(x)
        return Done()

    def isend(self, x: Tensor, target: int, group: Group) -> Done:
        self.note(group, "send", x.nbytes)
        return Done()

    def irecv(self, buffer: Tensor, source: int, group: Group) -> Done:
        buffer.normal_()
        return Done()

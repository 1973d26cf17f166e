"""The process grid as this rank sees it: its place on each axis, and the groups to talk through."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from nano3.config import Config, UserError
from nano3.parallel.layout import AXES, Layout, check_layout, kv_copies

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One axis of the grid.  The group is None where the size is 1, and no call is made on it."""

    size: int = 1
    rank: int = 0  # this rank's place on the axis
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)  # global ranks along the axis, in order


@dataclass(frozen=True)
class Mesh:
    """Axes as in `layout.py`; `kv` holds the tp ranks that share a KV head."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    layout: Layout = field(default_factory=Layout)
    tp: Axis = Axis()
    cp: Axis = Axis()
    dp: Axis = Axis()
    pp: Axis = Axis()
    ep: Axis = Axis()
    edp: Axis = Axis()
    data: Axis = Axis()
    block: Axis = Axis()
    kv: Axis = Axis()
    all: Axis = Axis()
    host: dist.ProcessGroup | None = None  # all ranks, on the CPU: for checkpoints written in the background
    channels: dict[tuple[int, int, str], dist.ProcessGroup] = field(default_factory=dict)
    # (from, to, "F" or "B"): two ranks, one direction, one kind of message
    familiar: set[tuple] = field(default_factory=set)  # kinds of micro-batches that went through the pipeline before

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1


ALONE = Mesh()


def first_says(mesh: Mesh, find: Callable[[], T]) -> T:
    """What the first rank finds, on every rank; if it raises a UserError or an OSError, all raise a UserError."""
    found: list[object] = [None]
    if mesh.is_main:
        try:
            found = [find()]
        except (UserError, OSError) as error:
            found = [error if isinstance(error, UserError) else UserError(str(error))]
    if mesh.host is not None:
        dist.broadcast_object_list(found, src=0, group=mesh.host)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


class LostContact(RuntimeError):
    """Another rank is gone; this one is not at fault."""


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that a message to or from another rank failed.  gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def pick_device(asked: str, local_rank: int = 0, setting: str = "train.device=") -> torch.device:
    """cuda:local_rank or cpu.  Raises UserError where a GPU is asked for and there is none."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"{setting}cuda: PyTorch sees no GPU here; use {setting}cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start at most as many ranks with --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def create_mesh(config: Config, world: int, rank: int, local_rank: int) -> Mesh:
    """Join the other ranks (torchrun's environment tells torch.distributed where they are) and take a place."""
    layout = check_layout(config, world)
    device = pick_device(config.train.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and device.type == "cuda" and config.parallel.communication_sms:
        os.environ.setdefault("NCCL_MAX_CTAS", str(config.parallel.communication_sms))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    return lay_out(config, layout, rank, device)


def lay_out(config: Config, layout: Layout, rank: int, device: torch.device) -> Mesh:
    """The mesh of an initialised process group of at least `layout.world` ranks; every one of its ranks calls this.

    A rank beyond the layout's world takes part in making the groups, as torch.distributed asks, and sits in none.
    """

    def axis(groups: list[list[int]]) -> Axis:
        mine = Axis()
        for ranks in groups:
            group = dist.new_group(ranks) if len(ranks) > 1 else None  # one each: messages of two axes never queue up
            if rank in ranks:
                mine = Axis(len(ranks), ranks.index(rank), group, tuple(ranks))
        return mine

    axes = {"all" if name == "world" else name: axis(layout.groups(name)) for name in AXES}
    copies = kv_copies(config, layout.tp)
    axes["kv"] = axis([g[i : i + copies] for g in layout.groups("tp") for i in range(0, layout.tp, copies)])
    channels = {}
    if layout.pp > 1:
        for ranks in layout.groups("pp"):
            following = zip(ranks, ranks[1:] + ranks[:1], strict=True)
            for a, b in list(following) if config.parallel.virtual_pp > 1 else list(following)[:-1]:
                for source, target, direction in ((a, b, "F"), (b, a, "B")):
                    group = dist.new_group([a, b])
                    if rank in (a, b):
                        channels[source, target, direction] = group
                        _open(group, source, target, rank, device)
    host = dist.new_group(list(range(layout.world)), backend="gloo") if layout.world > 1 else None
    return Mesh(rank, layout.world, device, layout, **axes, host=host, channels=channels)


def _open(channel: dist.ProcessGroup, source: int, target: int, rank: int, device: torch.device) -> None:
    """Send a first message.

    NCCL makes a connection at its first message, and each end waits there for the other.  The schedules of two ranks
    begin with different channels, so all are opened before, in one order for all ranks.
    """
    token = torch.zeros(1, device=device)
    if rank == source:
        dist.send(token, target, group=channel)
    else:
        dist.recv(token, source, group=channel)

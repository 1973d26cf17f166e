"""The process grid.  In this version every rank is data parallel: it has the whole model and a share of each batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from nano3.config import Config, UserError


@dataclass(frozen=True)
class Mesh:
    """This rank's place and groups.  A group is None where its size is 1, and no call is made on it."""

    rank: int
    world: int
    device: torch.device
    dp: dist.ProcessGroup | None

    @property
    def dp_size(self) -> int:
        return self.world

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def check_layout(config: Config, world: int) -> None:
    """Raise UserError if `world` ranks cannot run this configuration."""
    p, t = config.parallel, config.train
    for axis in ("tp", "ep", "pp", "cp"):
        if (size := getattr(p, axis)) > 1:
            raise UserError(
                f"parallel.{axis}={size} is not available in this version, which is data parallel only; "
                f"set parallel.{axis}=1 and start one rank per GPU with torchrun"
            )
    micro = t.micro_batch_size or 1
    if t.global_batch_size % (per := micro * world):
        near = max(per, round(t.global_batch_size / per) * per)
        raise UserError(
            f"train.global_batch_size={t.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{micro} x {world} data-parallel rank{'s' * (world > 1)}; "
            f"use train.global_batch_size={near}, or another train.micro_batch_size"
        )


def pick_device(asked: str, local_rank: int) -> torch.device:
    """cuda:local_rank or cpu.  Raises UserError where a GPU is asked for and there is none."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device=cuda: PyTorch sees no GPU here; use train.device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start at most as many ranks with --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def create_mesh(config: Config, world: int, rank: int, local_rank: int) -> Mesh:
    """Join the other ranks (torchrun's environment tells torch.distributed where they are)."""
    check_layout(config, world)
    device = pick_device(config.train.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    return Mesh(rank, world, device, dist.group.WORLD if world > 1 else None)

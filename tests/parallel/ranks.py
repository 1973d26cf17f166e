"""Ranks as processes of their own that start in a moment: a server imports torch once and forks every rank."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from nano3.parallel.layout import check_layout
from nano3.parallel.mesh import Mesh, lay_out
from nano3.train.loop import Trainer
from tests.train.small import small

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def start(world: int, store: Path, work: Callable[..., None], *args: object) -> list[BaseProcess]:
    """`work(rank, world, *args)` in `world` processes with a gloo group; `store` is a path that does not exist yet."""
    ranks = [CONTEXT.Process(target=_rank, args=(r, world, str(store), work, args), daemon=True) for r in range(world)]
    for p in ranks:
        p.start()
    return ranks


def finish(ranks: list[BaseProcess]) -> None:
    for p in ranks:
        p.join(timeout=100)
        assert p.exitcode == 0, f"a rank ended with {p.exitcode}; its traceback is in the captured output"


def _rank(rank: int, world: int, store: str, work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        work(rank, world, *args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # without finalisation, as train.py does


def trainer(rank: int, world: int, *overrides: str) -> Trainer:
    """A run's place on this rank."""
    config = small(*overrides)
    mesh: Mesh = lay_out(config, check_layout(config, world), rank, torch.device("cpu"))
    return Trainer(config, "tiny", mesh)

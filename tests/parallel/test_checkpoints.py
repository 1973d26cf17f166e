"""Checkpoints of several ranks: kills of all of them, and a resume in new processes that nothing can tell from none."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

import convert
from nano3.parallel.layout import check_layout
from nano3.parallel.mesh import lay_out
from nano3.train.folders import run_folders
from tests.parallel.kills import kill_often
from tests.parallel.ranks import finish, start, trainer
from tests.train.small import small


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.ep=2"])
def test_kills_of_all_ranks_while_they_save(tmp_path: Path, layout: str) -> None:
    """A few; `python -m tests.parallel.kills 50 FOLDER` does many."""
    states = kill_often(tmp_path, 3, (layout,))
    assert states.total() == 3


def train(rank: int, world: int, overrides: tuple[str, ...], stop_after: int) -> None:
    t = trainer(rank, world, *overrides)
    step = t._step

    def stopping() -> object:
        t.asked_to_stop = t.progress.iteration + 1 >= stop_after  # as SIGTERM does
        return step()

    t._step = stopping
    assert t.run() == 0


@pytest.mark.parametrize("layout", ["parallel.tp=2 train.precision=bf16", "parallel.ep=2"])
def test_resume_in_new_processes_is_bitwise(tmp_path: Path, layout: str) -> None:
    """20 steps against 10, a stop, and 10 more: losses, weights, masters, moments and selection biases.

    With tp=2 each rank has all rows of its share of a tensor, with ep=2 there are two data-parallel ranks, which
    share the optimizer's rows.
    """
    options = ("train.train_iters=20", "train.micro_batch_size=1", "validation.eval_iters=0", *layout.split())

    def run(name: str, stop_after: int, *more: str) -> list[float]:
        folder = tmp_path / name
        finish(start(2, tmp_path / f"{name}.store", train, (f"logger.run_dir={folder}", *options, *more), stop_after))
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if row["kind"] == "train"]

    straight, first = run("straight", 20), run("first", 10)
    second = run("second", 20, f"checkpoint.load={tmp_path / 'first'}")
    assert (len(straight), len(first)) == (20, 10)
    assert straight == first + second
    assert convert.main(["verify", str(tmp_path / "straight"), str(tmp_path / "second")]) == 0


def choose(rank: int, world: int, folder: str, late: int) -> None:
    """A run's folder, chosen when the other rank has had time to make it."""
    os.chdir(folder)
    config = small()
    mesh = lay_out(config, check_layout(config, world), rank, torch.device("cpu"))
    if rank == late:
        time.sleep(0.3)
    chosen, save = run_folders(config, "tiny", mesh)
    assert save == chosen / "checkpoints"
    assert save.is_dir()
    Path(f"{rank}.txt").write_text(str(chosen))


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_agree_on_the_runs_folder(tmp_path: Path, late: int) -> None:
    for expected in ("runs/tiny", "runs/tiny-2"):
        finish(start(2, tmp_path / f"{expected.replace('/', '-')}.store", choose, str(tmp_path), late))
        assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [expected] * 2

"""`python -m tests.parallel.kills COUNT FOLDER [LAYOUT…]`: kill -9 all ranks of a run while it saves, COUNT times.

Each run goes on from what the one before left, trains, and saves every step in the background, keeping three.  After
each kill the newest checkpoint must be found and loaded, it must be no older than the last one that was reported as
written, and whatever has a checkpoint's name must be whole.  Prints in which states the kills left the folder.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from nano3.parallel.mesh import ALONE
from nano3.train import checkpoint, locate, storage
from nano3.train.checkpoint import Saver
from nano3.train.loop import Trainer
from nano3.train.storage import NEXT
from tests.parallel.ranks import start, trainer
from tests.train.small import small


def save_for_ever(rank: int, world: int, folder: str, log: str, overrides: tuple[str, ...]) -> None:
    """A line in the log for every checkpoint that is written, an empty one at the start."""
    options = [f"checkpoint.load={folder}", f"checkpoint.save={folder}", "checkpoint.most_recent_k=3"]
    t = trainer(rank, world, *options, "train.train_iters=100000", *overrides)
    saver = Saver(Path(folder), t.config, t.mesh)
    with open(log, "a", buffering=1) as out:
        while True:
            t._step()  # while the save before is written
            saver.wait()
            if rank == 0:
                out.write(f"{saver.last.name if saver.last else ''}\n")
            saver.save(t.model, t.optimizer, t.progress)


def kill_often(folder: Path, count: int, overrides: tuple[str, ...], seed: int = 0) -> Counter[str]:
    """Returns how often each state was left behind.  Raises AssertionError or UserError at the first that is wrong."""
    draws, states = random.Random(seed), Counter()
    checkpoints, log = folder / "checkpoints", folder / "log"
    alone = Trainer(small(), "tiny", ALONE)
    reached = 0
    for kill in range(count):
        log.write_text("")
        ranks = start(2, folder / f"store{kill}", save_for_ever, str(checkpoints), str(log), overrides)
        began = time.monotonic()
        while not log.read_text() and time.monotonic() - began < 60:  # until the first save begins
            assert all(p.is_alive() for p in ranks), "a rank ended by itself"
            time.sleep(0.002)
        time.sleep(draws.random() * 0.2)
        while not list(checkpoints.glob(".incomplete_*")):  # until the next save begins
            assert time.monotonic() - began < 60, "nothing is saved"
            time.sleep(0.001)
        time.sleep(draws.random() * 0.04)  # it takes some 30 ms
        for p in draws.sample(ranks, 2):
            os.kill(p.pid, signal.SIGKILL)
        for p in ranks:
            p.join()
        written = [int(line[5:]) for line in log.read_text().split("\n")[:-1] if line]
        reached = max([reached, *written])
        states[state_of(checkpoints)] += 1
        names = storage.iterations(checkpoints) if checkpoints.exists() else []
        for one in names:
            storage.verify(one, storage.read_manifest(one, "test"), "test")
        if reached or names:
            newest = names[-1]
            assert locate.find(checkpoints, "test") == newest
            assert int(newest.name[5:]) >= reached
            assert checkpoint.load(str(checkpoints), "test", alone.model, alone.optimizer).iteration == int(
                newest.name[5:]
            )
            reached = int(newest.name[5:])
            assert alone.optimizer.steps == reached
    return states


def state_of(checkpoints: Path) -> str:
    """What lies beside whole checkpoints after a kill."""
    if not checkpoints.exists():
        return "nothing yet"
    found = []
    for temporary in checkpoints.glob(".incomplete_*"):
        files = {p.name for p in temporary.iterdir()}
        found.append("manifest written" if storage.MANIFEST in files else f"{len(files)} files begun")
    if (checkpoints / NEXT).exists():
        found.append("pointer not yet moved")
    if list(checkpoints.glob(".deleted_*")):
        found.append("an old one half deleted")
    return ", ".join(found) or "between two saves"


if __name__ == "__main__":
    torch.set_num_threads(1)
    begin = time.monotonic()
    layout = tuple(sys.argv[3:]) or ("parallel.tp=2",)
    outcome = kill_often(Path(sys.argv[2]), int(sys.argv[1]), layout, seed=int(time.time()))
    print(f"{sys.argv[1]} kills of 2 ranks, {' '.join(layout)}: every time the newest whole checkpoint was loaded")
    for what, times in outcome.most_common():
        print(f"  {times:3}  {what}")
    print(f"{time.monotonic() - begin:.0f} s")

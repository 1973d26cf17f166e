"""A rank that dies ends the job, quickly and by name, and leaves the last checkpoint whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nano3.train import checkpoint, locate, storage
from tests.conftest import ROOT
from tests.train.small import SHRINK


def rank_process(parent: int, rank: int) -> int:
    """The process of one rank below a torchrun."""
    for entry in Path("/proc").iterdir():
        try:
            stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if int(stat[1]) == parent and b"RANK=%d" % rank in environment:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes in /proc")
@pytest.mark.parametrize("layout", [["parallel.tp=2", "parallel.ep=4"], ["parallel.pp=2"]], ids=["tp2-ep4", "dp2-pp2"])
def test_killing_a_rank_ends_the_job(tmp_path: Path, layout: list[str]) -> None:
    log = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "train.py"]
    settings = [o for o in SHRINK if not o.startswith(("train.", "validation.", "checkpoint."))]
    length = ["train.train_iters=100000", "train.global_batch_size=4", "validation.eval_iters=0"]
    length += ["checkpoint.save_interval=5", f"logger.run_dir={tmp_path}"]
    job = subprocess.Popen(
        [*command, "--mode", "pretrain", "--preset", "tiny", *settings, *length, *layout],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        started = time.monotonic()
        while not log.exists() or log.read_text().count('"train"') < 8:
            assert job.poll() is None, job.communicate()[1]
            assert time.monotonic() - started < 120, "no step within two minutes"
            time.sleep(0.1)
        killed = time.monotonic()
        os.kill(rank_process(job.pid, 2), signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
        assert time.monotonic() - killed < 60
    finally:
        job.kill()
    assert job.returncode != 0
    assert "lost contact with another rank in step" in errors
    root = errors[errors.index("Root Cause") :]
    assert "rank      : 2" in root
    assert "SIGKILL" in root
    folder = locate.find(tmp_path, "test")
    assert storage.read_manifest(folder, "test").progress.iteration % 5 == 0
    checkpoint.load_model(str(folder), "test", torch.device("cpu"))

"""Data parallel under torchrun: the same run as one process."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.oracles import relative
from tests.train.small import SHRINK


def run(run_script, folder: Path, ranks: int, *overrides: str):
    args = ["train.py", "--mode", "pretrain", "--preset", "tiny", *SHRINK, f"logger.run_dir={folder}", *overrides]
    return run_script(*args, ranks=ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_a_batch_and_agree_with_one_process(tmp_path: Path, run_script, ranks: int) -> None:
    losses, weights = [], []
    for n in (1, ranks):
        done = run(run_script, tmp_path / str(n), n, "train.micro_batch_size=1")
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / str(n) / "metrics.jsonl").read_text().splitlines()]
        losses.append([(r["kind"], r["loss"]) for r in rows])
        weights.append(load_file(tmp_path / str(n) / "checkpoints" / "iter_0000006" / "model.safetensors"))
    assert [k for k, _ in losses[0]] == [k for k, _ in losses[1]]
    for (_, a), (_, b) in zip(*losses, strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # fp32 sums in another order, over six steps
    for name, tensor in weights[0].items():
        # Adam divides by the gradient's size, so an element whose gradient is rounding may move either way
        assert relative(weights[1][name], tensor) <= 1e-2, name


def test_a_batch_that_does_not_divide_is_refused_once(tmp_path: Path, run_script) -> None:
    done = run(run_script, tmp_path, 2, "train.global_batch_size=2", "train.micro_batch_size=2")
    assert done.returncode != 0
    assert done.stderr.count("train.py: error:") == 1
    assert "2 data-parallel ranks; use train.global_batch_size=4" in done.stderr

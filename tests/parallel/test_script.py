"""The script under torchrun: the same run as one process, in fp32; `test_layouts.py` is the exact comparison."""

import json
from pathlib import Path

import pytest
import torch

from nano3.train import checkpoint
from tests.oracles import relative
from tests.train.small import SHRINK


def run(run_script, folder: Path, ranks: int, *overrides: str):
    args = ["train.py", "--mode", "pretrain", "--preset", "tiny", *SHRINK, f"logger.run_dir={folder}", *overrides]
    return run_script(*args, ranks=ranks)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(4, ""), (4, "parallel.tp=2 parallel.ep=4"), (2, "parallel.pp=2"), (2, "parallel.tp=2 train.precision=bf16")],
    ids=["dp4", "tp2-ep4", "pp2", "tp2-bf16"],
)
def test_a_layout_trains_as_one_process_does(tmp_path: Path, run_script, ranks: int, layout: str) -> None:
    losses, weights, texts = [], [], []
    for n in (1, ranks):
        options = [o for o in layout.split() if n > 1 or not o.startswith("parallel")]
        done = run(run_script, tmp_path / str(n), n, "train.micro_batch_size=1", *options)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / str(n) / "metrics.jsonl").read_text().splitlines()]
        losses.append([(r["kind"], r["loss"]) for r in rows])
        texts.append([r["sample"] for r in rows if r["kind"] == "valid"])
        model, _ = checkpoint.load_model(str(tmp_path / str(n)), "test", torch.device("cpu"))
        weights.append({name: p.detach() for name, p in model.named_parameters()})
    assert all(texts[1][1:])
    if "bf16" not in layout:  # where one rounding changes one token, and so all that follow
        assert texts[0] == texts[1]
    assert [k for k, _ in losses[0]] == [k for k, _ in losses[1]]
    for (_, a), (_, b) in zip(*losses, strict=True):
        # fp32 sums in another order, over six steps; in bf16 each of the partial sums is rounded to 8 bits as well
        assert a == pytest.approx(b, rel=2e-2 if "bf16" in layout else 1e-5)
    for name, tensor in weights[0].items():
        # Adam divides by the gradient's size, so an element whose gradient is rounding may move either way
        assert relative(weights[1][name], tensor) <= (0.1 if "bf16" in layout else 1e-2), name


def test_a_batch_that_does_not_divide_is_refused_once(tmp_path: Path, run_script) -> None:
    done = run(run_script, tmp_path, 2, "train.global_batch_size=2", "train.micro_batch_size=2")
    assert done.returncode != 0
    assert done.stderr.count("train.py: error:") == 1
    assert "2 data-parallel ranks; use train.global_batch_size=4" in done.stderr

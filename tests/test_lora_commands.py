"""NVIDIA's fine-tuning commands, on `tiny` and a CPU: SQuAD from a file, adapters, the merge, transformers."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import NemotronHForCausalLM

import convert
import merge_lora
from nano3 import adapters
from nano3.cli import parser, resolve
from nano3.parallel.mesh import ALONE
from nano3.train.loop import Trainer
from nano3.train.storage import read_manifest
from tests.oracles import relative

SHORT = ["train.global_batch_size=4", "--seq-length", "80", "validation.eval_iters=0"]


def train(*args: str) -> None:
    """What train.py does with these arguments, in this process."""
    config, name = resolve(parser().parse_args(list(args)))
    assert Trainer(config, name, ALONE).run() == 0


def squad(path: Path) -> str:
    """A file in SQuAD's form, version 1.1; the answer is a word of a short paragraph."""
    r, paragraphs = random.Random(0), []
    for i in range(300):
        who, what = r.choice(["fox", "owl", "bear"]), r.choice(["red", "blue", "green", "white"])
        context = f"The {who} has a {what} hat."
        answer = {"text": what, "answer_start": context.index(what)}
        question = {"id": str(i), "question": "Which colour?", "answers": [answer]}
        paragraphs.append({"context": context, "qas": [question]})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "hats", "paragraphs": paragraphs}]}))
    return str(path)


def test_the_commands_from_a_base_to_a_merged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, run, out = tmp_path / "base", tmp_path / "lora", tmp_path / "out"
    train("--mode", "pretrain", "--preset", "tiny", "train.train_iters=10", *SHORT, f"logger.run_dir={base}")
    assert convert.main(["export", "--megatron-path", str(base), "--hf-path", str(tmp_path / "hf")]) == 0
    steps = ["train.train_iters=100", "scheduler.lr_warmup_iters=10"]
    where = [f"checkpoint.pretrained_checkpoint={base}", f"dataset.path={squad(tmp_path / 'squad.json')}"]
    train("--mode", "finetune", "--preset", "tiny", "--peft", "lora", *steps, *where, *SHORT, f"logger.run_dir={run}")
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in losses if "lr" in row]
    assert len(losses) == 100
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    checkpoint = run / "checkpoints" / "iter_0000100"
    assert all(".lora." in key for key in read_manifest(checkpoint, "test").tensors)
    assert f"--lora-checkpoint {checkpoint}" in capsys.readouterr().out  # the run says how to go on
    merge = ["--hf-model-path", tmp_path / "hf", "--lora-checkpoint", checkpoint, "--output", out]
    assert merge_lora.main([str(a) for a in merge]) == 0

    theirs = NemotronHForCausalLM.from_pretrained(out).eval()
    theirs.config._experts_implementation = "eager"
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    ours, _ = adapters.load_model(str(run), "test", torch.device("cpu"))
    ids = torch.randint(0, 256, (2, 50))
    with torch.no_grad():
        assert relative(ours.logits(ours(ids).hidden), theirs(ids, use_cache=False).logits) < 2e-5

"""NVIDIA's published recipe on the GPUs of one host, as a user types it: pretraining, fine-tuning in full and by LoRA.

    python -m benchmarks.recipe --folder /big/disk                          the whole 30B on 8 GPUs of 141 GB
    python -m benchmarks.recipe --folder /big/disk --ranks 2 --pattern MEM*E --tp 2       less depth on fewer GPUs
    python -m benchmarks.recipe --plan --ranks 8                            memory and messages of every run; no GPU

Every run is a command of train.py, convert.py or merge_lora.py, printed before it starts:
  pretrain   tp=1 ep=N, then tp=T ep=N, on mock data, sequence 8192, fp32 masters and moments; saves nothing
  finetune   random weights in the released layout -> import -> full fine-tuning at ep=N, packed rows of 4096, AdamW in
             fewer bytes (a checkpoint with fp32 masters is 380 GB) -> save -> resume at tp=2 ep=N/2 -> export -> verify
  lora       adapters on the same import at ep=N -> merge
The table lists medians over all steps but the first five.  --step JSON (of `benchmarks.step`, one GPU of the same kind)
adds what to expect: its time for the blocks, and the bytes of --dry-run at --link GB/s where nothing hides them.
The disk needs 4 bytes a parameter and 2 more for the export: 190 GB for the whole model.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.convert import make
from nano3.cli import parser, resolve
from nano3.config import ModelConfig

ROOT = Path(__file__).parent.parent
SKIP = 5  # steps that compile, fill caches and find memory
PUBLISHED = "NVIDIA: 14,890 tokens/s per GPU (16 H100, FP8, sequence 8192); Automodel: 16,789 (8 H100, bf16, 4096)"
WORDS = ("red", "blue", "owl", "fox", "bear", "hat", "tree", "house", "river", "stone")
SMALL = ["train.precision=bf16", "optimizer.moments=8bit", "optimizer.masters=none", "optimizer.gradients=bf16"]


class Recipe:
    """The commands, what they share, and what came out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.home, self.records = args, args.folder / "recipe", []
        self.shared = ["--preset", args.preset, f"train.train_iters={args.steps}", "validation.eval_iters=0"]
        self.shared += [f"train.device={args.device}", f"train.global_batch_size={args.batch}"]
        self.shared += [f"model.hybrid_override_pattern={args.pattern}"] if args.pattern else []
        self.shared += args.set

    def command(self, *words: str | Path, ranks: int = 1) -> None:
        """Print and run a command; raises SystemExit if it fails."""
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        line = [*start, *map(str, words)]
        print("+", shlex.join(line[1:]), flush=True)
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")

    def train(self, name: str, mode: str, layout: dict[str, int], *settings: str | Path) -> Path:
        """One run of train.py.  Returns its folder."""
        folder = self.home / name.replace(" ", "-").replace("=", "")
        words = ["train.py", "--mode", mode, *self.shared, *(f"parallel.{k}={n}" for k, n in layout.items())]
        words += [*map(str, settings), f"logger.run_dir={folder}"]
        if self.args.plan:
            print(f"\n== {name}", flush=True)
            plan = [sys.executable, *words, "--dry-run", "--world-size", str(self.args.ranks)]
            if subprocess.run(plan, cwd=ROOT, check=False).returncode:
                raise SystemExit("the plan was refused")
            return folder
        self.command(*words, ranks=self.args.ranks)
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        steps = [r for r in lines if r["kind"] == "train"][SKIP:]
        record = {"name": name, "command": words, "layout": layout, "steps": len(steps)}
        for key in ("tokens_per_second", "tflops", "mfu", "memory_gib", "balance", "seconds"):
            values = [r[key] for r in steps if key in r]
            record[key] = statistics.median(values) if values else None
        record["first_loss"], record["last_loss"] = steps[0]["loss"], steps[-1]["loss"]
        record |= self.expected(words)
        self.records.append(record)
        print(row(record, self.args.ranks), flush=True)
        return folder

    def expected(self, words: list[str]) -> dict[str, float]:
        """What the plan says that a rank sends, GiB; and tokens/s from a GPU's time for the blocks and that."""
        plan = [sys.executable, *words, "--dry-run", "--world-size", str(self.args.ranks)]
        text = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        units = {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
        total = re.search(r"^in all: (.*)$", text, re.M)
        sent = {a: float(n) * units[u] for a, n, u in re.findall(r"(\w+) ([\d.]+) (\w+)", total[1])} if total else {}
        found: dict[str, float] = {"sent_gib": sum(sent.values()) / 2**30}
        if self.args.step is None or not (tokens := re.search(r"= ([\d,]+) tokens on each of (\d+) replicas", text)):
            return found
        block = next(r for r in json.loads(self.args.step.read_text()) if "block_ms" in r)
        pattern = self.args.pattern or ModelConfig().hybrid_override_pattern
        each = block["block_ms"]
        per_token = (sum(each[x] for x in pattern) + each["ends"]) / (block["rows"] * 8192)
        mine, replicas = int(tokens[1].replace(",", "")), int(tokens[2])
        ranks = self.args.ranks
        computing = per_token * mine * replicas / ranks  # ms: tp ranks share a replica's tokens
        exposed = sum(n for axis, n in sent.items() if axis in ("tp", "ep")) / self.args.link / 1e6
        found["expected_tokens_per_second"] = mine * replicas / (computing + exposed) * 1e3
        return found


def row(r: dict, ranks: int) -> str:
    """One line of the table."""

    def text(key: str, form: str, factor: float = 1.0) -> str:
        return "-" if r.get(key) is None else format(r[key] * factor, form)

    return (
        f"{r['name']:24} {text('tokens_per_second', ',.0f', 1 / ranks):>8} tokens/s per GPU "
        f"(expected {text('expected_tokens_per_second', ',.0f', 1 / ranks)})  {text('tflops', '.0f')} TFLOP/s  "
        f"MFU {text('mfu', '.1%')}  {text('memory_gib', '.1f')} GiB  balance {text('balance', '.2f')}  "
        f"sends {r['sent_gib']:.2f} GiB a step  loss {r['first_loss']:.3f} -> {r['last_loss']:.3f}"
    )


def weights(folder: Path, c: ModelConfig) -> None:
    """Random weights of the geometry in the released layout, as small as initial ones."""
    g = np.random.default_rng(0)
    bf16 = torch.from_numpy(0.02 * g.standard_normal(1 << 24, dtype=np.float32)).bfloat16()
    fp32 = (0.01 * g.random(1 << 22, dtype=np.float32)).view(np.uint8)
    make(folder, c, 5 * 10**9, {"BF16": memoryview(bf16.view(torch.uint8).numpy()), "F32": memoryview(fp32)})


def questions(path: Path) -> Path:
    """Questions in SQuAD's form about paragraphs of a few hundred words."""
    r, data = random.Random(0), []
    for i in range(4000):
        words = [r.choice(WORDS) for _ in range(r.randint(50, 400))]
        context, at = " ".join(words), r.randrange(len(words))
        answer = {"text": words[at], "answer_start": len(" ".join([*words[:at], ""]))}
        data.append({"context": context, "qas": [{"id": str(i), "question": f"Word {at}?", "answers": [answer]}]})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "words", "paragraphs": data}]}))
    return path


def pretrain(r: Recipe) -> None:
    for tp in dict.fromkeys((1, r.args.tp)):
        layout = {"tp": tp, "ep": r.args.ranks, "pp": 1}
        how = ["dataset=mock", f"--seq-length={r.args.seq_length}", "checkpoint.save_interval=-1"]
        r.train(f"pretrain tp={tp} ep={r.args.ranks}", "pretrain", layout, *how)


def finetune(r: Recipe, hf: Path, base: Path, data: list[str]) -> None:
    n, start = r.args.ranks, f"checkpoint.pretrained_checkpoint={base}"
    iterations = f"iter_{r.args.steps:07d}"
    run = r.train(f"finetune ep={n}", "finetune", {"tp": 1, "ep": n, "pp": 1}, *data, *SMALL, start)
    more = [f"train.train_iters={r.args.steps + SKIP + 5}", f"checkpoint.load={run / 'checkpoints'}"]
    layout = {"tp": 2, "ep": max(1, n // 2), "pp": 1}
    r.train(f"resumed tp=2 ep={layout['ep']}", "finetune", layout, *data, *SMALL, *more, "checkpoint.save_interval=-1")
    if r.args.plan:
        return
    last, out = run / "checkpoints" / iterations, r.home / "exported"
    r.command("convert.py", "export", "--hf-model", hf, "--megatron-path", last, "--hf-path", out)
    r.command("convert.py", "verify", "--rounded", last, out)  # dt_bias trains in fp32 and is released in bf16
    shutil.rmtree(out)
    shutil.rmtree(run)


def lora(r: Recipe, hf: Path, base: Path, data: list[str]) -> None:
    start = [f"checkpoint.pretrained_checkpoint={base}", "--peft", "lora"]
    layout = {"tp": 1, "ep": r.args.ranks, "pp": 1}
    run = r.train(f"lora ep={r.args.ranks}", "finetune", layout, *data, *start)
    if r.args.plan:
        return
    last = run / "checkpoints" / f"iter_{r.args.steps:07d}"
    r.command("merge_lora.py", "--hf-model-path", hf, "--lora-checkpoint", last, "--output", r.home / "merged")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=Path("."), help="for weights and checkpoints; emptied afterwards")
    p.add_argument(
        "--only", nargs="+", choices=("pretrain", "finetune", "lora"), default=("pretrain", "finetune", "lora")
    )
    p.add_argument("--ranks", type=int, default=8, help="GPUs of this host; ep is as many")
    p.add_argument("--tp", type=int, default=4, help="of the second pretraining run")
    p.add_argument("--preset", default="nano-30b-a3b")
    p.add_argument("--pattern", default="", help="layers, if not the whole model")
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--batch", type=int, default=64, help="sequences of a step")
    p.add_argument("--seq-length", type=int, default=8192, help="in pretraining; fine-tuning takes half of it")
    p.add_argument("--device", default="cuda")
    p.add_argument("--step", type=Path, help="JSON of benchmarks.step, to compare with")
    p.add_argument("--link", type=float, default=300.0, help="GB/s of a GPU's messages, for --step")
    p.add_argument("--plan", action="store_true", help="only print what --dry-run says of every run")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every run")
    p.add_argument("--out", default="", metavar="JSON")
    args = p.parse_args()
    r = Recipe(args)
    hf, base = r.home / "hf", r.home / "imported"
    try:
        if "pretrain" in args.only:
            pretrain(r)
        if set(args.only) != {"pretrain"}:
            data = ["--packed-sequence", f"--seq-length={args.seq_length // 2}", "--tokenizer-model=bytes"]
            if not args.plan:
                weights(hf, resolve(parser().parse_args(["--mode", "finetune", *r.shared]))[0].model)
                data.append(f"dataset.path={questions(r.home / 'squad.json')}")
                r.command("convert.py", "import", "--hf-model", hf, "--megatron-path", base)
            for name, run in (("finetune", finetune), ("lora", lora)):
                if name in args.only:
                    run(r, hf, base, data)
    finally:
        shutil.rmtree(r.home, ignore_errors=True)
    print(f"\n{PUBLISHED}")
    for record in r.records:
        print(row(record, args.ranks))
    if args.out:
        Path(args.out).write_text(json.dumps(r.records, indent=1))


if __name__ == "__main__":
    main()

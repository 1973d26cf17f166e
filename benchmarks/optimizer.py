"""What AdamW in fewer bytes costs in quality: validation losses of a small model, beside fp32 AdamW's.

    python -m benchmarks.optimizer                             every form, one seed, 500 steps
    python -m benchmarks.optimizer --seeds 1 2 3 --forms 0 3

Weights are bf16 in all forms, so that only the optimizer differs.  Each run is one of `train.py --preset tiny`, its
model shrunk to four blocks; a table, then one JSON document.  Any device.
"""

import argparse
import json
import math
import tempfile
import time

import torch

from nano3.cli import parser, resolve
from nano3.parallel.mesh import ALONE, Mesh
from nano3.train.loop import Trainer, keep_freed_memory

FORMS = [  # moments, masters, gradients
    ("fp32", "fp32", "fp32"),
    ("bf16", "fp32", "fp32"),
    ("8bit", "fp32", "fp32"),
    ("fp32", "none", "fp32"),
    ("8bit", "fp32", "bf16"),
    ("8bit", "none", "bf16"),
]
SHRINK = ["model.hybrid_override_pattern=ME*E", "dataset.seq_length=256", "train.micro_batch_size=2"]


def train(form: tuple[str, str, str], seed: int, steps: int, more: list[str]) -> dict[str, object]:
    forms = [f"optimizer.{key}={value}" for key, value in zip(("moments", "masters", "gradients"), form, strict=True)]
    run = [f"rng.seed={seed}", f"train.train_iters={steps}", "train.precision=bf16", "validation.eval_iters=32"]
    arguments = ["--mode", "pretrain", "--preset", "tiny", *SHRINK, *run, *forms, *more]
    config, name = resolve(parser().parse_args(arguments))
    mesh = Mesh(device=torch.device("cuda")) if torch.cuda.is_available() else ALONE
    trainer = Trainer(config, name, mesh)
    trainer.first = 0
    begin = time.perf_counter()
    for _ in range(steps):
        trainer._step()
    seconds, state = time.perf_counter() - begin, trainer.optimizer.state()
    kept = sum(t.nbytes for tensors in state.values() for t in tensors.values())
    each = kept / sum(p.numel() for p in trainer.model.parameters())
    return {"form": "/".join(form), "seed": seed, "loss": trainer.evaluate(), "bytes": each, "seconds": seconds}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--seeds", type=int, nargs="+", default=[1])
    p.add_argument("--forms", type=int, nargs="+", choices=range(len(FORMS)), default=list(range(len(FORMS))))
    p.add_argument("overrides", nargs="*", help="further settings, such as optimizer.lr=1e-3")
    a = p.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    rows = []
    print(f"{'moments/masters/gradients':28}{'seed':>6}{'bytes a parameter':>20}{'loss':>10}{'s':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for seed in a.seeds:
            for form in a.forms:
                r = train(FORMS[form], seed, a.steps, [f"logger.run_dir={folder}", *a.overrides])
                assert math.isfinite(r["loss"])
                rows.append(r)
                print(f"{r['form']:28}{seed:6}{r['bytes']:20.2f}{r['loss']:10.4f}{r['seconds']:8.0f}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

"""Fine-tuning of the whole 30B geometry, by LoRA on one GPU or in full on a few: tokens/s and memory.

    python -m benchmarks.finetune --name "six targets" --set peft.scheme=lora train.recompute=full
    torchrun --nproc-per-node=2 -m benchmarks.finetune --seq-length 4096 --set parallel.ep=2 train.recompute=full

Weights are drawn on the GPU, tokens are random and all of them count.  The first step is listed by itself: it compiles
what the kernel cache lacks.  Several --seq-length find the longest that fits; --set takes settings as train.py does.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.measure import environment
from benchmarks.parallel import rows
from nano3.cli import parser, resolve
from nano3.config import Config
from nano3.model.init import allocate, initialise
from nano3.parallel.mesh import Mesh, create_mesh
from nano3.train.checkpoint import build
from nano3.train.optim import AdamW
from nano3.train.plan import rank_parts, uses_bf16
from nano3.train.step import training_step


def config_of(args: argparse.Namespace, seq_length: int) -> Config:
    settings = ["--mode", "finetune", "--preset", args.preset, f"train.device={args.device}", "dataset=mock"]
    settings += ["parallel.tp=1", "parallel.ep=1", "parallel.pp=1", f"dataset.seq_length={seq_length}"]
    settings += ["train.micro_batch_size=1", *args.set]
    settings += [f"train.global_batch_size={args.rows * int(os.environ.get('WORLD_SIZE', 1))}"]
    return resolve(parser().parse_args(settings))[0]


def measure(config: Config, mesh: Mesh, args: argparse.Namespace) -> dict[str, object]:
    """One run of some steps."""
    cuda = mesh.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if uses_bf16(config, mesh.device.type) else torch.float32
    parts = rank_parts(config, mesh.pp.rank)
    model = allocate(build(config.model, config.recompute, mesh, parts, config.peft), mesh.device, dtype)
    initialise(model, config.model, config.rng.seed, device=mesh.device)
    optimizer = AdamW(model, config.optimizer, config.parallel.grad_reduce_in_fp32)
    weights = torch.cuda.memory_allocated() if cuda else 0
    seconds, losses = [], []
    for step in range(args.steps):
        batches = rows(config, mesh, step)
        begin = time.perf_counter()
        losses.append(training_step(model, optimizer, batches, config, mesh, config.optimizer.lr, False).loss)
        optimizer.finish_gather()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    usual = statistics.median(seconds[1:])
    tokens = config.train.global_batch_size * config.dataset.seq_length
    return {
        "name": args.name,
        "seq_length": config.dataset.seq_length,
        "ranks": mesh.world,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens_per_second": tokens / usual,
        "per_gpu": tokens / usual / mesh.world,
        "step_ms": 1e3 * usual,
        "first_step_s": seconds[0],
        "weights_gib": weights / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        "losses": losses,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", default="", help="of this run, in the table")
    p.add_argument("--preset", default="nano-30b-a3b")
    p.add_argument("--seq-length", type=int, nargs="+", default=[8192])
    p.add_argument("--rows", type=int, default=1, help="sequences of a rank in a step")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--device", default="cuda")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    p.add_argument("--out", default="", metavar="JSON")
    args = p.parse_args()
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    torch.backends.cuda.matmul.allow_tf32 = False
    mesh, records = None, []
    for seq_length in args.seq_length:
        config = config_of(args, seq_length)
        mesh = mesh or create_mesh(config, world, rank, local)
        try:
            r = measure(config, mesh, args)
        except torch.OutOfMemoryError as error:
            if world > 1:  # the other ranks wait for this one
                raise
            print(f"{args.name} {seq_length}: {str(error)[:200]}", flush=True)
            break
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        records.append(r)
        if rank == 0:
            print(
                f"{args.name:24} {seq_length:6} tokens  {r['trained'] / 1e6:8.1f} M trained  {r['step_ms']:8.1f} ms  "
                f"{r['per_gpu']:8,.0f} tokens/s per GPU  first step {r['first_step_s']:.1f} s  weights "
                f"{r['weights_gib']:.1f} GiB  peak {r['peak_gib']:.1f} GiB",
                flush=True,
            )
    if rank == 0 and args.out:
        Path(args.out).write_text(json.dumps([*records, environment() if args.device == "cuda" else {}], indent=1))
    if world > 1:
        dist.barrier(group=mesh.host)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

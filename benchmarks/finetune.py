"""Fine-tuning of the whole 30B geometry, by LoRA on one GPU or in full on a few: tokens/s and memory.

    python -m benchmarks.finetune --variants six none fp8 longest [--profile] [--out finetune.json]
    python -m benchmarks.finetune --name "rank 16" --set peft.scheme=lora peft.rank=16 train.recompute=full
    torchrun --nproc-per-node=2 -m benchmarks.finetune --seq-length 4096 --set parallel.ep=2 train.recompute=full

--variants: runs with the settings in VARIANTS, one after another in one process; without it, one run of the settings
given.  --set takes settings as train.py does, for every run.  Several --seq-length find the longest that fits; they
take the place of a variant's own.  What does not fit is reported, and the next variant is run.

Weights are drawn on the GPU, tokens are random and all of them count.  The first step is listed by itself: it compiles
what the kernel cache lacks.  --profile: the kernels of one step more, and of another what the host did, the longest
first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import environment
from benchmarks.parallel import rows
from nano3.cli import parser, resolve
from nano3.config import Config
from nano3.model.init import allocate, initialise
from nano3.model.model import Nano3
from nano3.parallel.mesh import Mesh, create_mesh
from nano3.train.checkpoint import build
from nano3.train.optim import AdamW
from nano3.train.plan import rank_parts, uses_bf16
from nano3.train.step import training_step


class Variant(NamedTuple):
    settings: list[str]
    seq_lengths: tuple[int, ...] = (8192,)


LORA = ["peft.scheme=lora", "optimizer.moments=8bit", "optimizer.gradients=bf16"]
# An attention block keeps 28 KiB a token, a mixture block 40, a Mamba block 59: of 6, 23 and 23 blocks.
KEEP_ATTENTION = ["train.recompute=[moe,mamba]"]
KEEP_MIXTURES = ["train.recompute=[mamba,attention]"]
VARIANTS = {  # all with NVIDIA's six targets, rank 32
    "six": Variant([*LORA, *KEEP_ATTENTION]),
    "six-recomputed": Variant([*LORA, "train.recompute=full"]),
    "six-kept": Variant([*LORA, *KEEP_MIXTURES, "optimizer.masters=none"]),  # 3.3 GiB of masters make the room
    "torch": Variant([*LORA, *KEEP_ATTENTION, "model.kernels.experts=torch"]),
    "shared": Variant([*LORA, *KEEP_ATTENTION, "peft.experts=shared"]),
    "none": Variant([*LORA, *KEEP_MIXTURES, "peft.experts=none"]),
    "none-recomputed": Variant([*LORA, *KEEP_ATTENTION, "peft.experts=none"]),
    "fp8": Variant([*LORA, "train.recompute=full", "peft.base_dtype=fp8"], (4096,)),
    "longest": Variant([*LORA, "train.recompute=full", "optimizer.masters=none"], (8192, 16384, 32768, 65536)),
}


def config_of(args: argparse.Namespace, variant: Variant, seq_length: int) -> Config:
    settings = ["--mode", "finetune", "--preset", args.preset, f"train.device={args.device}", "dataset=mock"]
    settings += ["parallel.tp=1", "parallel.ep=1", "parallel.pp=1", f"dataset.seq_length={seq_length}"]
    settings += ["train.micro_batch_size=1", *variant.settings, *args.set]
    settings += [f"train.global_batch_size={args.rows * int(os.environ.get('WORLD_SIZE', 1))}"]
    return resolve(parser().parse_args(settings))[0]


def release(model: Nano3, optimizer: AdamW | None) -> None:
    """Give back the memory of everything that outlives a step, whoever still refers to it."""
    state = {} if optimizer is None else optimizer.state()
    held = [*model.parameters(), *model.buffers(), *(t for kinds in state.values() for t in kinds.values())]
    held += [t.scales for t in held if hasattr(t, "scales")]
    for t in held:
        t.untyped_storage().resize_(0)


def kernels_of(step: Callable[[], object]) -> dict[str, object]:
    """The kernels of one call: their number, the time in which one runs or none does, and the longest by name."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    found = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = idle = end = 0.0
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in found):
        idle += max(0.0, start - end) if end else 0.0
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    times: Counter[str] = Counter()
    calls = Counter(e.name for e in found)
    for e in found:
        times[e.name] += e.time_range.end - e.time_range.start
    top = [(name, us / 1e3, calls[name]) for name, us in times.most_common(40)]
    return {"kernels": len(found), "busy_ms": busy / 1e3, "idle_ms": idle / 1e3, "top": top}


def host_of(step: Callable[[], object]) -> list[tuple[str, float, int]]:
    """What the host was busy with in a step by operator or node, its callees left out: name, ms, calls.

    A node's time is that of its Python, launches of our kernels included.  Being watched costs time itself.
    """
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    found = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    return [(e.key, e.self_cpu_time_total / 1e3, e.count) for e in found[:40]]


def measure(model: Nano3, optimizer: AdamW, config: Config, mesh: Mesh, args: argparse.Namespace) -> dict[str, object]:
    """One run of some steps."""
    cuda = mesh.device.type == "cuda"
    weights = torch.cuda.memory_allocated() if cuda else 0
    seconds, losses = [], []

    def step(number: int) -> None:
        batches = rows(config, mesh, number)
        begin = time.perf_counter()
        losses.append(training_step(model, optimizer, batches, config, mesh, config.optimizer.lr, False).loss)
        optimizer.finish_gather()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)

    for number in range(args.steps):
        step(number)
    usual = statistics.median(seconds[1:])
    tokens = config.train.global_batch_size * config.dataset.seq_length
    found = {
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
        "losses": list(losses),
    }
    if args.profile:
        found |= kernels_of(lambda: step(args.steps)) if cuda else {}
        found["host"] = host_of(lambda: step(args.steps + 1))
    return found


def run(config: Config, mesh: Mesh, args: argparse.Namespace) -> dict[str, object]:
    """Build a model, measure it, and give its memory back; its record has an error alone if it does not fit."""
    cuda = mesh.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if uses_bf16(config, mesh.device.type) else torch.float32
    model = build(config.model, config.recompute, mesh, rank_parts(config, mesh.pp.rank), config.peft)
    optimizer = None
    try:
        initialise(allocate(model, mesh.device, dtype), config.model, config.rng.seed, device=mesh.device)
        optimizer = AdamW(model, config.optimizer, config.parallel.grad_reduce_in_fp32)
        return measure(model, optimizer, config, mesh, args)
    except torch.OutOfMemoryError as error:
        if mesh.world > 1:  # the other ranks wait for this one
            raise
        return {"seq_length": config.dataset.seq_length, "error": str(error)[:200]}
    finally:
        release(model, optimizer)
        del model, optimizer
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def show(r: dict[str, object]) -> None:
    if "error" in r:
        print(f"{r['name']:16} {r['seq_length']:6} tokens  does not fit: {r['error']}", flush=True)
        return
    print(
        f"{r['name']:16} {r['seq_length']:6} tokens  {r['trained'] / 1e6:8.1f} M trained  {r['step_ms']:8.1f} ms  "
        f"{r['per_gpu']:8,.0f} tokens/s per GPU  first step {r['first_step_s']:.1f} s  weights "
        f"{r['weights_gib']:.1f} GiB  peak {r['peak_gib']:.1f} GiB  reserved {r['reserved_gib']:.1f}",
        flush=True,
    )
    if "top" in r:
        print(f"  {r['kernels']} kernels, busy {r['busy_ms']:.1f} ms, idle {r['idle_ms']:.1f} ms (profiled)")
        for name, ms, calls in r["top"]:
            print(f"  {ms:9.2f} ms {calls:6} x {name[:110]}", flush=True)
    for name, ms, calls in r.get("host", []):
        print(f"  host {ms:9.2f} ms {calls:6} x {name[:104]}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=[])
    p.add_argument("--name", default="", help="of a run without a variant, in the table")
    p.add_argument("--preset", default="nano-30b-a3b")
    p.add_argument("--seq-length", type=int, nargs="+", default=[])
    p.add_argument("--rows", type=int, default=1, help="sequences of a rank in a step")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--device", default="cuda")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    p.add_argument("--profile", action="store_true")
    p.add_argument("--out", default="", metavar="JSON")
    args = p.parse_args()
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    torch.backends.cuda.matmul.allow_tf32 = False
    mesh, records = None, []
    for name, variant in {n: VARIANTS[n] for n in args.variants}.items() or [(args.name, Variant([]))]:
        for seq_length in args.seq_length or variant.seq_lengths:
            config = config_of(args, variant, seq_length)
            mesh = mesh or create_mesh(config, world, rank, local)
            records.append({"name": name} | run(config, mesh, args))
            if rank == 0:
                show(records[-1])
            if rank == 0 and args.out:  # after each, in case the next is cut off
                about = environment() if args.device == "cuda" else {}
                Path(args.out).write_text(json.dumps([*records, about], indent=1))
            if "error" in records[-1]:
                break
    if world > 1:
        dist.barrier(group=mesh.host)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

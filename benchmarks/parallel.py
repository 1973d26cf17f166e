"""Layouts on one host: tokens/s, scaling against one GPU, memory, bytes sent, and losses beside those of one rank.

    python -m benchmarks.parallel [--ranks 2] [--model tiny nano-cut] [--layouts "tp=2" "ep=2" …] [--out parallel.json]

Starts one torchrun per layout.  `nano-cut` is Nano at full width and fewer layers (--pattern).  Every layout trains on
the same random tokens, --rows of them to a data-parallel rank; one GPU alone trains on the same global batch, and
scaling is tokens/s per GPU against it.  "worst loss" is the largest relative difference of any step's loss from that of
one GPU; its yardstick is the first line, one GPU with the other attention kernel: the same formula, rounded
differently.  On GPUs one more step is profiled: "messages" is the time in which a message was under way, "exposed" the
part of it in which nothing else ran (a step begins with the last one's gathering done, so that part is not in it).
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from nano3.cli import parser, resolve
from nano3.config import Config
from nano3.data.loader import Batch
from nano3.model.init import allocate, initialise
from nano3.parallel import collectives
from nano3.parallel.mesh import Mesh, create_mesh
from nano3.train.checkpoint import build
from nano3.train.optim import AdamW
from nano3.train.plan import rank_parts, uses_bf16
from nano3.train.step import training_step

WARM_UP = 3  # steps that are not timed
CALLS = {"all_to_all_single": dist, "all_reduce": dist, "isend": dist}
CALLS |= {"_reduce_scatter": collectives, "_all_gather": collectives}


def config_of(args: argparse.Namespace, layout: str) -> Config:
    settings = ["--mode", "pretrain", "--preset", "tiny" if args.model == "tiny" else "nano-30b-a3b", "dataset=mock"]
    if args.model != "tiny":
        settings += [f"model.hybrid_override_pattern={args.pattern}", f"dataset.seq_length={args.seq_length}"]
    settings += [f"parallel.{o}" for o in ("tp=1", "ep=1", "pp=1", *layout.split())]
    settings += [f"train.global_batch_size={args.batch}", "train.micro_batch_size=1", f"train.device={args.device}"]
    settings += args.set
    return resolve(parser().parse_args(settings))[0]


def rows(config: Config, mesh: Mesh, step: int) -> list[Batch]:
    """This rank's rows of the step's global batch, one a micro-batch."""
    g = torch.Generator().manual_seed(step)
    shape = (config.train.global_batch_size, config.dataset.seq_length + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=g)
    share = ids.shape[0] // mesh.dp.size
    return [Batch(r[None, :-1], r[None, 1:]) for r in ids[mesh.dp.rank * share :][:share]]


def count_bytes(sent: dict[str, int]) -> None:
    """Count the bytes that each kind of collective is handed on this rank."""

    def counting(name: str, original: Callable) -> Callable:
        def counted(*args: object, **kw: object) -> object:
            tensor = args[0] if name in ("all_reduce", "isend") else args[1]
            sent[name] = sent.get(name, 0) + tensor.numel() * tensor.itemsize
            return original(*args, **kw)

        return counted

    for name, module in CALLS.items():
        setattr(module, name, counting(name.lstrip("_"), getattr(module, name)))


def wait(optimizer: AdamW) -> None:
    """Until everything that was asked for is done."""
    optimizer.finish_gather()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def trace(step: Callable[[], object], args: argparse.Namespace, rank: int) -> None:
    """Write a Chrome trace of one more step, by the layout and the rank."""
    folder = Path(args.trace)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as recorded:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    name = f"{args.model}-{args.worker.replace(' ', '-') or 'alone'}-{rank}.json.gz"
    recorded.export_chrome_trace(str(folder / name))


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def message_ms(step: Callable[[], object], profile: bool) -> dict[str, float]:
    """Profile one step of this rank: the time in which messages were under way, and in which only they were."""
    if not profile:  # a rank that only takes part
        step()
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for e in recorded.events():
        if e.device_type == torch.autograd.DeviceType.CUDA:
            spans["nccl" in e.name.lower()].append((e.time_range.start, e.time_range.end))
    messages, rest = covered(spans[True]), covered(spans[False])
    return {"messages_ms": messages / 1e3, "exposed_ms": (covered(spans[True] + spans[False]) - rest) / 1e3}


def worker(args: argparse.Namespace) -> None:
    """One rank of one layout: trains, times, and leaves a record."""
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    sent: dict[str, int] = {}
    count_bytes(sent)
    faulthandler.dump_traceback_later(args.patience, exit=True)  # two ranks that wait for each other say where
    config = config_of(args, args.worker)
    mesh = create_mesh(config, world, rank, local)
    cuda = mesh.device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = torch.bfloat16 if uses_bf16(config, mesh.device.type) else torch.float32
    parts = rank_parts(config, mesh.pp.rank)
    model = allocate(build(config.model, config.recompute, mesh, parts), mesh.device, dtype)
    initialise(model, config.model, config.rng.seed, device=mesh.device)
    optimizer = AdamW(model, config.optimizer, config.parallel.grad_reduce_in_fp32)
    optimizer.communication_sms = config.parallel.communication_sms
    data = [rows(config, mesh, step) for step in range(args.steps)]
    losses, ends = [], []
    for batches in data:
        before = dict(sent)
        # No wait between steps: the gathering of the parameters runs on into the next forward pass, as in training.
        losses.append(training_step(model, optimizer, batches, config, mesh, 1e-4, False).loss)
        ends.append(time.perf_counter())
    wait(optimizer)
    ends.append(time.perf_counter())
    times = [b - a for a, b in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
    times[-2:] = [times[-2] + times[-1]]  # what was still under way belongs to the last step
    step_s = statistics.median(times)
    record = {
        "model": args.model,
        "layout": args.worker or "alone",
        "ranks": world,
        "tokens_per_second": config.tokens_per_step / step_s,
        "per_gpu": config.tokens_per_step / step_s / world,
        "step_ms": step_s * 1e3,
        "steps_ms": [1e3 * t for t in times],
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "sent_mib": {k: (v - before.get(k, 0)) / 2**20 for k, v in sent.items() if v > before.get(k, 0)},
        "losses": losses,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
    if cuda and world > 1:
        record |= message_ms(lambda: training_step(model, optimizer, data[-1], config, mesh, 1e-4, False), rank == 0)
        wait(optimizer)
    if args.trace:
        trace(lambda: training_step(model, optimizer, data[-1], config, mesh, 1e-4, False), args, rank)
    if rank == 0:
        Path(args.record).write_text(json.dumps(record))
    if world > 1:
        dist.barrier(group=mesh.host)
    sys.stdout.flush()
    os._exit(0)


def launch(args: argparse.Namespace, model: str, layout: str, ranks: int, batch: int, *extra: str) -> dict | None:
    """Run one layout in processes of its own.  Returns its record, or None and the reason printed."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "benchmarks.parallel", "--worker", layout, "--model", model, "--record", str(record)]
        for name in ("pattern", "seq_length", "steps", "device", "patience"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        command += ["--set", *args.set, *extra]
        if args.trace:
            command += ["--trace", args.trace]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--batch", str(batch)], capture_output=True, text=True, check=False, env=env)
        if not record.exists():
            print(f"{model} {layout or 'alone'}: failed\n{done.stderr[-8000:]}", flush=True)
            return None
        return json.loads(record.read_text())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--model", nargs="+", default=["tiny", "nano-cut"])
    p.add_argument("--layouts", nargs="+", default=["", "tp=2", "ep=2", "tp=2 ep=2", "pp=2"])
    p.add_argument("--pattern", default="MEM*E", help="layers of nano-cut")
    p.add_argument("--seq-length", type=int, default=8192)
    p.add_argument("--rows", type=int, default=1, help="sequences a data-parallel rank trains on per step")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--device", default="cuda")
    p.add_argument("--patience", type=int, default=120, help="seconds that a layout may take")
    p.add_argument("--no-yardstick", dest="yardstick", action="store_false", help="leave out the other kernel")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for every run, as of train.py")
    p.add_argument("--trace", default="", metavar="FOLDER", help="write a Chrome trace of each run's last step there")
    p.add_argument("--out", default="", metavar="JSON")
    p.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    p.add_argument("--record", default=None, help=argparse.SUPPRESS)
    p.add_argument("--batch", type=int, default=0, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker is not None:
        args.model = args.model[0]
        worker(args)
    records = []
    head = f"{'layout':12} {'ranks':>5} {'batch':>5} {'tokens/s':>10} {'per GPU':>9} {'scaling':>8} {'GiB':>6}"
    print(f"{'model':9} {head}  worst loss, ms of messages (exposed), MiB handed to collectives per step", flush=True)
    kernel = "triton" if args.device == "cuda" else "torch"  # auto is PyTorch's for unpacked rows on a GPU
    for model in args.model:
        alone: dict[int, dict | None] = {}
        for layout in [*(["other kernel"] if args.yardstick else []), *args.layouts]:
            other = layout == "other kernel"
            asked = {} if other else dict(o.split("=") for o in layout.split())
            ranks = 1 if other else args.ranks
            dp = args.ranks // int(asked.get("tp", 1)) // int(asked.get("pp", 1))
            batch = args.rows * dp * (4 if "pp" in asked else 1)  # a pipeline needs several to be busy
            if batch not in alone:
                alone[batch] = launch(args, model, "", 1, batch)
            if alone[batch] is None:
                break
            base = alone[batch]
            extra = [f"model.kernels.attention={kernel}"] if other else []
            found = launch(args, model, "" if other else layout, ranks, batch, *extra)
            if found is None or base is None:
                continue
            found["layout"] = layout or f"dp={args.ranks}"
            found["scaling"] = found["per_gpu"] / base["per_gpu"]
            found["worst_loss"] = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], base["losses"], strict=True))
            records.append(found)
            ms = f"{found['messages_ms']:.1f} ({found['exposed_ms']:.1f})" if "messages_ms" in found else "-"
            sent = " ".join(f"{k} {v:,.1f}" for k, v in found["sent_mib"].items())
            print(
                f"{model:9} {found['layout']:12} {ranks:5} {batch:5} {found['tokens_per_second']:10,.0f} "
                f"{found['per_gpu']:9,.0f} {found['scaling']:8.1%} {found['memory_gib']:6.1f}  "
                f"{found['worst_loss']:.1e}  {ms}  {sent}",
                flush=True,
            )
        records += [r for r in alone.values() if r]
    if args.out:
        Path(args.out).write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()

"""A training step at Nano's width on one GPU: what each kind of block costs, and what 52 layers would.

    python -m benchmarks.step [--rows 1 2] [--recompute none moe] [--peer] [--profile FOLDER] [--out JSON]

Four cuts of the model are trained on random tokens, `ME*` and the same with one block more of a kind; a block's cost is
a difference, and what `ME*` costs beyond its three blocks is embedding, head and loss.  A micro-batch is a forward and
a backward pass with its gradients added to the sums in fp32; the first of a step, which stores them instead, is
listed beside.  Tokens/s of the full depth = tokens / (23 M + 23 E + 6 * + ends).

--peer: transformers' model of the cut `MEMEM*EME` in the same run, with grouped products, mamba-ssm's Triton kernels if
$MAMBA_SSM names their folder, and our convolution (theirs has to be compiled), and ours of the same cut.
--profile: a Chrome trace of a micro-batch of each cut, and a table of its kernels.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import environment, gpu_ms
from nano3.cli import parser, resolve
from nano3.config import NANO_PATTERN, Config, ModelConfig
from nano3.data.loader import Batch
from nano3.model.init import allocate, initialise
from nano3.model.model import Nano3
from nano3.parallel.mesh import Mesh
from nano3.train.checkpoint import build
from nano3.train.gradients import Gradients
from nano3.train.optim import AdamW
from nano3.train.plan import parameters, training_flops
from nano3.train.step import head_loss, training_step

BASE = "ME*"
CUTS = {"M": "MME*", "E": "MEE*", "*": "ME**"}
PEER_CUT = "MEMEM*EME"
NAMES = {"M": "Mamba-2", "E": "mixture", "*": "attention", "ends": "embedding, head, loss"}


def nano(args: argparse.Namespace) -> ModelConfig:
    """The geometry at full depth."""
    return resolve(parser().parse_args(["--mode", "pretrain", "--preset", "nano-30b-a3b", *args.set]))[0].model


class NoUpdate(Gradients):
    """Gradients are collected, and nothing is done with them."""

    def step(self, lr: float) -> float:
        self.reduced_gradients()
        self.last_micro_batch = False
        return 0.0


class Cut:
    """A model of a few layers on random tokens."""

    def __init__(self, pattern: str, rows: int, recompute: str, args: argparse.Namespace, update: bool = False) -> None:
        settings = ["--mode", "pretrain", "--preset", "nano-30b-a3b", "dataset=mock", f"train.device={args.device}"]
        settings += [f"model.hybrid_override_pattern={pattern}", f"dataset.seq_length={args.seq_length}"]
        settings += ["parallel.tp=1", "parallel.ep=1", "parallel.pp=1", f"train.recompute={recompute}", *args.set]
        settings += [f"train.micro_batch_size={rows}", f"train.global_batch_size={rows}"]
        self.config: Config = resolve(parser().parse_args(settings))[0]
        self.mesh = Mesh(device=torch.device(args.device))
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.model: Nano3 = allocate(build(self.config.model, self.config.recompute), self.mesh.device, dtype)
        initialise(self.model, self.config.model, 0, device=self.mesh.device)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.model.vocab_size, (3, rows, args.seq_length + 1), generator=g)
        self.batches = [Batch(i[:, :-1], i[:, 1:]) for i in ids]
        self.gradients = AdamW(self.model, self.config.optimizer) if update else NoUpdate(self.model)

    def micro_batches(self, n: int) -> Callable[[], object]:
        """n micro-batches of one step."""
        return lambda: training_step(self.model, self.gradients, self.batches[:n], self.config, self.mesh, 0.0, False)

    def kept(self) -> int:
        """Bytes that the forward pass keeps for the backward pass; the head's sums, which begin there, not counted."""
        batch = self.batches[0].to(self.mesh.device)
        self.model.train()
        before = torch.cuda.memory_allocated()
        out = self.model(batch.tokens)
        labels = batch.labels.flatten()
        loss = head_loss(self.model, out.hidden, labels, torch.ones(labels.shape, device=labels.device), self.config)
        after = torch.cuda.memory_allocated()
        sums = sum(b.total.nbytes for b in self.gradients.buckets if b.total is not None)
        del out, loss
        self.gradients.reduced_gradients()  # nothing of this pass is to be left for the next step
        return after - before - sums


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_ms(f: Callable[[], object], repetitions: int) -> float:
    """Median wall time of f in ms, launches, gaps and one synchronisation included."""
    for _ in range(2):
        f()
    times = []
    for _ in range(repetitions):
        wait()
        start = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def profiled(f: Callable[[], object], path: Path | None) -> dict[str, object]:
    """Kernels of one call: their number, their time, the time in which none ran, and the longest by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        f()
        wait()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))
    kernels = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    busy, idle, end = 0.0, 0.0, spans[0][0] if spans else 0.0
    for start, stop in spans:
        idle += max(0.0, start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    by_name: Counter[str] = Counter()
    for e in kernels:
        by_name[e.name] += e.time_range.end - e.time_range.start
    top = [(name, us / 1e3, sum(e.name == name for e in kernels)) for name, us in by_name.most_common(30)]
    return {"kernels": len(kernels), "busy_ms": busy / 1e3, "idle_ms": idle / 1e3, "top": top}


def measure(pattern: str, rows: int, recompute: str, args: argparse.Namespace) -> dict[str, object]:
    """Times and memory of one cut."""
    cut = Cut(pattern, rows, recompute, args)
    found: dict[str, object] = {"pattern": pattern, "rows": rows, "recompute": recompute}
    first = wall_ms(cut.micro_batches(1), args.repetitions)
    found["first_ms"] = first
    found["ms"] = (wall_ms(cut.micro_batches(3), args.repetitions) - first) / 2
    if args.device == "cuda":
        folder = (
            Path(args.profile) / f"{pattern.replace('*', 'A')}-{rows}-{recompute}.json.gz" if args.profile else None
        )
        found |= profiled(cut.micro_batches(1), folder)
        found["kept_bytes"] = cut.kept()
        torch.cuda.reset_peak_memory_stats()
        cut.micro_batches(1)()
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def differences(cuts: dict[str, dict], key: str) -> dict[str, float]:
    """What one block of each kind adds to a measured quantity, and what the ends are."""
    base = float(cuts[BASE][key])
    each = {letter: float(cuts[pattern][key]) - base for letter, pattern in CUTS.items()}
    return {**each, "ends": base - sum(each[x] for x in BASE)}


def report(cuts: dict[str, dict], rows: int, recompute: str, peak: float, args: argparse.Namespace) -> dict:
    """Print one table and the sum over all layers of Nano.  Returns the record."""
    tokens = rows * args.seq_length
    flops = training_flops(nano(args), args.seq_length)
    layers = Counter(NANO_PATTERN) | {"ends": 1}
    per_block = {x: flops[x] / layers[x] * tokens for x in CUTS} | {"ends": flops["head"] * tokens}
    ms, first = differences(cuts, "ms"), differences(cuts, "first_ms")
    cuda = args.device == "cuda"
    kept = differences(cuts, "kept_bytes") if cuda else dict.fromkeys(ms, 0.0)
    launched = differences(cuts, "kernels") if cuda else dict.fromkeys(ms, 0.0)
    print(f"\n{rows} x {args.seq_length} tokens, recompute {recompute}")
    print(f"{'':24}{'ms':>8}{'first':>8}{'layers':>7}{'ms':>8}{'TFLOP':>7}{'% peak':>8}{'KiB/token':>10}{'kernels':>8}")
    for x, n in layers.items():
        rate = per_block[x] / ms[x] / 1e9 / peak if peak else 0.0
        print(
            f"{NAMES[x]:24}{ms[x]:8.2f}{first[x]:8.2f}{n:7}{n * ms[x]:8.1f}{per_block[x] / 1e12:7.2f}{rate:8.1%}"
            f"{kept[x] / tokens / 1024:10.1f}{launched[x]:8.0f}"
        )
    whole = {name: sum(n * d[x] for x, n in layers.items()) for name, d in (("ms", ms), ("first", first))}
    total = sum(n * per_block[x] for x, n in layers.items())
    record = {
        "rows": rows,
        "recompute": recompute,
        "block_ms": ms,
        "block_first_ms": first,
        "full_ms": whole["ms"],
        "tokens_per_second": 1e3 * tokens / whole["ms"],
        "first_tokens_per_second": 1e3 * tokens / whole["first"],
        "tflops": total / whole["ms"] / 1e9,
        "of_gemm_peak": total / whole["ms"] / 1e9 / peak if peak else 0.0,
        "cuts": list(cuts.values()),
    }
    print(
        f"52 layers: {whole['ms']:.1f} ms, {record['tokens_per_second']:,.0f} tokens/s "
        f"({record['first_tokens_per_second']:,.0f} in a step of one micro-batch), {record['tflops']:.0f} TFLOP/s, "
        f"{record['of_gemm_peak']:.1%} of the GEMM peak"
    )
    for c in cuts.values() if cuda else ():
        print(
            f"  {c['pattern']:5} {c['first_ms']:.1f} ms: {c['kernels']} kernels, busy {c['busy_ms']:.1f} ms, "
            f"idle {c['idle_ms']:.1f} ms; peak {c['peak_gib']:.1f} GiB, reserved {c['reserved_gib']:.1f}"
        )
    return record


def optimizer_ms(args: argparse.Namespace) -> dict[str, float]:
    """AdamW with fp32 masters on `ME*`, carried to Nano sharded over 8 ranks by the number of parameters."""
    times = []
    for update in (True, False):
        cut = Cut(BASE, 1, "none", args, update)
        times.append(wall_ms(cut.micro_batches(1), args.repetitions))
        here = sum(p.numel() for p in cut.model.parameters())
        del cut
        free()
    ms = times[0] - times[1]
    whole = parameters(nano(args)).total
    carried = ms * whole / 8 / here
    print(f"AdamW: {ms:.1f} ms for {here / 1e9:.2f} G parameters; {carried:.1f} ms for a rank of 8 that share Nano")
    return {"ms": ms, "parameters": here, "nano_over_8_ms": carried}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", default=[1, 2], help="sequences of a micro-batch")
    p.add_argument("--recompute", nargs="+", default=["none", "[moe]"], help="as train.recompute")
    p.add_argument("--seq-length", type=int, default=8192)
    p.add_argument("--repetitions", type=int, default=5)
    p.add_argument("--peer", action="store_true", help="transformers' model too")
    p.add_argument("--no-optimizer", action="store_true", help="leave AdamW out")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings as of train.py")
    p.add_argument("--profile", default="", metavar="FOLDER")
    p.add_argument("--device", default="cuda")
    p.add_argument("--out", default="", metavar="JSON")
    args = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    records: list[dict] = []
    peak = 0.0
    if args.device == "cuda":
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        peak = 2 * 8192**3 / gpu_ms(lambda: a @ b) / 1e9
        del a, b
        print(f"{environment()}, GEMM peak {peak:.0f} TFLOP/s (8192^3, bf16, random numbers)")
    for rows in args.rows:
        for recompute in args.recompute:
            cuts = {}
            for pattern in (BASE, *CUTS.values()):
                cuts[pattern] = measure(pattern, rows, recompute, args)
                free()
            records.append(report(cuts, rows, recompute, peak, args))
            for name, ms, n in cuts[CUTS["E"]].get("top", []) if args.profile else []:
                print(f"  {ms:8.3f} ms {n:5} x  {name[:100]}")
    if not args.no_optimizer:
        records.append({"optimizer": optimizer_ms(args)})
        free()
    if args.peer:
        from benchmarks.step_peer import peer_ms

        ours = measure(PEER_CUT, 1, "none", args)
        free()
        theirs, how = peer_ms(PEER_CUT, args)
        text = f"{theirs:.1f} ms, {theirs / float(ours['ms']):.2f} x" if theirs else "none"
        print(f"\n{PEER_CUT}, 1 x {args.seq_length}: ours {ours['ms']:.1f} ms; transformers {text} ({how})")
        records.append({"peer_cut": PEER_CUT, "ours": ours, "transformers_ms": theirs, "how": how})
    if args.out:
        Path(args.out).write_text(json.dumps([*records, environment() if args.device == "cuda" else {}], indent=1))


if __name__ == "__main__":
    main()

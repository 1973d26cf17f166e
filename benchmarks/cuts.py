"""Models of a few layers at Nano's width, measured in turns, and what a block of each kind costs by them."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from nano3.cli import parser, resolve
from nano3.config import NANO_PATTERN, Config, ModelConfig
from nano3.data.loader import Batch
from nano3.model.init import allocate, initialise, named_tensors
from nano3.model.model import Nano3
from nano3.parallel.mesh import Mesh
from nano3.train.checkpoint import build
from nano3.train.gradients import Gradients
from nano3.train.optim import AdamW
from nano3.train.step import head_loss, training_step

BASE = "ME*"
CUTS = {"M": "MME*", "E": "MEE*", "*": "ME**"}
WHOLE = "MEMEM*EME"  # the first nine layers
LAYERS = Counter(NANO_PATTERN) | {"ends": 1}


def resolved(args: argparse.Namespace, *settings: str) -> Config:
    """Nano's settings on one device, then these, then --set."""
    base = ["--mode", "pretrain", "--preset", "nano-30b-a3b", "dataset=mock", f"train.device={args.device}"]
    base += ["parallel.tp=1", "parallel.ep=1", "parallel.pp=1"]
    return resolve(parser().parse_args([*base, *settings, *args.set]))[0]


def nano(args: argparse.Namespace) -> ModelConfig:
    """The geometry at full depth."""
    return resolved(args).model


class NoUpdate(Gradients):
    """Gradients are collected, and nothing is done with them."""

    def step(self, lr: float, fine: torch.Tensor) -> torch.Tensor:
        self.reduced_gradients()
        self.last_micro_batch = False
        return torch.zeros((), device=self.mesh.device)


class Cut:
    """A model of a few layers on random tokens."""

    def __init__(self, pattern: str, args: argparse.Namespace, update: bool = False) -> None:
        self.pattern, self.args = pattern, args
        self.mesh = Mesh(device=torch.device(args.device))
        self.load(1, args.seq_length, "none")
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.model: Nano3 = allocate(build(self.config.model, mesh=self.mesh), self.mesh.device, dtype)
        initialise(self.model, self.config.model, 0, device=self.mesh.device)
        self.gradients = AdamW(self.model, self.config.optimizer) if update else NoUpdate(self.model)

    def load(self, rows: int, length: int, recompute: str) -> None:
        """Micro-batches of so many rows of so many tokens from now on, recomputed as train.recompute says."""
        settings = [f"model.hybrid_override_pattern={self.pattern}", f"dataset.seq_length={length}"]
        settings += [f"train.micro_batch_size={rows}", f"train.global_batch_size={rows}"]
        self.config = resolved(self.args, *settings, f"train.recompute={recompute}")
        self.recompute = self.config.recompute
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.model.vocab_size, (self.args.micro_batches, rows, length + 1), generator=g)
        self.batches = [Batch(i[:, :-1], i[:, 1:]) for i in ids]
        if self.mesh.device.type == "cuda":
            self.batches = [b.pin_memory() for b in self.batches]

    def step(self, n: int) -> None:
        """A step of n micro-batches."""
        self.model.recompute = self.recompute
        training_step(self.model, self.gradients, self.batches[:n], self.config, self.mesh, 0.0, False)

    def one(self) -> None:
        self.step(1)

    def several(self) -> None:
        self.step(len(self.batches))

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

    def release(self) -> None:
        """Give the memory back.  The hooks on the parameters keep these alive, so they lose what they hold."""
        optimizer = [t for kinds in self.gradients.state().values() for t in kinds.values()] if self._updates else []
        for t in [*named_tensors(self.model).values(), *optimizer]:
            t.untyped_storage().resize_(0)

    @property
    def _updates(self) -> bool:
        return isinstance(self.gradients, AdamW)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free(cuts: Iterable[Cut] = ()) -> None:
    for cut in cuts:
        cut.release()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(call: Callable[[], object]) -> float:
    """Wall ms of one call, its launches and gaps and a synchronisation included."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1e3 * (time.perf_counter() - start)


def in_turns(calls: list[Callable[[], object]], warm_up: float, rounds: int) -> list[list[float]]:
    """Wall ms of each call in each of the rounds, after so many seconds of the same that are not counted."""
    end = time.monotonic() + warm_up
    for call in calls:  # twice: what the first calls compile is not what they cost
        call()
        call()
    while time.monotonic() < end:
        for call in calls:
            timed(call)
    found: list[list[float]] = [[] for _ in calls]
    for i in range(rounds):
        order = range(len(calls)) if i % 2 == 0 else reversed(range(len(calls)))
        for n in order:
            found[n].append(timed(calls[n]))
    return found


def steady(one: list[float], several: list[float], n: int) -> list[float]:
    """Round by round, what a micro-batch costs that is not the first of its step of n."""
    return [(b - a) / (n - 1) for a, b in zip(one, several, strict=True)]


def profiled(call: Callable[[], object], path: Path | None = None) -> dict[str, object]:
    """Kernels of one call: their number, the time in which one ran and in which none did, and the longest by name."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if path is None else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as recorded:
        call()
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


def measure(cuts: dict[str, Cut], rows: int, length: int, recompute: str, args: argparse.Namespace) -> dict[str, dict]:
    """Times of every cut, round by round; on a GPU also kernels and memory."""
    for cut in cuts.values():
        cut.load(rows, length, recompute)
    n = args.micro_batches
    times = in_turns([f for c in cuts.values() for f in (c.one, c.several)], args.warm_up, args.rounds)
    found = {}
    for pattern, one, several in zip(cuts, times[::2], times[1::2], strict=True):
        found[pattern] = {"first_ms": one, "ms": steady(one, several, n)}
    for pattern, cut in cuts.items() if args.device == "cuda" else ():
        one, several = profiled(cut.one), profiled(cut.several)
        found[pattern] |= {key: one[key] for key in ("kernels", "idle_ms")}
        found[pattern]["busy_ms"] = (several["busy_ms"] - one["busy_ms"]) / (n - 1)
        found[pattern]["kept_bytes"] = cut.kept()
        free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        cut.one()
        found[pattern]["step_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        found[pattern]["reserved"] = torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated()
        if args.profile:
            name = f"{pattern.replace('*', 'A')}-{rows}x{length}-{recompute}.json.gz"
            found[pattern]["top"] = profiled(cut.one, Path(args.profile) / name)["top"]
    return found


def parts(found: dict[str, dict], key: str) -> dict[str, list[float]]:
    """What a block of each kind, and the ends, are of a measured quantity: by round, or one number."""

    def numbers(pattern: str) -> list[float]:
        value = found[pattern][key]
        return value if isinstance(value, list) else [value]

    counts = [[*(pattern.count(x) for x in CUTS), 1] for pattern in found]
    solution = np.linalg.lstsq(np.array(counts, float), np.array([numbers(p) for p in found]), rcond=None)[0]
    return dict(zip([*CUTS, "ends"], solution.tolist(), strict=True))


def median(by_kind: dict[str, list[float]]) -> dict[str, float]:
    return {x: statistics.median(numbers) for x, numbers in by_kind.items()}


def spread(numbers: list[float]) -> float:
    """The distance between the quartiles."""
    if len(numbers) < 2:
        return 0.0
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return high - low

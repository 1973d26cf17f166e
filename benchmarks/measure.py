"""Timing shared by the kernel benchmarks: GPU time from CUDA events, cold L2, medians; a table and JSON records.

A benchmark module builds `Case`s (lazily, so that one case's tensors are gone before the next one's are made) and
gives them to `run_cases`, which checks ours first, refuses to time it when it is wrong, times ours and every peer, and
returns one record per case: {op, shape, dtype, ms, GB/s or TFLOP/s, floor, peer, gpu, torch, triton}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR_BANDWIDTH = 3.0e12  # bytes/s and FLOP/s (dense bf16) that an H100 SXM is measured to reach
FLOOR_COMPUTE = 798e12
_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far (H100: 50 MB)


@dataclass
class Case:
    """One operator in one direction at one shape.  `bytes`, `flops`: the least anyone moves and does."""

    op: str  # "rms_norm forward"
    shape: str  # "T=32768 D=2688"
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    bytes: float = 0.0
    flops: float = 0.0
    dtype: str = "bf16"
    check: Callable[[], object] | None = None  # raises AssertionError if `ours` is wrong
    aim: str = ""  # what it should reach, for the reader of the table


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def gpu_ms(fn: Callable[[], object], repetitions: int = 25, budget_s: float = 1.0) -> float:
    """Median GPU time of `fn` in ms, with the L2 cache flushed before each repetition.

    The GPU is kept busy (a spin kernel) while the host queues the work, so launches cost nothing unless `fn` waits for
    the GPU itself; what is left is the time the kernels take back to back.
    """
    flush = _flush_buffer()
    fn()  # compile, allocate
    torch.cuda.synchronize()
    host = []
    for _ in range(3):
        start = time.perf_counter()
        fn()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    queue_s = min(statistics.median(host), 0.02)
    cycles = int((1.5 * queue_s + 50e-6) * 2.0e9)  # about 2 GHz
    once = max(time.perf_counter() - start, 1e-5)
    repetitions = max(5, min(repetitions, int(budget_s / once)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for begin, end in events:
        flush.zero_()
        torch.cuda._sleep(cycles)
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def host_ms(fn: Callable[[], object], repetitions: int = 25) -> float:
    """Median wall time of `fn` in ms, launches and one synchronisation included."""
    fn()
    times = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """|got - truth| / |truth| in the Euclidean norm; infinity if `got` holds NaN or infinity."""
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got.double() - truth).norm() / truth.double().norm().clamp_min(1e-300)).item()


def peer_is_nearer(ours: float, peer: float) -> bool:
    """Whether a peer's error is below ours by more than 10 %, and by more than 1e-6.

    Less is the luck of a sum's order: both kernels sum in fp32, and a vector of a few numbers hits or misses.
    """
    return not ours <= 1.1 * peer + 1e-6


class Errors(NamedTuple):
    """Of one output or gradient against float64."""

    ours: float
    eager: float  # PyTorch in the same dtype
    rounded: float  # of the truth itself, rounded once to that dtype
    peer: float | None


Tensors = dict[str, Tensor]


def errors(draws: Iterable[tuple[Tensors, Tensors, Tensors, Tensors | None]], dtype: torch.dtype) -> dict[str, Errors]:
    """Means over draws of ours, eager, truth and a peer's (or None) by name: luck in one draw is less in four.

    The draws are consumed one by one; of their tensors nothing is kept.
    """
    found: dict[str, list[Errors]] = {}
    for ours, eager, truth, peer in draws:
        for name, t in truth.items():
            contenders = (ours[name], eager[name], t.to(dtype), None if peer is None else peer[name])
            e = Errors(*(None if x is None else relative_error(x, t) for x in contenders))
            found.setdefault(name, []).append(e)
    mean = {}
    for name, each in found.items():
        mean[name] = Errors(
            *(None if None in column else statistics.fmean(column) for column in zip(*each, strict=True))
        )
    return mean


def judge(found: dict[str, Errors], limit: Callable[[Errors], float]) -> tuple[bool, str]:
    """Whether ours is within `limit` everywhere and no peer nearer; and the errors, ours / eager / the peer's."""
    right, words = True, []
    for name, e in found.items():
        wrong = not e.ours <= limit(e)
        nearer = e.peer is not None and peer_is_nearer(e.ours, e.peer)
        numbers = "/".join(f"{x:.1e}" for x in (e.ours, e.eager, e.peer) if x is not None)
        words.append(f"{name} {numbers}" + " (WRONG)" * wrong + " (the peer is NEARER)" * nearer)
        right = right and not wrong and not nearer
    return right, ", ".join(words)


def run_checks(check: Callable[..., tuple[bool, str]], cases: list[dict], processes: int = 12) -> bool:
    """check(**case) for each of the cases; prints each text when it is there, returns whether all were right.

    Several processes at a time: kernels are compiled for every shape and dtype, which takes one core seconds, and then
    run for microseconds.  `check` is a module's function; a case that raises is wrong.
    """
    right, start = True, time.perf_counter()
    processes = max(1, min(processes, len(cases), (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _exact) as pool:
        running = {pool.submit(check, **case): case for case in cases}
        for done in as_completed(running):
            try:
                good, text = done.result()
            except Exception as error:
                good, text = False, f"{running[done]}: {type(error).__name__}: {str(error)[:500]}"
            right = right and good
            print("ok   " if good else "WRONG", text, flush=True)
    print(f"{len(cases)} cases in {time.perf_counter() - start:.0f} s", flush=True)
    return right


def _exact() -> None:
    """What a process of `run_checks` begins with: fp32 products in fp32, and no search for a peer's best tiles."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)


def smallest_tiles() -> None:
    """Every kernel of mamba-ssm's modules that are imported so far keeps the smallest of its tiles.

    For checks: otherwise each is compiled and timed with up to a dozen tiles for every shape, which takes minutes.  A
    tile changes the order of sums, not what is rounded.
    """
    from triton.runtime.autotuner import Autotuner, Heuristics

    for name in [name for name in sys.modules if name.startswith("mamba_ssm.")]:
        for kernel in vars(sys.modules[name]).values():
            while isinstance(kernel, Heuristics):
                kernel = kernel.fn
            if isinstance(kernel, Autotuner):
                kernel.configs = [min(kernel.configs, key=lambda c: math.prod(c.kwargs.values()))]


@cache
def mamba(module: str) -> types.ModuleType | None:
    """mamba_ssm.<module>, installed or from the source folder named by $MAMBA_SSM; None where there is neither.

    The package's own __init__ is not run: it imports compiled extensions that its Triton files do not need.
    """
    try:
        if "mamba_ssm" not in sys.modules:
            spec = importlib.util.find_spec("mamba_ssm")
            folder = os.environ.get("MAMBA_SSM") or (spec and spec.submodule_search_locations[0])
            if not folder:
                return None
            package = types.ModuleType("mamba_ssm")
            package.__path__ = [folder]
            sys.modules["mamba_ssm"] = package
        return importlib.import_module(f"mamba_ssm.{module}")
    except ImportError:
        return None


@cache
def copy_bandwidth() -> float:
    """Bytes per second that a large device-to-device copy reaches here (read and write counted)."""
    source = torch.randn(1 << 28, device="cuda")  # 1 GiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / (gpu_ms(lambda: target.copy_(source)) * 1e-3)


@cache
def environment() -> dict[str, str]:
    import triton

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git.stdout.strip(),
    }


def _time(fn: Callable[[], object]) -> tuple[float | None, str]:
    try:
        return gpu_ms(fn), ""
    except Exception as error:  # a peer that cannot run here is a note in the record, not the end of the benchmark
        torch.cuda.empty_cache()
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def run_case(case: Case) -> dict:
    """Check, time, and return the record of one case.  A wrong kernel is reported and not timed."""
    floor = max(case.bytes / FLOOR_BANDWIDTH, case.flops / FLOOR_COMPUTE) * 1e3
    record = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "floor_ms": floor,
        "aim": case.aim,
    } | environment()
    note = ""
    if case.check is not None:
        try:
            case.check()
        except AssertionError as error:
            note = f"WRONG, not timed: {error}"
    if not note:
        record["ms"], note = _time(case.ours)
    if record.get("ms"):
        seconds = record["ms"] * 1e-3
        if case.bytes / FLOOR_BANDWIDTH >= case.flops / FLOOR_COMPUTE:
            record["GB/s"] = case.bytes / seconds / 1e9
            record["of_copy"] = case.bytes / seconds / copy_bandwidth()
        else:
            record["TFLOP/s"] = case.flops / seconds / 1e12
    times = {name: _time(fn) for name, fn in case.peers.items()}
    record["peers_ms"] = {name: ms for name, (ms, _) in times.items() if ms is not None}
    notes = [note] * bool(note) + [f"{name}: {why}" for name, (ms, why) in times.items() if ms is None]
    if notes:
        record["note"] = "; ".join(notes)
    if record["peers_ms"]:
        record["peer"] = min(record["peers_ms"], key=record["peers_ms"].get)
        record["peer_ms"] = record["peers_ms"][record["peer"]]
    return record


def run_cases(cases: Iterable[Case]) -> list[dict]:
    """The record of each case, in order.  `cases` may be a generator: each case is dropped before the next is built."""
    records = []
    iterator = iter(cases)
    while (case := next(iterator, None)) is not None:
        records.append(run_case(case))
        del case
        torch.cuda.empty_cache()
    return records


def _cells(r: dict) -> list[str]:
    ms, peer = r.get("ms"), r.get("peer_ms")
    if "GB/s" in r:
        rate = f"{r['GB/s']:,.0f} GB/s ({r['of_copy']:.0%} of copy)"
    elif "TFLOP/s" in r:
        rate = f"{r['TFLOP/s']:,.0f} TFLOP/s"
    else:
        rate = "-"
    return [
        r["op"],
        r["shape"],
        r["dtype"],
        "-" if ms is None else f"{ms:.3f}",
        rate,
        f"{r['floor_ms']:.3f}",
        "-" if peer is None else f"{r['peer']} {peer:.3f}",
        "-" if None in (peer, ms) else f"{peer / ms:.2f}x",
        r.get("aim", ""),
    ]


HEADINGS = ["operator", "shape", "dtype", "ours ms", "rate", "floor ms", "best peer ms", "speed-up", "aim"]


def print_table(records: list[dict], title: str = "") -> None:
    """A table of records: with rich where it is installed, plain text otherwise.  Notes follow it."""
    rows = [_cells(r) for r in records]
    try:
        from rich.console import Console
        from rich.table import Table

        table = Table(*HEADINGS, title=title)
        for row in rows:
            table.add_row(*row)
        console = Console()
        Console(width=max(console.width, 170)).print(table)
    except ImportError:
        widths = [max(len(row[i]) for row in [HEADINGS, *rows]) for i in range(len(HEADINGS))]
        print(title)
        for row in [HEADINGS, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    for r in records:
        others = {k: v for k, v in r.get("peers_ms", {}).items() if k != r.get("peer")}
        if others:
            print(f"{r['op']} {r['shape']}: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in others.items()))
        if "note" in r:
            print(f"{r['op']} {r['shape']}: {r['note']}")


def print_json(records: list[dict]) -> None:
    """One line of JSON, the last on stdout: what a README number is quoted from."""
    print(json.dumps([{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in records]))

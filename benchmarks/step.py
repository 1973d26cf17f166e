"""A training step at Nano's width on one GPU: what each kind of block costs, and what 52 layers would.

    python -m benchmarks.step [--rows 1 2 4] [--recompute none [moe]] [--peer] [--profile FOLDER] [--out JSON]
    python -m benchmarks.step --lengths 2048 8192 32768

Cuts of the model are trained on random tokens: `ME*`, the same with one block more of a kind, and `MEMEM*EME`.  A GPU's
clock drifts by more than a block costs, so all cuts are there at once and are measured in turns, a step of one
micro-batch and one of several of each in every round, every other round backwards.  In each round, what a block of each
kind and the ends (embedding, head and loss) cost is what explains the cuts best, by least squares; given are medians
over the rounds, and as spread the distance between the quartiles.

A micro-batch is a forward and a backward pass with its gradients added to the sums; the first of a step, which stores
them instead and has the step's launches to itself, is listed beside.  `busy` is the time in which the GPU ran a kernel,
by the profiler, in the same way.  Tokens/s of the full depth = tokens / (23 M + 23 E + 6 * + ends).  `MEMEM*EME` is
compared with the sum of its parts.

--peer: transformers' models of the same cuts right after (of the first of --rows), warmed up alike, with grouped
products, mamba-ssm's Triton kernels if $MAMBA_SSM names their folder, and our convolution (theirs has to be compiled).
--lengths: instead, the time of a token by the length of its sequence, the tokens of a micro-batch being as many; then,
of `MEMEM*EME` with every block computed again, twice the longest of them, and twice that, until the GPU is full.
--profile: a Chrome trace of a micro-batch of each cut, and a table of the kernels of MEE*.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

import torch

from benchmarks.cuts import (
    BASE,
    CUTS,
    LAYERS,
    WHOLE,
    Cut,
    free,
    in_turns,
    measure,
    median,
    nano,
    parts,
    spread,
)
from benchmarks.measure import environment, gpu_ms
from benchmarks.step_lengths import by_length, longest
from benchmarks.step_peer import peer_ms
from nano3.train.plan import parameters, training_flops

NAMES = {"M": "Mamba-2", "E": "mixture", "*": "attention", "ends": "embedding, head, loss"}


def report(found: dict[str, dict], rows: int, recompute: str, peak: float, args: argparse.Namespace) -> dict:
    """Print one table and the sum over all layers of Nano.  Returns the record."""
    tokens = rows * args.seq_length
    flops = training_flops(nano(args), args.seq_length)
    layers = Counter(nano(args).hybrid_override_pattern)
    per_block = {x: flops[x] / layers[x] * tokens for x in CUTS} | {"ends": flops["head"] * tokens}
    rounds = parts(found, "ms")
    ms, first = median(rounds), median(parts(found, "first_ms"))
    nothing = dict.fromkeys(ms, 0.0)
    busy, kept, launched = (
        median(parts(found, key)) if key in found[BASE] else nothing for key in ("busy_ms", "kept_bytes", "kernels")
    )
    print(f"\n{rows} x {args.seq_length} tokens, recompute {recompute}, {args.rounds} rounds")
    print(f"{'':22}   ms spread  busy  first layers     ms TFLOP % peak KiB/token kernels")
    for x, n in LAYERS.items():
        rate = per_block[x] / ms[x] / 1e9 / peak if peak else 0.0
        print(
            f"{NAMES[x]:22}{ms[x]:5.2f}{spread(rounds[x]):7.2f}{busy[x]:6.2f}{first[x]:7.2f}{n:7}{n * ms[x]:7.1f}"
            f"{per_block[x] / 1e12:6.2f}{rate:7.1%}{kept[x] / tokens / 1024:10.1f}{launched[x]:8.0f}"
        )
    sums = [sum(n * rounds[x][i] for x, n in LAYERS.items()) for i in range(args.rounds)]
    whole = statistics.median(sums)
    whole_first, whole_busy = (sum(n * d[x] for x, n in LAYERS.items()) for d in (first, busy))
    rate = sum(n * per_block[x] for x, n in LAYERS.items()) / whole / 1e9
    record = {
        "rows": rows,
        "recompute": recompute,
        "block_ms": ms,
        "block_spread_ms": {x: spread(numbers) for x, numbers in rounds.items()},
        "block_busy_ms": busy,
        "block_first_ms": first,
        "full_ms": whole,
        "full_spread_ms": spread(sums),
        "full_busy_ms": whole_busy,
        "tokens_per_second": 1e3 * tokens / whole,
        "first_tokens_per_second": 1e3 * tokens / whole_first,
        "tflops": rate,
        "of_gemm_peak": rate / peak if peak else 0.0,
        "cuts": found,
    }
    print(
        f"52 layers: {whole:.1f} ms (spread {spread(sums):.1f}, busy {whole_busy:.1f}), "
        f"{record['tokens_per_second']:,.0f} tokens/s ({record['first_tokens_per_second']:,.0f} in a step of one "
        f"micro-batch), {rate:.0f} TFLOP/s, {record['of_gemm_peak']:.1%} of the GEMM peak"
    )
    for pattern, c in found.items() if args.device == "cuda" else ():
        print(
            f"  {pattern:9} {statistics.median(c['first_ms']):6.1f} ms, then {statistics.median(c['ms']):6.1f}: "
            f"{c['kernels']} kernels, busy {c['busy_ms']:.1f} ms, idle in the first {c['idle_ms']:.1f} ms; a step "
            f"needs {c['step_gib']:.1f} GiB, reserved / allocated {c['reserved']:.2f}"
        )
    if WHOLE in found:
        record["check"] = check(found, rounds)
    return record


def check(found: dict[str, dict], rounds: dict[str, list[float]]) -> dict[str, float]:
    """Print and return the time of `MEMEM*EME` and the sum of its parts, of the same rounds."""
    counts = Counter(WHOLE) | {"ends": 1}
    sums = [sum(n * rounds[x][i] for x, n in counts.items()) for i in range(len(rounds["ends"]))]
    measured, summed = statistics.median(found[WHOLE]["ms"]), statistics.median(sums)
    print(f"{WHOLE} measured: {measured:.1f} ms; the sum of its parts: {summed:.1f} ms, {summed / measured - 1:+.1%}")
    return {"measured_ms": measured, "summed_ms": summed}


def optimizer_ms(args: argparse.Namespace) -> dict[str, float]:
    """AdamW with fp32 masters on `ME*`, carried to Nano sharded over 8 ranks by the number of parameters."""
    cuts = [Cut(BASE, args, update) for update in (True, False)]
    here = sum(p.numel() for p in cuts[0].model.parameters())
    with_update, without = in_turns([c.one for c in cuts], args.warm_up / 2, args.rounds)
    free(cuts)
    ms = statistics.median(a - b for a, b in zip(with_update, without, strict=True))
    carried = ms * parameters(nano(args)).total / 8 / here
    print(f"AdamW: {ms:.1f} ms for {here / 1e9:.2f} G parameters; {carried:.1f} ms for a rank of 8 that share Nano")
    return {"ms": ms, "parameters": here, "nano_over_8_ms": carried}


def options() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", default=[1], help="sequences of a micro-batch")
    p.add_argument("--recompute", nargs="+", default=["none"], help="as train.recompute")
    p.add_argument("--seq-length", type=int, default=8192)
    p.add_argument("--lengths", type=int, nargs="+", default=[], help="times by sequence length instead")
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--micro-batches", type=int, default=4, help="of the longer step of a round")
    p.add_argument("--warm-up", type=float, default=4.0, help="seconds of steps that are not counted")
    p.add_argument("--peer", action="store_true", help="transformers' model too")
    p.add_argument("--no-optimizer", action="store_true", help="leave AdamW out")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings as of train.py")
    p.add_argument("--profile", default="", metavar="FOLDER")
    p.add_argument("--device", default="cuda")
    p.add_argument("--out", default="", metavar="JSON")
    return p


def main() -> None:
    p = options()
    args = p.parse_args()
    if any(max(args.lengths) % n for n in args.lengths):
        p.error(f"--lengths {args.lengths}: the longest has to be a multiple of each")
    if args.micro_batches < 2 or args.rounds < 1:
        p.error("--micro-batches has to be 2 or more, --rounds 1 or more")
    torch.backends.cuda.matmul.allow_tf32 = False
    records: list[dict] = []
    peak = 0.0
    if args.device == "cuda":
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        peak = 2 * 8192**3 / gpu_ms(lambda: a @ b) / 1e9
        del a, b
        print(f"{environment()}, GEMM peak {peak:.0f} TFLOP/s (8192^3, bf16, random numbers)")
    everything = (BASE, *CUTS.values(), WHOLE)
    cuts = {pattern: Cut(pattern, args) for pattern in everything}
    if args.lengths:
        records += by_length(cuts, args)
        free(cuts.values())
        cuts = {}
        records += longest(args) if args.device == "cuda" else []
    else:
        for rows in args.rows:
            for recompute in args.recompute:
                found = measure(cuts, rows, args.seq_length, recompute, args)
                records.append(report(found, rows, recompute, peak, args))
                for name, ms, n in found[CUTS["E"]].get("top", []):
                    print(f"  {ms:8.3f} ms {n:5} x  {name[:100]}")
    free(cuts.values())
    if args.peer and not args.lengths:
        records.append(peer(records[0], args))
    if not args.no_optimizer and not args.lengths:
        records.append({"optimizer": optimizer_ms(args)})
    if args.out:
        Path(args.out).write_text(json.dumps([*records, environment() if args.device == "cuda" else {}], indent=1))


def peer(ours: dict, args: argparse.Namespace) -> dict[str, object]:
    """transformers' models of the same cuts beside ours, whose record this is."""
    found, how = peer_ms([WHOLE], args)
    free()
    record: dict[str, object] = {"peer": how}
    print(f"\npeer: {how}")
    if found is None:
        return record
    here, there = ours["check"]["measured_ms"], statistics.median(found[WHOLE]["ms"])
    print(f"{WHOLE}, {args.rows[0]} x {args.seq_length}: ours {here:.1f} ms, peer {there:.1f} ms, {there / here:.2f} x")
    record |= {"cut": WHOLE, "ours_ms": here, "peer_ms": there}
    others, how = peer_ms([BASE, *CUTS.values()], args)
    free()
    if others is None:
        print(f"its blocks: {how}")
        return record
    ms = median(parts(found | others, "ms"))
    for x in LAYERS:
        mine = ours["block_ms"][x]
        print(f"{NAMES[x]:22} ours {mine:6.2f} ms, peer {ms[x]:6.2f} ms, {ms[x] / mine:.2f} x")
    whole = sum(n * ms[x] for x, n in LAYERS.items())
    rate = 1e3 * args.rows[0] * args.seq_length / whole
    print(
        f"52 layers: ours {ours['tokens_per_second']:,.0f} tokens/s, peer {rate:,.0f} ({whole:.1f} ms), "
        f"{whole / ours['full_ms']:.2f} x"
    )
    return record | {"peer_block_ms": ms, "peer_full_ms": whole, "peer_tokens_per_second": rate}


if __name__ == "__main__":
    main()

"""The training step by the length of its sequences: the tables of `benchmarks.step --lengths`."""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.cuts import LAYERS, WHOLE, Cut, free, measure, median, parts, timed


def by_length(cuts: dict[str, Cut], args: argparse.Namespace) -> list[dict]:
    """The table of --lengths: microseconds of a token in all layers of each kind."""
    tokens, table = max(args.lengths), []
    for length in sorted(args.lengths):
        found = measure(cuts, tokens // length, length, "none", args)
        us = {x: LAYERS[x] * 1e3 / tokens * d for x, d in median(parts(found, "ms")).items()}
        record = {"length": length, "rows": tokens // length, "us_per_token": us, "total": sum(us.values())}
        record["without_attention"] = record["total"] - us["*"]
        table.append(record)
        free()
    print(f"\nus per token of 52 layers, micro-batches of {tokens} tokens, {args.rounds} rounds")
    print(f"{'length':>8}{'rows':>5}{'Mamba-2':>9}{'mixture':>9}{'attention':>11}{'ends':>7}{'total':>8}", end="")
    print(f"{'less attention growth':>23}{'tokens/s':>10}")
    for r in table:
        us, first = r["us_per_token"], table[0]
        rest = r["total"] - us["*"] + first["us_per_token"]["*"]
        r["against_shortest"] = rest / first["total"] - 1
        print(
            f"{r['length']:8}{r['rows']:5}{us['M']:9.2f}{us['E']:9.2f}{us['*']:11.2f}{us['ends']:7.2f}"
            f"{r['total']:8.2f}{rest:14.2f} ({r['against_shortest']:+6.1%}){1e6 / r['total']:10,.0f}"
        )
    return table


def longest(args: argparse.Namespace) -> list[dict]:
    """One sequence of MEMEM*EME, every block computed again: the length doubles until it does not fit."""
    cut, table, length = Cut(WHOLE, args), [], max(args.lengths)
    weights = torch.cuda.memory_allocated() / 2**30
    print(f"\n{WHOLE}, one sequence, recompute full; weights {weights:.1f} GiB, and twice that of gradient sums")
    while True:
        free()
        torch.cuda.reset_peak_memory_stats()
        try:
            cut.load(1, length, "full")
            cut.one()
            ms = statistics.median(timed(cut.one) for _ in range(2))
        except torch.OutOfMemoryError:
            print(f"{length:8} does not fit")
            break
        peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        table.append({"longest": length, "ms": ms, "us_per_token": 1e3 * ms / length, "gib": peak})
        print(f"{length:8}{ms:9.0f} ms{1e3 * ms / length:8.2f} us per token{peak:8.1f} GiB, {reserved:.1f} reserved")
        length *= 2
    free([cut])
    return table

"""train.recompute=auto: of the sets of kinds of block that leave a step enough memory, the cheapest to recompute.

Recomputing a kind saves what its blocks keep beyond their inputs (`memory.py`) and costs another forward pass of each.
There are at most four kinds, so every set is tried; where none fits, all are taken, and `check_fits` refuses the run.
A forward pass takes

    FLOPs / RATE + 2 bytes kept / BANDWIDTH,

its products at the rate that they reach, and what it keeps written and read once.  Only the order of the kinds and
their rough proportions matter; both rates are what an H100 shows in Nano's blocks, and other GPUs are alike in their
ratio.  On a CPU nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

from nano3.config import KINDS, Config
from nano3.parallel.layout import Layout
from nano3.train.flops import training_flops
from nano3.train.memory import activation_bytes

RATE = 650e12  # FLOP/s
BANDWIDTH = 2.8e12  # bytes/s


def forward_seconds(config: Config, layout: Layout, bf16: bool) -> dict[str, float]:
    """Kind -> seconds that the forward passes of all its blocks take for a token, on a GPU, split over tp."""
    c, S = config.model, config.dataset.seq_length
    trained, frozen = training_flops(c, S), training_flops(c, S, frozen=True)
    out = {}
    for letter, kind in KINDS.items():
        if blocks := c.hybrid_override_pattern.count(letter):
            weights = trained[letter] - frozen[letter]  # one product with each matrix
            core = (trained[letter] - 3 * weights) / (3.5 if letter == "*" else 3)
            kept = blocks * activation_bytes(c, letter, S, layout.tp, layout.ep, 2 if bf16 else 4, gpu=True)
            out[kind] = (weights + core) / layout.tp / RATE + 2 * kept / BANDWIDTH
    return out


def choose(config: Config, layout: Layout, bf16: bool, fits: Callable[[Config], bool]) -> Config:
    """The configuration with the cheapest set of kinds that fits, or all kinds."""
    seconds = forward_seconds(config, layout, bf16)
    sets = [kinds for n in range(len(seconds) + 1) for kinds in combinations(seconds, n)]
    for kinds in sorted(sets, key=lambda kinds: sum(seconds[k] for k in kinds)):
        chosen = replace(config, train=replace(config.train, recompute=list(kinds) or "none"))
        if fits(chosen):
            break
    return chosen

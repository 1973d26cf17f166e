"""Tiles of the grouped products by hardware and alignment, and tensor descriptors where TMA can read an operand."""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._common import INTERPRET, free_sms
from kernels._descriptors import descriptor


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_sm: int = 1  # resident programs per multiprocessor
    flatten: bool = True  # one loop over (tile, k): the next tile's loads start during this tile's epilogue
    extra_n: int = 0  # a tile is block_n + extra_n wide: 256 + 128 = 384 divides 2688, and Triton wants powers of two
    # (with `store`: as wide as the parts in which the rest is stored)
    copy: bool = False  # rows that would be gathered are copied into expert order first, and then read by TMA
    store: bool = False  # the result goes out by TMA, which runs beside the next tile's products
    split: int = 1  # 2: the epilogue takes the tile's columns in two halves, with half the registers and shared memory
    # (4: in quarters, which only the weight gradients can)


def _same(config: Config) -> dict[str, Config]:
    return dict.fromkeys(("up", "down", "dH", "dX", "dup", "ddown"), config)


# The best of 16 to 17 configurations of each product on an H100 (benchmarks/kernels_moe.py --sweep).  Tiles of 256
# columns waste 5 % of 2688 and 10 % of 1856, tiles of 192 none and 3 %; the wider ones win where they do not spill.
# What is gathered should be the narrow side of a tile: gathering costs some 17 ns per KiB that a multiprocessor reads.
HOPPER_GATHER = {
    "up": Config(128, 256, 64, 8, 4),
    "down": Config(128, 256, 64, 8, 4),
    "dH": Config(128, 128, 64, 8, 4, flatten=False, extra_n=64),
    "dX": Config(128, 256, 64, 8, 4),
    "dup": Config(256, 128, 64, 8, 5),
    "ddown": Config(128, 256, 64, 8, 5),
}
# Nothing gathered: x is copied once in each direction and dy once, then every operand and result goes by TMA.  dH has
# a stage less because its epilogue needs shared memory for hs.
_ALL_TMA = Config(128, 256, 64, 8, 4, copy=True, store=True, split=2)
HOPPER_NARROW = _same(_ALL_TMA) | {"dH": _ALL_TMA._replace(stages=3)}
# 384 columns divide 2688 and waste 3 % of 1856.  There is no room for a thin operand beside them.
HOPPER_COPY = HOPPER_NARROW | dict.fromkeys(("up", "dH", "dX"), _ALL_TMA._replace(stages=3, flatten=False, extra_n=128))
HOPPER = HOPPER_COPY
BLACKWELL = HOPPER_GATHER | {"dH": Config(128, 128, 64, 8, 3)}  # the epilogue of the wider tile spills there
SMALL_SHARED = _same(Config(128, 128, 32, 8, 3, flatten=False))  # sm_80, sm_120: no TMA or 99 KiB
UNALIGNED = _same(Config(64, 64, 32, 8, 2, flatten=False))  # element by element: correct, and rarely wanted
FULL_PRECISION = _same(Config(64, 64, 16, 4, 2, flatten=False))  # fp32: multiply-adds outside the tensor cores
# Under the interpreter: small tiles, so that tiny shapes have several.
INTERPRETED_GATHER = _same(Config(16, 32, 16, 4, 1, extra_n=16))
INTERPRETED_COPY = _same(Config(16, 32, 16, 4, 1, copy=True, store=True, split=2))
INTERPRETED_COPY |= {name: INTERPRETED_COPY[name]._replace(extra_n=16) for name in ("up", "dH", "dX")}
INTERPRETED = INTERPRETED_GATHER


def choose_configs(x: Tensor, up: Tensor, down: Tensor, thin: bool = False) -> dict[str, Config]:
    """The tiles of all six products.  Those of the row products have the same height, so one tile table serves them.

    thin: low-rank operands take part.
    """
    if INTERPRET:
        return INTERPRETED
    if x.element_size() == 4:
        return FULL_PRECISION
    if not all(aligned(t) for t in (x, up, down)):
        return UNALIGNED
    major = torch.cuda.get_device_capability(x.device)[0]
    chosen = {9: HOPPER, 10: BLACKWELL}.get(major, SMALL_SHARED)
    return HOPPER_NARROW if thin and chosen is HOPPER_COPY else chosen


def aligned(x: Tensor) -> bool:
    """16-byte base and row stride, not 0: what TMA asks for, and what 16-byte copies need."""
    stride = x.stride(-2) * x.element_size()
    return x.data_ptr() % 16 == 0 and stride > 0 and stride % 16 == 0


def tma_reads(x: Tensor) -> bool:
    """Whether products read x through tensor descriptors.

    Not fp32 on a GPU: the products outside the tensor cores spill when they read what TMA lays out.
    """
    able = INTERPRET or (x.element_size() < 4 and torch.cuda.get_device_capability(x.device)[0] in (9, 10))
    return able and aligned(x)


def describe(x: Tensor, rows: int, cols: int) -> TensorDescriptor | None:
    """A descriptor of the matrices of contiguous x (.., rows, cols) stacked into one; None where TMA cannot read it."""
    if not cols or not tma_reads(x):
        return None
    return descriptor(x.view(-1, x.shape[-1]), [rows, cols])


def describe_matrices(x: Tensor, rows: int, cols: int) -> TensorDescriptor | None:
    """A descriptor of x (E, M, N) that stores blocks (1, rows, cols) and stops at each matrix's edges."""
    return descriptor(x, [1, rows, cols]) if tma_reads(x) else None


def resident_programs(x: Tensor, per_sm: int) -> int:
    """As many as run at once.  3 under the interpreter: enough that a program has several tiles."""
    return 3 if INTERPRET else per_sm * free_sms(x.device)

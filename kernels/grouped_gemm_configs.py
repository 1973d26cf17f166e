"""Tiles of the grouped products by hardware and alignment, and tensor descriptors where TMA can read an operand."""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._common import INTERPRET


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_sm: int = 1  # resident programs per multiprocessor
    flatten: bool = True  # one loop over (tile, k): the next tile's loads start during this tile's epilogue
    extra_n: int = 0  # a tile is block_n + extra_n wide: 128 + 64 = 192 divides 2688, and Triton wants powers of two


def _same(rows: Config, weights: Config | None = None) -> dict[str, Config]:
    weights = weights or rows
    return {"up": rows, "down": rows, "dH": rows, "dX": rows, "dup": weights, "ddown": weights}


# The best of 16 to 17 configurations of each product on an H100 (benchmarks/kernels_moe.py --sweep).  Tiles of 256
# columns waste 5 % of 2688 and 10 % of 1856, tiles of 192 none and 3 %; the wider ones win where they do not spill.
HOPPER = {
    "up": Config(128, 256, 64, 8, 4),
    "down": Config(128, 256, 64, 8, 4),
    "dH": Config(128, 128, 64, 8, 4, flatten=False, extra_n=64),
    "dX": Config(128, 256, 64, 8, 4),
    "dup": Config(256, 128, 64, 8, 5),
    "ddown": Config(256, 128, 64, 8, 5),
}
BLACKWELL = HOPPER | {"dH": Config(128, 128, 64, 8, 3)}  # the epilogue of the wider tile spills there
SMALL_SHARED = _same(Config(128, 128, 32, 8, 3, flatten=False))  # sm_80, sm_120: no TMA or 99 KiB
UNALIGNED = _same(Config(64, 64, 32, 8, 2, flatten=False))  # element by element: correct, and rarely wanted
FULL_PRECISION = _same(Config(64, 64, 16, 4, 2, flatten=False))  # fp32: multiply-adds outside the tensor cores
INTERPRETED = _same(Config(16, 32, 16, 4, 1, extra_n=16))  # small tiles, so that tiny shapes have several


def choose_configs(x: Tensor, up: Tensor, down: Tensor) -> dict[str, Config]:
    """The tiles of all six products.  Those of the row products have the same height, so one tile table serves them."""
    if INTERPRET:
        return INTERPRETED
    if x.element_size() == 4:
        return FULL_PRECISION
    if not all(aligned(t) for t in (x, up, down)):
        return UNALIGNED
    major = torch.cuda.get_device_capability(x.device)[0]
    return {9: HOPPER, 10: BLACKWELL}.get(major, SMALL_SHARED)


def aligned(x: Tensor) -> bool:
    """16-byte base and row stride: what TMA asks for, and what 16-byte copies need."""
    return x.data_ptr() % 16 == 0 and x.stride(-2) * x.element_size() % 16 == 0


def describe(x: Tensor, rows: int, cols: int) -> TensorDescriptor | None:
    """A descriptor of the matrices of contiguous x (.., rows, cols) stacked into one; None where TMA cannot read it.

    None also for fp32 on a GPU: the products outside the tensor cores spill when they read what TMA lays out.
    """
    able = INTERPRET or (x.element_size() < 4 and torch.cuda.get_device_capability(x.device)[0] in (9, 10))
    if not able or not cols or not aligned(x):
        return None
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, cols])


def resident_programs(x: Tensor, per_sm: int) -> int:
    """As many as run at once.  3 under the interpreter: enough that a program has several tiles."""
    return 3 if INTERPRET else per_sm * torch.cuda.get_device_properties(x.device).multi_processor_count

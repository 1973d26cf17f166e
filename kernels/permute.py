"""Bringing the rows of one expert together without sorting, without atomics and without asking the host.

A choice is a pair (token, k), numbered i = t * K + k.  Its row in expert order is

    place_i = offset_e + (choices of e in earlier blocks) + (choices of e before i in its own block),   e = experts_i,

so a histogram per block of choices and one more pass are enough, and the order is stable: equal inputs, equal bits.
The second pass also writes the tile table that the grouped products walk: tile t belongs to expert tile_expert[t], and
the tiles of expert e are tile_start[e] .. tile_start[e + 1].  Nothing here is read back, so CUDA graphs can record it.

A choice whose id is E is absent: some other rank computes it.  It gets the place -1 and no row.

Suffixes: T tokens, K chosen, R rows (T * K less the absent choices), E experts, D width; E1 is E + 1.  Everything is
int32: T * K < 2^31.  With expert parallelism the numbers of tokens and rows differ from call to call, so no kernel is
specialised for them (Triton would compile another for multiples of 16).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import INTERPRET

# Under the interpreter the blocks are small, so that tiny inputs still span several of them.
CHOICES = 64 if INTERPRET else 1024  # per program
MAX_BLOCKS = 256  # every program reads the whole (blocks, E) histogram, so blocks grow before they multiply
ROW_BLOCK = 64 if INTERPRET else 1024  # columns that _sum_rows_kernel holds at once: 16 bytes a thread


class Tiles(NamedTuple):
    """Where each expert's rows are, and the row tiles that cover them."""

    offsets_E1: Tensor  # rows of expert e: offsets[e] .. offsets[e + 1]
    tile_start_E1: Tensor
    tile_expert: Tensor  # one entry per tile up to a bound known on the host; the first tile_start[E] mean something
    block: int  # rows per tile


class Plan(NamedTuple):
    order_R: Tensor  # the choice i that fills each row
    place_TK: Tensor  # its inverse: the row of each choice, -1 for an absent one
    tiles: Tiles


def plan_reference(experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """order (R,): the flat (token, choice) index of each row in expert order, stable; place (T, K): its inverse."""
    order = experts_TK.flatten().argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return order, place.view_as(experts_TK)


@triton.jit(do_not_specialize=["choices", "BLOCK"])
def _histogram_kernel(experts_ptr, hist_ptr, choices, BLOCK, E: tl.constexpr, E_PAD: tl.constexpr, SUB: tl.constexpr):
    """One program: how many of BLOCK consecutive choices each expert got.  experts (choices,), hist (blocks, E)."""
    b = tl.program_id(0)
    cols = tl.arange(0, E_PAD)
    counts = tl.zeros([E_PAD], tl.int32)
    for s in range(0, BLOCK, SUB):
        i = b * BLOCK + s + tl.arange(0, SUB)
        e = tl.load(experts_ptr + i, mask=i < choices, other=-1).to(tl.int32)
        counts += tl.sum((e[:, None] == cols[None, :]).to(tl.int32), 0)
    tl.store(hist_ptr + b * E + cols, counts, mask=cols < E)


@triton.jit
def _write_tables(
    counts, offsets_ptr, start_ptr, tile_expert_ptr, max_tiles,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Offsets and tile tables from counts [E_PAD], 0 past E.  Program 0 writes the short ones, all the long one."""
    cols = tl.arange(0, E_PAD)
    ends = tl.cumsum(counts, 0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + cols, ends - counts, mask=cols < E)
        tl.store(offsets_ptr + E, tl.sum(counts, 0))
        tl.store(start_ptr + cols, tile_ends - tiles, mask=cols < E)
        tl.store(start_ptr + E, tl.sum(tiles, 0))
    for c in range(tl.program_id(0) * CHUNK, max_tiles, tl.num_programs(0) * CHUNK):
        t = c + tl.arange(0, CHUNK)
        e = tl.sum((tile_ends[None, :] <= t[:, None]).to(tl.int32), 1)  # the experts whose tiles all lie before t
        tl.store(tile_expert_ptr + t, tl.minimum(e, E - 1), mask=t < max_tiles)


@triton.jit(do_not_specialize=["choices", "BLOCK", "max_tiles"])
def _place_kernel(
    experts_ptr, hist_ptr, order_ptr, place_ptr, offsets_ptr, start_ptr, tile_expert_ptr, choices, BLOCK, max_tiles,
    E: tl.constexpr, E_PAD: tl.constexpr, SUB: tl.constexpr, HIST: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: the rows of BLOCK consecutive choices, and a share of the tables."""
    b = tl.program_id(0)
    cols = tl.arange(0, E_PAD)
    counts = tl.zeros([E_PAD], tl.int32)
    before = tl.zeros([E_PAD], tl.int32)
    for h0 in range(0, tl.num_programs(0), HIST):
        h = h0 + tl.arange(0, HIST)
        mask = (h < tl.num_programs(0))[:, None] & (cols < E)[None, :]
        n = tl.load(hist_ptr + h[:, None] * E + cols[None, :], mask=mask, other=0)
        counts += tl.sum(n, 0)
        before += tl.sum(tl.where((h < b)[:, None], n, 0), 0)
    _write_tables(counts, offsets_ptr, start_ptr, tile_expert_ptr, max_tiles, E, E_PAD, BLOCK_M, CHUNK)

    free = tl.cumsum(counts, 0) - counts + before  # [E_PAD], each expert's next free row
    lane = tl.arange(0, SUB)
    for s in range(0, BLOCK, SUB):
        i = b * BLOCK + s + lane
        e = tl.load(experts_ptr + i, mask=i < choices, other=-1).to(tl.int32)
        mine = (e[:, None] == cols[None, :]).to(tl.int32)  # [SUB, E_PAD]
        earlier = (e[:, None] == e[None, :]) & (lane[:, None] > lane[None, :])
        place = tl.sum(mine * free[None, :], 1) + tl.sum(earlier.to(tl.int32), 1)
        present = e < E
        tl.store(place_ptr + i, tl.where(present, place, -1), mask=i < choices)
        tl.store(order_ptr + place, i, mask=(i < choices) & present)
        free += tl.sum(mine, 0)


@triton.jit(do_not_specialize=["max_tiles"])
def _tables_kernel(
    counts_ptr, offsets_ptr, start_ptr, tile_expert_ptr, max_tiles,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, E_PAD)
    counts = tl.load(counts_ptr + cols, mask=cols < E, other=0).to(tl.int32)
    _write_tables(counts, offsets_ptr, start_ptr, tile_expert_ptr, max_tiles, E, E_PAD, BLOCK_M, CHUNK)


def _sizes(E: int) -> dict[str, int]:
    """Padded number of experts, and tiles of about 16,384 comparisons, 128 a thread."""
    E_PAD = max(16, triton.next_power_of_2(E))
    sub = 16 if INTERPRET else max(16, min(128, 16384 // E_PAD))
    return {"E": E, "E_PAD": E_PAD, "SUB": sub}


def _histogram(experts_TK: Tensor, E: int) -> tuple[Tensor, int]:
    choices = experts_TK.numel()
    block = max(CHOICES, triton.next_power_of_2(triton.cdiv(choices, MAX_BLOCKS)))
    hist = torch.empty(triton.cdiv(choices, block), E, dtype=torch.int32, device=experts_TK.device)
    _histogram_kernel[(hist.shape[0],)](experts_TK, hist, choices, block, **_sizes(E), num_warps=4)
    return hist, block


def _empty_tiles(R: int, E: int, block: int, device: torch.device) -> Tiles:
    bound = R // block + min(E, R)  # sum of ceil(count / block)
    offsets, start, expert = (torch.empty(n, dtype=torch.int32, device=device) for n in (E + 1, E + 1, bound))
    return Tiles(offsets, start, expert, block)


def count_experts(experts_TK: Tensor, E: int) -> Tensor:
    """Rows per expert, (E,) int64, on the device in two launches.  experts_TK is not empty."""
    return _histogram(experts_TK.contiguous(), E)[0].sum(0)  # torch sums int32 into int64


def plan_rows(experts_TK: Tensor, E: int, block: int, rows: int | None = None) -> Plan:
    """Expert order and tiles of `block` rows, two launches.

    experts_TK: (T, K) ids below E, or E for an absent choice.  rows: how many are below E, at least one; None: all.
    """
    experts_TK = experts_TK.contiguous()
    R = experts_TK.numel() if rows is None else rows
    hist, block_choices = _histogram(experts_TK, E)
    tiles = _empty_tiles(R, E, block, experts_TK.device)
    order = torch.empty(R, dtype=torch.int32, device=experts_TK.device)
    place = torch.empty(experts_TK.shape, dtype=torch.int32, device=experts_TK.device)
    sizes = _sizes(E)
    _place_kernel[(hist.shape[0],)](
        experts_TK, hist, order, place, *tiles[:3], experts_TK.numel(), block_choices, tiles.tile_expert.numel(),
        **sizes, HIST=max(1, min(32, 8192 // sizes["E_PAD"])), BLOCK_M=block, CHUNK=16, num_warps=4,
    )  # fmt: skip
    return Plan(order, place, tiles)


def tiles_from_counts(counts_E: Tensor, R: int, block: int) -> Tiles:
    """The tiles of rows that are in expert order already.  counts: (E,) on the device, summing to at most R > 0."""
    E = counts_E.numel()
    tiles = _empty_tiles(R, E, block, counts_E.device)
    bound = tiles.tile_expert.numel()
    sizes = _sizes(E)
    del sizes["SUB"]
    _tables_kernel[(min(16, triton.cdiv(bound, 16)),)](
        counts_E.contiguous(), *tiles[:3], bound, **sizes, BLOCK_M=block, CHUNK=16, num_warps=4
    )
    return tiles


@triton.jit
def _sum_rows_kernel(rows_ptr, place_ptr, y_ptr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """One program: y_t = sum_k rows[place_tk], in fp32 and in the order of k.  rows (R, D), place (T, K), y (T, D).

    A place of -1 adds nothing.
    """
    t = tl.program_id(0).to(tl.int64)
    for d in range(0, D, BLOCK):
        cols = d + tl.arange(0, BLOCK)
        y = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            row = tl.load(place_ptr + t * K + k).to(tl.int64)
            mask = cols < tl.where(row < 0, 0, D)
            y += tl.load(rows_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + t * D + cols, y, mask=cols < D)


def sum_rows(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    """Each token's rows added up, (T, D) in the rows' dtype.  Moves R D + T D elements: bandwidth-bound."""
    T, K = place_TK.shape
    D = rows_RD.shape[1]
    y = torch.empty(T, D, dtype=rows_RD.dtype, device=rows_RD.device)
    _sum_rows_kernel[(T,)](rows_RD, place_TK, y, D, K, BLOCK=min(ROW_BLOCK, triton.next_power_of_2(D)), num_warps=4)
    return y


@triton.jit
def _copy_rows_kernel(x_ptr, place_ptr, rows_ptr, stride, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """One program: rows[place_tk] = x_t for each k with a place.  x (T, D) with a row stride, rows (R, D)."""
    t = tl.program_id(0).to(tl.int64)
    for d in range(0, D, BLOCK):
        cols = d + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + t * stride + cols, mask=cols < D, other=0.0)
        for k in tl.static_range(K):
            row = tl.load(place_ptr + t * K + k).to(tl.int64)
            tl.store(rows_ptr + row * D + cols, x, mask=cols < tl.where(row < 0, 0, D))


def copy_rows(x_TD: Tensor, place_TK: Tensor, R: int) -> Tensor:
    """The tokens' rows in expert order, (R, D).  Reads x once and moves T D + R D elements: bandwidth-bound."""
    T, K = place_TK.shape
    D = x_TD.shape[1]
    rows = torch.empty(R, D, dtype=x_TD.dtype, device=x_TD.device)
    block = min(ROW_BLOCK, triton.next_power_of_2(D))
    _copy_rows_kernel[(T,)](x_TD, place_TK, rows, x_TD.stride(0), D, K, BLOCK=block, num_warps=4)
    return rows


@triton.jit(do_not_specialize=["R", "limit"])
def _zero_tail_kernel(x_ptr, end_ptr, R, width, limit, WIDTH: tl.constexpr):
    """One program: zeroes one row of those that follow the last expert's, at most `limit` of them.  x (R, width)."""
    end = tl.load(end_ptr)
    row = tl.program_id(0)
    if (row >= end) & (row < end + limit):
        for c in range(0, width, WIDTH):
            cols = c + tl.arange(0, WIDTH)
            zero = tl.zeros([WIDTH], x_ptr.dtype.element_ty)
            tl.store(x_ptr + row.to(tl.int64) * width + cols, zero, mask=cols < width)


def zero_tail(x: Tensor, tiles: Tiles, limit: int | None = None) -> None:
    """Zeroes, in place, the rows of x that belong to no expert (or the first `limit` of them)."""
    R = x.shape[0]
    width = x.numel() // R
    block = min(ROW_BLOCK, triton.next_power_of_2(width))
    end = tiles.offsets_E1[-1:]
    _zero_tail_kernel[(R,)](x, end, R, width, R if limit is None else limit, WIDTH=block, num_warps=1)

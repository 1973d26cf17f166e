"""Weight gradients of the experts: one product per expert, summed over its own rows.

    dup_e   = sum_r dz_r x_token(r)^T     (F, D): the gathered rows x are on the right
    ddown_e = sum_r dy_token(r) hs_r^T    (D, F): the gathered rows dy are on the left

The sum is short (a few hundred rows) and the result large, so what matters is that storing one tile and loading the
next overlap.  The gathered rows are masked to zero past the expert's end, and the rows in place need no mask: whatever
finite numbers they hold there are multiplied by zero.  An expert without rows gets zeros.  The result can be added to a
given buffer instead (fp32 or 16 bit): gradients of several micro-batches are summed without a second pass.

Rows that were copied into expert order first come by TMA like the others (grouped_gemm_ragged.py gives the zeros).

Suffixes: R rows in expert order, E experts, M x N the shape of one expert's matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import INTERPRET
from kernels.gradient_sink import GradientSink
from kernels.grouped_gemm_configs import Config, describe, describe_matrices, resident_programs
from kernels.grouped_gemm_ragged import describe_ragged, halves, load_ragged
from kernels.permute import Tiles

INTERPRETED = tl.constexpr(INTERPRET)
FEW_ROWS = 768  # of an expert: below, storing its gradient takes longer than the products


@triton.jit
def _load_gathered(
    ptr, desc, k, end, token, live, col0, stride,
    WIDTH: tl.constexpr, TMA: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK] of the gathered operand, zero from row `end` on."""
    if TMA:
        x = load_ragged(desc, end, k, col0, BLOCK_K, BLOCK)
    else:
        cols = col0 + tl.arange(0, BLOCK)
        ptrs = ptr + token.to(tl.int64)[:, None] * stride + cols[None, :]
        x = tl.load(ptrs, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
def _load_fixed(ptr, desc, row0, rows, live, col0, WIDTH: tl.constexpr, TMA: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK_K, BLOCK] of the operand in place; from a descriptor it is finite where `live` is not, else zero."""
    if TMA:
        x = desc.load([row0, col0])
    else:
        cols = col0 + tl.arange(0, BLOCK)
        ptrs = ptr + rows.to(tl.int64)[:, None] * WIDTH + cols[None, :]
        x = tl.load(ptrs, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
def _store(
    acc, out_ptr, out_desc, e, m0, n0, M: tl.constexpr, N: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK_N)
    mask = (rows < M - m0)[:, None] & (cols < N)[None, :]
    # 32-bit offsets from a 64-bit base: fewer registers.
    ptrs = out_ptr + (tl.cast(e, tl.int64) * M + m0) * N + (rows[:, None] * N + cols[None, :])
    if out_desc is None:
        if ACCUMULATE:
            acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        out = tl.reshape(acc.to(out_ptr.dtype.element_ty), [1, BLOCK_M, BLOCK_N])
        if not ACCUMULATE:
            out_desc.store([e, m0, n0], out)
        elif INTERPRETED:  # it has no additions by descriptor
            out_desc.store([e, m0, n0], out + out_desc.load([e, m0, n0]))
        else:  # atomic, but every number has one program that adds to it, once: equal inputs, equal bits
            out_desc.atomic_add([e, m0, n0], out)


@triton.jit
def _store_half(
    acc, out_ptr, out_desc, e, m0, n0, M: tl.constexpr, N: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """_store of a half tile, in halves of its own if AGAIN."""
    if AGAIN:
        QUARTER: tl.constexpr = BLOCK_N // 2
        first, second = halves(acc, BLOCK_M, BLOCK_N)
        _store(first, out_ptr, out_desc, e, m0, n0, M, N, ACCUMULATE, BLOCK_M, QUARTER)
        _store(second, out_ptr, out_desc, e, m0, n0 + QUARTER, M, N, ACCUMULATE, BLOCK_M, QUARTER)
    else:
        _store(acc, out_ptr, out_desc, e, m0, n0, M, N, ACCUMULATE, BLOCK_M, BLOCK_N)


@triton.jit
def _weights_kernel(
    gathered_ptr, gathered_desc, fixed_ptr, fixed_desc, extra_desc, out_ptr, out_desc, order_ptr, offsets_ptr, stride,
    E: tl.constexpr, E_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr,
    GATHER: tl.constexpr, LEFT: tl.constexpr, TMA: tl.constexpr, ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of out (E, M, N).  LEFT: the gathered operand gives the M rows of out.

    gathered (T or R, M or N) with a row stride, fixed (R, N or M), order (R,).  A tile is BLOCK_N + EXTRA_N wide; the
    extra columns have an accumulator of their own.

    One loop runs over all steps of all its tiles, so that loads run ahead across the end of a tile.  The tiles differ
    in length: an expert of n rows takes ceil(n / BLOCK_K) steps; one without rows a single step, with all masked.
    """
    COPIED: tl.constexpr = gathered_desc is not None
    M_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (N + BLOCK_N + EXTRA_N - 1) // (BLOCK_N + EXTRA_N)
    TILES: tl.constexpr = M_TILES * N_TILES
    pid = tl.program_id(0)
    programs = tl.num_programs(0)

    experts = tl.arange(0, E_PAD)
    counts = tl.load(offsets_ptr + 1 + experts, mask=experts < E, other=0)
    counts -= tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    # Of the tiles before x, (x - pid + programs - 1) // programs are this program's.
    mine = ((experts + 1) * TILES - pid + programs - 1) // programs - (experts * TILES - pid + programs - 1) // programs
    steps = tl.maximum((counts + BLOCK_K - 1) // BLOCK_K, 1)
    total = tl.sum(tl.where(experts < E, mine * steps, 0), 0)

    tile = pid - programs
    e = 0
    k = 0
    end = 0
    m0 = 0
    n0 = 0
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EXTRA_N > 0:
        extra = tl.zeros([BLOCK_M, EXTRA_N], tl.float32)
    # Tile and k move on at the top of the loop: the pipeliner runs that part ahead, with the loads.
    for _ in range(0, total):
        k += BLOCK_K
        if k >= end:
            tile += programs
            e = tile // TILES
            m0 = (tile % M_TILES) * BLOCK_M
            n0 = (tile // M_TILES % N_TILES) * (BLOCK_N + EXTRA_N)
            k = tl.load(offsets_ptr + e)
            end = tl.load(offsets_ptr + e + 1)
        live = ks < end - k
        rows = k + ks
        token = tl.load(order_ptr + rows, mask=live, other=0) // TOP_K if GATHER else rows
        if LEFT:
            left = _load_gathered(
                gathered_ptr, gathered_desc, k, end, token, live, m0, stride, M, COPIED, BLOCK_M, BLOCK_K
            )
            right = _load_fixed(fixed_ptr, fixed_desc, k, rows, live, n0, N, TMA, BLOCK_N)
        else:
            left = _load_fixed(fixed_ptr, fixed_desc, k, rows, live, m0, M, TMA, BLOCK_M)
            right = _load_gathered(
                gathered_ptr, gathered_desc, k, end, token, live, n0, stride, N, COPIED, BLOCK_N, BLOCK_K
            )
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
        if EXTRA_N > 0:
            if LEFT:
                right = _load_fixed(fixed_ptr, extra_desc, k, rows, live, n0 + BLOCK_N, N, TMA, EXTRA_N)
            else:
                right = _load_gathered(
                    gathered_ptr, None, k, end, token, live, n0 + BLOCK_N, stride, N, False, EXTRA_N, BLOCK_K
                )
            extra = tl.dot(left.T, right, extra, input_precision=PRECISION)
        if k + BLOCK_K >= end:
            if SPLIT == 1:
                _store(acc, out_ptr, out_desc, e, m0, n0, M, N, ACCUMULATE, BLOCK_M, BLOCK_N)
            else:
                HALF: tl.constexpr = BLOCK_N // 2
                first, second = halves(acc, BLOCK_M, BLOCK_N)
                _store_half(first, out_ptr, out_desc, e, m0, n0, M, N, ACCUMULATE, BLOCK_M, HALF, SPLIT == 4)
                _store_half(second, out_ptr, out_desc, e, m0, n0 + HALF, M, N, ACCUMULATE, BLOCK_M, HALF, SPLIT == 4)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if EXTRA_N > 0:
                _store(extra, out_ptr, None, e, m0, n0 + BLOCK_N, M, N, ACCUMULATE, BLOCK_M, EXTRA_N)
                extra = tl.zeros([BLOCK_M, EXTRA_N], tl.float32)


def _for_sums(c: Config, dtype: torch.dtype, add: bool, left: bool, few: bool) -> Config:
    """The tiles of a product that goes into a buffer of that dtype; few: rows to an expert.

    Where rows are few the buffer's traffic is what takes the time, and where they are many, the products.  The copy
    engine can store a tile, and add one to fp32, while the next tile is computed; but on a GPU `tma_reads` keeps it to
    16 bits, so for fp32 `store` means plain stores so far, and the tiles here are the best with those (H100,
    benchmarks/RESULTS.md).
    """
    c = c._replace(extra_n=0)
    if not c.copy:  # row numbers take registers, too: the sum so far comes in quarters of a tile
        return c._replace(store=False, split=4)
    if add and dtype == torch.float32 and not left:
        half = c._replace(block_n=c.block_n // 2, store=True, split=2)
        return half if few else c._replace(stages=min(c.stages, 3), store=True, split=2)
    if not add and few:
        return c._replace(store=True, split=4)
    # The sum so far passes through shared memory in fp32 and through registers beside the accumulators: in halves.
    return c._replace(stages=min(c.stages, 3), store=False, split=2)


def weight_gradient(
    gathered: Tensor,
    fixed: Tensor,
    tiles: Tiles,
    order: Tensor | None,
    top_k: int,
    left: bool,
    c: Config,
    sink: GradientSink | None = None,
) -> Tensor | None:
    """(E, M, N) in the operands' dtype, or None, and the same is in the sink's buffer.

    gathered: (T, width), whose row order_r // K goes with row r of fixed (R, width); order None: row r itself, as after
    copy_rows, which the configurations with `copy` expect.
    left: the gathered operand gives M, otherwise N.
    """
    E = tiles.offsets_E1.numel() - 1
    buffer, add = (None, False) if sink is None else sink.open()
    if buffer is not None:
        c = _for_sums(c, buffer.dtype, add, left, fixed.shape[0] < FEW_ROWS * E)
    M, N = (gathered.shape[1], fixed.shape[1]) if left else (fixed.shape[1], gathered.shape[1])
    out = torch.empty(E, M, N, dtype=gathered.dtype, device=gathered.device) if buffer is None else buffer
    desc = describe(fixed, c.block_k, c.block_n if left else c.block_m)
    extra_desc = describe(fixed, c.block_k, c.extra_n) if left else None
    gathered_desc = (
        describe_ragged(gathered, c.block_k, c.block_m if left else c.block_n) if c.copy and order is None else None
    )
    out_desc = describe_matrices(out, c.block_m, c.block_n // c.split) if c.store else None
    tiles_per_expert = triton.cdiv(M, c.block_m) * triton.cdiv(N, c.block_n + c.extra_n)
    # Without row numbers to read ahead of the rows, half the stages hold as much data.
    stages = c.stages if c.copy or order is not None else (c.stages + 1) // 2
    programs = min(resident_programs(gathered, c.per_sm), E * tiles_per_expert)
    _weights_kernel[(programs,)](
        gathered, gathered_desc, fixed, desc, extra_desc, out, out_desc, order, tiles.offsets_E1, gathered.stride(0),
        E=E, E_PAD=triton.next_power_of_2(E), M=M, N=N, TOP_K=top_k, GATHER=order is not None, LEFT=left,
        TMA=desc is not None, ACCUMULATE=add, PRECISION="ieee",
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, EXTRA_N=c.extra_n,
        BLOCK_K=c.block_k, SPLIT=c.split, num_warps=c.warps, num_stages=stages,
    )  # fmt: skip
    if sink is None:
        return out
    sink.close()
    return None

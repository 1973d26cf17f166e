"""Weight gradients of the experts: one product per expert, summed over its own rows.

    dup_e   = sum_r dz_r x_token(r)^T     (F, D): the gathered rows x are on the right
    ddown_e = sum_r dy_token(r) hs_r^T    (D, F): the gathered rows dy are on the left

The sum is short (a few hundred rows) and the result large, so what matters is that storing one tile and loading the
next overlap.  The gathered rows are masked to zero past the expert's end, and the rows in place need no mask: whatever
finite numbers they hold there are multiplied by zero.  An expert without rows gets zeros.  The result can be added to a
given buffer instead (fp32 or 16 bit): gradients of several micro-batches are summed without a second pass.

Suffixes: R rows in expert order, E experts, M x N the shape of one expert's matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import INTERPRET
from kernels.grouped_gemm_rows import Config, describe, has_tma, resident_programs
from kernels.permute import Tiles


@triton.jit
def _weights_kernel(
    gathered_ptr, fixed_ptr, fixed_desc, out_ptr, order_ptr, offsets_ptr, stride,
    E: tl.constexpr, E_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr,
    GATHER: tl.constexpr, LEFT: tl.constexpr, TMA: tl.constexpr, ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of out (E, M, N).  LEFT: the gathered operand gives the M rows of out.

    gathered (T or R, M or N) with a row stride, fixed (R, N or M), order (R,).

    One loop runs over all steps of all its tiles, so that loads run ahead across the end of a tile.  The tiles differ
    in length: an expert of n rows takes ceil(n / BLOCK_K) steps; one without rows a single step, with all masked.
    """
    M_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = M_TILES * N_TILES
    FIXED: tl.constexpr = N if LEFT else M
    GATHERED: tl.constexpr = M if LEFT else N
    FIXED_BLOCK: tl.constexpr = BLOCK_N if LEFT else BLOCK_M
    GATHERED_BLOCK: tl.constexpr = BLOCK_M if LEFT else BLOCK_N
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
    # Tile and k move on at the top of the loop: the pipeliner runs that part ahead, with the loads.
    for _ in range(0, total):
        k += BLOCK_K
        if k >= end:
            tile += programs
            e = tile // TILES
            m0 = (tile % M_TILES) * BLOCK_M
            n0 = (tile // M_TILES % N_TILES) * BLOCK_N
            k = tl.load(offsets_ptr + e)
            end = tl.load(offsets_ptr + e + 1)
        live = ks < end - k
        fixed0 = n0 if LEFT else m0
        gathered0 = m0 if LEFT else n0
        gcols = gathered0 + tl.arange(0, GATHERED_BLOCK)
        fcols = fixed0 + tl.arange(0, FIXED_BLOCK)
        token = tl.load(order_ptr + k + ks, mask=live, other=0) // TOP_K if GATHER else k + ks
        g_ptrs = gathered_ptr + token.to(tl.int64)[:, None] * stride + gcols[None, :]
        g = tl.load(g_ptrs, mask=live[:, None] & (gcols < GATHERED)[None, :], other=0.0)
        if TMA:
            f = fixed_desc.load([k, fixed0])
        else:
            f_ptrs = fixed_ptr + (k + ks).to(tl.int64)[:, None] * FIXED + fcols[None, :]
            f = tl.load(f_ptrs, mask=live[:, None] & (fcols < FIXED)[None, :], other=0.0)
        left, right = (g, f) if LEFT else (f, g)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
        if k + BLOCK_K >= end:
            rows = m0 + tl.arange(0, BLOCK_M)
            cols = n0 + tl.arange(0, BLOCK_N)
            mask = (rows < M)[:, None] & (cols < N)[None, :]
            out_ptrs = out_ptr + (tl.cast(e, tl.int64) * M + rows)[:, None] * N + cols[None, :]
            if ACCUMULATE:
                acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


# 256 goes along D = 2688 (10.5 tiles), 128 along F = 1856 (14.5): the other way round wastes 10 % instead of 5.  Of the
# stages, half go to reading the row numbers ahead of the rows.
HOPPER = {False: Config(128, 256, 64, 8, 5), True: Config(256, 128, 64, 8, 5)}  # by whether the left one is gathered
SMALL_SHARED = Config(128, 128, 32, 8, 3)
FULL_PRECISION = Config(64, 64, 32, 4, 2)
INTERPRETED = Config(16, 32, 16, 4, 1)


def config_for(x: Tensor, left: bool) -> Config:
    if INTERPRET:
        return INTERPRETED
    if x.element_size() == 4:
        return FULL_PRECISION
    return HOPPER[left] if has_tma(x) else SMALL_SHARED


def weight_gradient(
    gathered: Tensor,
    fixed: Tensor,
    tiles: Tiles,
    order: Tensor | None,
    top_k: int,
    left: bool,
    buffer: Tensor | None = None,
) -> Tensor:
    """(E, M, N) in the operands' dtype, or the same added to `buffer`, which is returned.

    gathered: (T, width), whose row order_r // K goes with row r of fixed (R, width); order None: row r itself.
    left: the gathered operand gives M, otherwise N.
    """
    E = tiles.offsets_E1.numel() - 1
    M, N = (gathered.shape[1], fixed.shape[1]) if left else (fixed.shape[1], gathered.shape[1])
    c = config_for(gathered, left)
    out = torch.empty(E, M, N, dtype=gathered.dtype, device=gathered.device) if buffer is None else buffer
    desc = describe(fixed, c.block_k, c.block_n if left else c.block_m)
    programs = min(resident_programs(gathered, c.per_sm), E * triton.cdiv(M, c.block_m) * triton.cdiv(N, c.block_n))
    _weights_kernel[(programs,)](
        gathered, fixed, desc, out, order, tiles.offsets_E1, gathered.stride(0),
        E=E, E_PAD=triton.next_power_of_2(E), M=M, N=N, TOP_K=top_k, GATHER=order is not None, LEFT=left,
        TMA=desc is not None, ACCUMULATE=buffer is not None, PRECISION="ieee",
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out

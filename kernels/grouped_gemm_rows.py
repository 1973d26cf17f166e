"""Grouped products rows x weights: every expert multiplies its own rows by its own matrix.

    up     z = x_token up_e^T      -> hs = w relu(z)^2                 rows gathered, weights (E, F, D) read as [N, K]
    down   hs down_e^T             -> y                                rows in place, weights (E, D, F) as [N, K]
    dH     g = dy_token down_e     -> dz = 2 w relu(z) g, and g . hs   rows gathered, weights (E, D, F) as [K, N]
    dX     dz up_e                 -> dx                               rows in place, weights (E, F, D) as [K, N]

One kernel.  The programs stay resident and walk the tiles expert by expert, rows fastest: a slab of weights is read
from memory once and then comes from L2 for the expert's other row tiles.  Gathered rows are read where they lie, by
pointers; weights and rows in place come through tensor descriptors (TMA) where alignment allows, else by pointers too.
Rows that were copied into expert order first (Config.copy) are rows in place.

Any of them can have a summand of low rank (LoRA) added in its accumulators before the epilogue, thin (R, r) times a
matrix of r rows per expert: one step of the loop more, and no further pass over the result.

dH needs relu(z), which nothing saved: hs = w relu(z)^2 has it.  2 w relu(z) = 2 sign(w) sqrt(w hs), exact even at w = 0
(where dz = 0), and the square root halves the relative error of a rounded hs.

Suffixes: R rows in expert order, E experts, K and N the summed and the produced width of the product at hand.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_gemm_configs import Config, describe, resident_programs
from kernels.grouped_gemm_ragged import describe_ragged, halves, load_ragged, store_ragged
from kernels.permute import Tiles

PLAIN, RELU2, DRELU2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class LowRank(NamedTuple):
    """A summand of a product: row r of thin times the matrix of its expert."""

    thin: Tensor  # (R, r) in expert order, contiguous
    matrix: Tensor  # (E, N, r) or (E, r, N), or for all experts the same one, (N, r) or (r, N); contiguous
    is_nk: bool  # the first of each two


@triton.jit
def _load_b(
    b_ptr, b_desc, e, k, n0, ks,
    K: tl.constexpr, N: tl.constexpr, B_IS_NK: tl.constexpr, TMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """b[k.., n0..n0 + BLOCK] of expert e.

    A descriptor that runs over one expert's matrix reads the next one's: in n this is not stored, and in k the other
    operand is zero there.
    """
    if TMA and B_IS_NK:
        b = b_desc.load([e * N + n0, k]).T
    elif TMA:
        b = b_desc.load([e * K + k, n0])
    else:
        cols = n0 + tl.arange(0, BLOCK)
        mask = (ks[:, None] < K - k) & (cols < N)[None, :]
        b_ptr += e.to(tl.int64) * N * K
        if B_IS_NK:
            b = tl.load(b_ptr + cols[None, :] * K + (k + ks)[:, None], mask=mask, other=0.0)
        else:
            b = tl.load(b_ptr + (k + ks)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    return b


@triton.jit
def _add_low_rank(
    acc, thin_ptr, low_ptr, e, row0, end, n0,
    N: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr, LOW_IS_NK: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """acc + thin low for one accumulator, at most 32 columns of thin at a time: shared memory is nearly full."""
    STEP: tl.constexpr = 32 if RANK_PAD > 32 else RANK_PAD
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK)
    thin_ptrs = thin_ptr + rows.to(tl.int64)[:, None] * RANK
    if not SHARED:
        low_ptr += e.to(tl.int64) * N * RANK
    for first in tl.static_range(0, RANK, STEP):
        rs = first + tl.arange(0, STEP)
        thin = tl.load(thin_ptrs + rs[None, :], mask=(rows < end)[:, None] & (rs < RANK)[None, :], other=0.0)
        where = cols[None, :] * RANK + rs[:, None] if LOW_IS_NK else rs[:, None] * N + cols[None, :]
        low = tl.load(low_ptr + where, mask=(rs < RANK)[:, None] & (cols < N)[None, :], other=0.0)
        acc = tl.dot(thin, low, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _finish(
    acc, out_ptr, out_desc, hs_ptr, hs_desc, w, row0, end, live, n0,
    N: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Epilogue and store of one accumulator; returns g . hs per row for DRELU2."""
    cols = n0 + tl.arange(0, BLOCK)
    mask = live[:, None] & (cols < N)[None, :]
    where = tl.arange(0, BLOCK_M)[:, None] * N + cols[None, :]  # 32 bits, from a 64-bit base: fewer registers
    out_ptr += row0.to(tl.int64) * N
    dot = w
    if EPILOGUE == RELU2:
        z = tl.where(acc < 0, 0.0, acc)  # not maximum, which makes 0 of NaN
        acc = z * z * w[:, None]
    if EPILOGUE == DRELU2:
        if hs_desc is None:
            hs = tl.load(hs_ptr + row0.to(tl.int64) * N + where, mask=mask, other=0.0).to(tl.float32)
        else:
            hs = load_ragged(hs_desc, end, row0, n0, BLOCK_M, BLOCK).to(tl.float32)
        dot = tl.sum(acc * hs, 1)
        sign = tl.where(w < 0, -2.0, 2.0)
        acc *= sign[:, None] * tl.sqrt(hs * w[:, None])
    out = acc.to(out_ptr.dtype.element_ty)
    if out_desc is None:
        tl.store(out_ptr + where, out, mask=mask)
    else:
        store_ragged(out_desc, end, row0, n0, out, BLOCK_M, BLOCK)
    return dot


@triton.jit(do_not_specialize=["R"])
def _rows_kernel(
    a_ptr, a_desc, b_ptr, b_desc, extra_desc, out_ptr, out_desc, order_ptr, w_ptr, hs_ptr, hs_desc, part_ptr,
    thin_ptr, low_ptr, offsets_ptr, start_ptr, tile_expert_ptr, R, a_stride,
    E: tl.constexpr, K: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr,
    GATHER: tl.constexpr, B_IS_NK: tl.constexpr, A_TMA: tl.constexpr, B_TMA: tl.constexpr,
    EPILOGUE: tl.constexpr, PRECISION: tl.constexpr, FLATTEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EXTRA_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    RANK: tl.constexpr, RANK_PAD: tl.constexpr, LOW_IS_NK: tl.constexpr, SHARED: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile.  a (R or T, K), b (E, N, K) or (E, K, N), out hs (R, N), w, order (R,).

    A tile is BLOCK_N + EXTRA_N wide; the extra columns have an accumulator of their own.  SCALE: factor of a product
    that stands alone, without extra columns.
    part (tiles in N, R): what each column of tiles adds to g . hs; summed later, in a fixed order.
    """
    WIDTH: tl.constexpr = BLOCK_N + EXTRA_N
    N_TILES: tl.constexpr = (N + WIDTH - 1) // WIDTH
    total = tl.load(start_ptr + E) * N_TILES
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        e = tl.load(tile_expert_ptr + tile // N_TILES)
        first = tl.load(start_ptr + e)
        m_tiles = tl.load(start_ptr + e + 1) - first
        local = tile - first * N_TILES
        row0 = tl.load(offsets_ptr + e) + (local % m_tiles) * BLOCK_M
        end = tl.load(offsets_ptr + e + 1)
        n0 = (local // m_tiles) * WIDTH

        # Rows past the expert's end are computed from whatever row is there, and not stored.
        rows = row0 + tl.arange(0, BLOCK_M)
        token = tl.load(order_ptr + rows, mask=rows < end, other=0) // TOP_K if GATHER else tl.minimum(rows, R - 1)
        ks = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + token.to(tl.int64)[:, None] * a_stride + ks[None, :]

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if EXTRA_N > 0:
            extra = tl.zeros([BLOCK_M, EXTRA_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            if A_TMA:
                a = a_desc.load([row0, k])
            elif K % BLOCK_K == 0:
                a = tl.load(a_ptrs + k)
            else:
                a = tl.load(a_ptrs + k, mask=ks[None, :] < K - k, other=0.0)
            b = _load_b(b_ptr, b_desc, e, k, n0, ks, K, N, B_IS_NK, B_TMA, BLOCK_N)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            if EXTRA_N > 0:
                b = _load_b(b_ptr, extra_desc, e, k, n0 + BLOCK_N, ks, K, N, B_IS_NK, B_TMA, EXTRA_N)
                extra = tl.dot(a, b, extra, input_precision=PRECISION)

        if RANK > 0:
            acc = _add_low_rank(
                acc, thin_ptr, low_ptr, e, row0, end, n0,
                N, RANK, RANK_PAD, LOW_IS_NK, SHARED, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if EXTRA_N > 0:
                extra = _add_low_rank(
                    extra, thin_ptr, low_ptr, e, row0, end, n0 + BLOCK_N,
                    N, RANK, RANK_PAD, LOW_IS_NK, SHARED, PRECISION, BLOCK_M, EXTRA_N,
                )  # fmt: skip

        if SCALE != 1.0:
            acc *= SCALE
        rows = row0 + tl.arange(0, BLOCK_M)  # computed anew rather than kept in registers across the loop
        live = rows < end
        w = tl.zeros([BLOCK_M], tl.float32)
        if EPILOGUE != PLAIN:
            w = tl.load(w_ptr + rows, mask=live, other=0.0).to(tl.float32)
        if SPLIT == 1:
            dot = _finish(
                acc, out_ptr, out_desc, hs_ptr, hs_desc, w, row0, end, live, n0, N, EPILOGUE, BLOCK_M, BLOCK_N
            )
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            first, second = halves(acc, BLOCK_M, BLOCK_N)
            dot = _finish(first, out_ptr, out_desc, hs_ptr, hs_desc, w, row0, end, live, n0, N, EPILOGUE, BLOCK_M, HALF)
            dot += _finish(
                second, out_ptr, out_desc, hs_ptr, hs_desc, w, row0, end, live, n0 + HALF, N, EPILOGUE, BLOCK_M, HALF
            )
        if EXTRA_N > 0:
            dot += _finish(
                extra, out_ptr, out_desc, hs_ptr, hs_desc, w, row0, end, live, n0 + BLOCK_N, N, EPILOGUE, BLOCK_M,
                EXTRA_N,
            )  # fmt: skip
        if EPILOGUE == DRELU2:
            rows = tl.arange(0, BLOCK_M)  # computed anew here, too
            part = part_ptr + (n0 // WIDTH).to(tl.int64) * R + row0
            tl.store(part + rows, dot, mask=rows < end - row0)


@triton.jit(do_not_specialize=["choices", "R"])
def _weight_grad_kernel(
    part_ptr, w_ptr, place_ptr, end_ptr, dw_ptr, choices, R, PARTS, HAS_PLACE: tl.constexpr, BLOCK: tl.constexpr
):
    """dw_i = sum_n part_n / w, since part holds g . hs = w g . relu(z)^2.  part (PARTS, R), w and dw (choices,).

    0 where the weight is exactly 0, where the choice is absent (place -1), and past the last expert's rows.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(place_ptr + i, mask=i < choices, other=-1) if HAS_PLACE else i
    live = (i < choices) & (row >= 0) & (row < tl.load(end_ptr))
    total = tl.zeros([BLOCK], tl.float32)
    part_ptrs = part_ptr + row
    for _ in range(0, PARTS):
        total += tl.load(part_ptrs, mask=live, other=0.0)
        part_ptrs += R
    w = tl.load(w_ptr + i, mask=live, other=0.0).to(tl.float32)
    dw = tl.where(w == 0.0, 0.0, total / tl.where(w == 0.0, 1.0, w))
    tl.store(dw_ptr + i, dw.to(dw_ptr.dtype.element_ty), mask=i < choices)


def _multiply(
    c: Config,
    a: Tensor,
    b: Tensor,
    b_is_nk: bool,
    tiles: Tiles,
    order: Tensor | None,
    top_k: int,
    epilogue: tl.constexpr,
    w: Tensor | None = None,
    hs: Tensor | None = None,
    low: LowRank | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """out (R, N) and, for DRELU2, the parts of g . hs.  top_k: K where row r of the product is row order_r // K of a; 0
    where a has the R rows in place.
    """
    E, N, K = b.shape if b_is_nk else (b.shape[0], b.shape[2], b.shape[1])
    R = a.shape[0] if order is None else order.numel()
    out = torch.empty(R, N, dtype=a.dtype, device=a.device)
    n_tiles = triton.cdiv(N, c.block_n + c.extra_n)
    part = torch.empty(n_tiles, R, dtype=torch.float32, device=a.device) if epilogue is DRELU2 else None
    a_desc = None if top_k else describe(a, c.block_m, c.block_k)
    out_desc, hs_desc = (
        describe_ragged(t, c.block_m, c.block_n // c.split) if c.store and t is not None else None for t in (out, hs)
    )
    b_desc, extra_desc = (
        describe(b, *((width, c.block_k) if b_is_nk else (c.block_k, width))) if width else None
        for width in (c.block_n, c.extra_n)
    )
    programs = min(resident_programs(a, c.per_sm), tiles.tile_expert.numel() * n_tiles)
    rank = 0 if low is None else low.thin.shape[1]
    thin, matrix = (None, None) if low is None else low[:2]
    stages = c.stages if low is None else min(c.stages, 3)  # the thin operands need the shared memory of one
    _rows_kernel[(programs,)](
        a, a_desc, b, b_desc, extra_desc, out, out_desc, order, w, hs, hs_desc, part,
        thin, matrix, *tiles[:3], R, a.stride(0),
        E=E, K=K, N=N, TOP_K=top_k, GATHER=top_k > 0, B_IS_NK=b_is_nk,
        A_TMA=a_desc is not None, B_TMA=b_desc is not None, EPILOGUE=epilogue,
        PRECISION="ieee", FLATTEN=c.flatten, BLOCK_M=c.block_m, BLOCK_N=c.block_n, EXTRA_N=c.extra_n,
        BLOCK_K=c.block_k, SPLIT=c.split, RANK=rank, RANK_PAD=max(16, triton.next_power_of_2(rank)),
        LOW_IS_NK=low is not None and low.is_nk, SHARED=matrix is not None and matrix.ndim == 2, SCALE=scale,
        num_warps=c.warps, num_stages=stages,
    )  # fmt: skip
    return out, part


def thin_rows(
    a: Tensor,
    matrices: Tensor,
    is_nk: bool,
    tiles: Tiles,
    order: Tensor | None,
    top_k: int,
    config: Config,
    scale: float,
) -> Tensor:
    """(R, r): scale times a (T, K), or with top_k = 0 (R, K), times matrices (E, r, K), or (E, K, r) if not `is_nk`.

    The time is that of reading a: two programs of a multiprocessor have more of it under way than one.
    """
    rank = matrices.shape[1 if is_nk else 2]
    narrow = config._replace(
        block_n=min(128, max(16, triton.next_power_of_2(rank))), extra_n=0, store=False, split=1, warps=4, per_sm=2
    )
    return _multiply(narrow, a, matrices, is_nk, tiles, order, top_k, PLAIN, scale=scale)[0]


def up_rows(
    x: Tensor,
    weights_R: Tensor,
    up: Tensor,
    tiles: Tiles,
    order: Tensor | None,
    top_k: int,
    config: Config,
    low: LowRank | None = None,
) -> Tensor:
    """hs (R, F).  x: (T, D), or with top_k = 0 (R, D).  low: a summand of z."""
    return _multiply(config, x, up, True, tiles, order, top_k, RELU2, weights_R, low=low)[0]


def down_rows(hs: Tensor, down: Tensor, tiles: Tiles, config: Config, low: LowRank | None = None) -> Tensor:
    """y (R, D), in expert order, not yet summed by token."""
    return _multiply(config, hs, down, True, tiles, None, 0, PLAIN, low=low)[0]


def down_rows_backward(
    dy: Tensor,
    weights_R: Tensor,
    hs: Tensor,
    down: Tensor,
    tiles: Tiles,
    order: Tensor | None,
    top_k: int,
    config: Config,
    low: LowRank | None = None,
) -> tuple[Tensor, Tensor]:
    """dz (R, F) of z = up x, and what routing_weight_gradients sums.  dy: (T, D), or with top_k = 0 (R, D).

    With g = down^T dy:  dz = 2 w relu(z) g,  dw = sum_F g relu(z)^2.  low: a summand of g.
    """
    return _multiply(config, dy, down, False, tiles, order, top_k, DRELU2, weights_R, hs, low)


def routing_weight_gradients(part: Tensor, weights: Tensor, place: Tensor | None, tiles: Tiles) -> Tensor:
    """The gradient of the routing weights, (T, K), or without places (R,), from the parts of g . hs."""
    dweights = torch.empty_like(weights)
    choices = weights.numel()
    _weight_grad_kernel[(triton.cdiv(choices, 128),)](
        part, weights, place, tiles.offsets_E1[-1:], dweights, choices, part.shape[1], part.shape[0],
        HAS_PLACE=place is not None, BLOCK=128,
    )  # fmt: skip
    return dweights


def up_rows_backward(dz: Tensor, up: Tensor, tiles: Tiles, config: Config, low: LowRank | None = None) -> Tensor:
    """dx (R, D) = dz up, in expert order, not yet summed by token."""
    return _multiply(config, dz, up, False, tiles, None, 0, PLAIN, low=low)[0]

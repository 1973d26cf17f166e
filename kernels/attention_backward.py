"""The backward kernels of `kernels.attention`, without atomics: every sum has one owner and one order.

    P = exp2(S - lse)      delta = rowsum(dO * O)      dS = P * (dO V^T - delta)
    dQ = scale dS K        dK = scale dS^T Q           dV = P^T dO

Two kernels, each computing S again (7 products instead of 5, the price of no atomics): one owns queries and makes
delta and dQ; the other owns keys and makes dK and dV from S^T = K Q^T and dP^T = V dO^T, transposed from the start
because transposing a product's result is what Triton's Hopper backend has miscompiled.  The heads of a group add into
the same dK and dV: each program takes some of them one after the other, and where that leaves too few programs to
fill a GPU, parts go to fp32 slots that a last kernel adds in order.  Source: FlashAttention-2, arXiv:2307.08691.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_forward import LOG2_E, Tile, describe, padded_length, tile_class, width_of

QUERY_TILE = {"large": Tile(128, 64, 8, 3), "small": Tile(64, 32, 8, 1), "fp32": Tile(16, 16, 8, 1)}
KEY_TILE = {"large": Tile(64, 64, 4, 2), "small": Tile(32, 64, 8, 1), "fp32": Tile(16, 16, 8, 1)}
ENOUGH_PROGRAMS = 512  # about four a multiprocessor: the long ones then even out


@triton.jit
def _query_step(dq, q, do, lse, delta, k_desc, v_desc, b, kv_head, key0, visible, scale, N: tl.constexpr,
                WIDTH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """dq (M, WIDTH) += dS K for N keys from key0."""
    k = k_desc.load([b, kv_head, key0, 0]).reshape([N, WIDTH])
    v = v_desc.load([b, kv_head, key0, 0]).reshape([N, WIDTH])
    s = tl.dot(q, k.T, input_precision="ieee")
    dp = tl.dot(do, v.T, input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    return tl.dot(ds, k, dq, input_precision="ieee")


@triton.jit
def _query_kernel(
    q_desc, k_desc, v_desc, do_desc, o_ptr, dq_ptr, lse_ptr, delta_ptr, start_ptr,
    B, Sq, Skv, padded, scale, scale_log2,
    Hq: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: delta and dq of M queries of one head.  Order and runs of keys as in the forward kernel."""
    pid = tl.program_id(0)
    head = pid % Hq
    b = (pid // Hq) % B
    tile = tl.cdiv(padded, M) - 1 - pid // (Hq * B)
    kv_head = head // GROUP
    rows = tile * M + tl.arange(0, M)
    position = rows + (Skv - Sq)
    real = rows < Sq
    d = tl.arange(0, WIDTH)
    inside = real[:, None] & (d[None, :] < D)
    at = ((b.to(tl.int64) * Sq + rows[:, None]) * Hq + head) * D + d[None, :]
    q = q_desc.load([b, head, tile * M, 0]).reshape([M, WIDTH])
    do = do_desc.load([b, head, tile * M, 0]).reshape([M, WIDTH])
    o = tl.load(o_ptr + at, mask=inside, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    line = (b * Hq + head).to(tl.int64) * padded
    tl.store(delta_ptr + line + rows, delta)  # 0 in the padding, where dO reads as 0
    lse = tl.load(lse_ptr + line + rows)

    lowest = tile * M + (Skv - Sq)
    end = tl.cdiv(tl.minimum(lowest + M, Skv), N)
    diagonal = tl.minimum(lowest // N, end - 1)
    first = 0
    clean = 0
    start = tl.zeros([M], tl.int32)
    if PACKED:
        starts = start_ptr + b.to(tl.int64) * Skv
        start = tl.load(starts + tl.minimum(rows, Sq - 1))
        first = tl.minimum(tl.load(starts + tl.minimum(tile * M, Sq - 1)) // N, diagonal)
        clean = tl.minimum(tl.cdiv(tl.load(starts + tl.minimum(tile * M + M, Sq) - 1), N), diagonal)
    dq = tl.zeros([M, WIDTH], tl.float32)
    for i in tl.range(0, end - diagonal + clean - first):
        key0 = tl.where(i < end - diagonal, diagonal + i, first + i - (end - diagonal)) * N
        key = key0 + tl.arange(0, N)
        visible = position[:, None] >= key[None, :]
        if PACKED:
            visible &= key[None, :] >= start[:, None]
        dq = _query_step(dq, q, do, lse, delta, k_desc, v_desc, b, kv_head, key0, visible, scale_log2, N, WIDTH, True)
    for j in tl.range(clean, diagonal):
        dq = _query_step(dq, q, do, lse, delta, k_desc, v_desc, b, kv_head, j * N, 0, scale_log2, N, WIDTH, False)
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _key_step(
    dk, dv, k, v, q_desc, do_desc, lse_ptr, delta_ptr, b, head, row0, line, key, stop, shift, scale,
    M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dk, dv (N, WIDTH) += what M queries of one head from row0 contribute."""
    q = q_desc.load([b, head, row0, 0]).reshape([M, WIDTH])
    do = do_desc.load([b, head, row0, 0]).reshape([M, WIDTH])
    row = row0 + tl.arange(0, M)
    # The products start from -lse and -delta, one a column, so that nothing but an exponential and a multiplication is
    # left between them and the next products.  The padding's lse is inf, so P is 0 there.
    nothing = tl.zeros([N, M], tl.float32)
    st = tl.dot(k, q.T, nothing - tl.load(lse_ptr + line + row)[None, :] / scale, input_precision="ieee")
    dpt = tl.dot(v, do.T, nothing - tl.load(delta_ptr + line + row)[None, :], input_precision="ieee")
    pt = tl.exp2(st * scale)
    if MASKED:
        pt = tl.where(key[:, None] <= row[None, :] + shift, pt, 0.0)
        if PACKED:
            pt = tl.where(row[None, :] < stop[:, None], pt, 0.0)
    dv = tl.dot(pt.to(k.dtype), do, dv, input_precision="ieee")
    dk = tl.dot((pt * dpt).to(k.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _key_kernel(
    q_desc, k_desc, v_desc, do_desc, dk_ptr, dv_ptr, lse_ptr, delta_ptr, stop_ptr,
    B, Sq, Skv, padded, scale, scale_log2,
    Hkv: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: what GROUP / PARTS query heads contribute to dk and dv of N keys, (PARTS, B, Skv, Hkv, D).

    stop (B, Skv): one past the last token of each token's document.  Early keys have most queries, so they run first.
    """
    HEADS: tl.constexpr = GROUP // PARTS
    pid = tl.program_id(0)
    part = pid % PARTS
    kv_head = (pid // PARTS) % Hkv
    b = (pid // (PARTS * Hkv)) % B
    key0 = (pid // (PARTS * Hkv * B)) * N
    key = key0 + tl.arange(0, N)
    k = k_desc.load([b, kv_head, key0, 0]).reshape([N, WIDTH])
    v = v_desc.load([b, kv_head, key0, 0]).reshape([N, WIDTH])

    # Blocks of M queries in three runs: [first, whole) stands behind some of the keys, [whole, mixed) sees them all,
    # [mixed, end) has queries of other documents.
    shift = Skv - Sq
    first = tl.maximum(key0 - shift, 0) // M
    end = tl.cdiv(Sq, M)
    whole = tl.minimum(tl.cdiv(tl.maximum(key0 + N - 1 - shift, 0), M), end)
    mixed = end
    stop = tl.zeros([N], tl.int32)
    if PACKED:
        stops = stop_ptr + b.to(tl.int64) * Skv
        stop = tl.load(stops + tl.minimum(key, Skv - 1))
        end = tl.cdiv(tl.load(stops + tl.minimum(key0 + N, Skv) - 1), M)
        whole = tl.minimum(whole, end)
        mixed = tl.maximum(tl.minimum(tl.load(stops + key0) // M, end), whole)
    masked = whole - first + end - mixed

    dk = tl.zeros([N, WIDTH], tl.float32)
    dv = tl.zeros([N, WIDTH], tl.float32)
    head0 = kv_head * GROUP + part * HEADS
    divisor = tl.maximum(masked, 1)  # loads run ahead of the loop's condition, and so do their addresses
    for i in tl.range(0, HEADS * masked):  # one flat loop over heads and blocks, for the same reason
        head = head0 + i // divisor
        r = i % divisor
        row0 = tl.where(r < whole - first, first + r, mixed + r - (whole - first)) * M
        line = (b * Hkv * GROUP + head).to(tl.int64) * padded
        dk, dv = _key_step(dk, dv, k, v, q_desc, do_desc, lse_ptr, delta_ptr, b, head, row0, line, key, stop, shift,
                           scale_log2, M, N, WIDTH, True, PACKED)  # fmt: skip
    divisor = tl.maximum(mixed - whole, 1)
    for i in tl.range(0, HEADS * (mixed - whole)):
        head = head0 + i // divisor
        row0 = (whole + i % divisor) * M
        line = (b * Hkv * GROUP + head).to(tl.int64) * padded
        dk, dv = _key_step(dk, dv, k, v, q_desc, do_desc, lse_ptr, delta_ptr, b, head, row0, line, key, stop, shift,
                           scale_log2, M, N, WIDTH, False, PACKED)  # fmt: skip

    d = tl.arange(0, WIDTH)
    inside = (key[:, None] < Skv) & (d[None, :] < D)
    at = (((part * B + b).to(tl.int64) * Skv + key[:, None]) * Hkv + kv_head) * D + d[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_parts_kernel(dk_parts_ptr, dv_parts_ptr, dk_ptr, dv_ptr, numel, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """dk, dv (numel) = sum over parts, in order, of (PARTS, numel) fp32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    dk = tl.zeros([BLOCK], tl.float32)
    dv = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        dk += tl.load(dk_parts_ptr + part * numel + at, mask=inside, other=0.0)
        dv += tl.load(dv_parts_ptr + part * numel + at, mask=inside, other=0.0)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def parts_of(group: int, programs: int) -> int:
    """Into how many parts the heads of a group are dealt: the least divisor of `group` that gives enough programs."""
    return next((n for n in range(1, group) if group % n == 0 and n * programs >= ENOUGH_PROGRAMS), group)


def launch_query(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor, start: Tensor | None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """-> dq like q, contiguous, and delta like lse.  o is contiguous; start as in the forward."""
    B, Sq, Hq, D = q.shape
    Skv, Hkv = k.shape[1:3]
    tile = tile or QUERY_TILE[tile_class(q)]
    width, padded = width_of(D), padded_length(Sq)
    dq = torch.empty(B, Sq, Hq, D, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    _query_kernel[(Hq * B * triton.cdiv(padded, tile.M),)](
        describe(q, tile.M, width), describe(k, tile.N, width), describe(v, tile.N, width),
        describe(do, tile.M, width), o, dq, lse, delta, lse if start is None else start,
        B, Sq, Skv, padded, D**-0.5, D**-0.5 * LOG2_E,
        Hq=Hq, GROUP=Hq // Hkv, D=D, WIDTH=width, M=tile.M, N=tile.N, PACKED=start is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dq, delta


def launch_key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    stop: Tensor | None,
    tile: Tile | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """-> dk and dv like k, contiguous.  stop (B, S) int32 or None."""
    B, Sq, Hq, D = q.shape
    Skv, Hkv = k.shape[1:3]
    tile = tile or KEY_TILE[tile_class(q)]
    width, group = width_of(D), Hq // Hkv
    programs = B * Hkv * triton.cdiv(Skv, tile.N)
    parts = parts or parts_of(group, programs)
    dk, dv = (torch.empty(B, Skv, Hkv, D, dtype=q.dtype, device=q.device) for _ in "kv")
    dk_parts, dv_parts = dk, dv
    if parts > 1:
        dk_parts, dv_parts = (torch.empty(parts, *dk.shape, dtype=torch.float32, device=q.device) for _ in "kv")
    _key_kernel[(programs * parts,)](
        describe(q, tile.M, width), describe(k, tile.N, width), describe(v, tile.N, width),
        describe(do, tile.M, width), dk_parts, dv_parts, lse, delta, lse if stop is None else stop,
        B, Sq, Skv, lse.shape[-1], D**-0.5, D**-0.5 * LOG2_E,
        Hkv=Hkv, GROUP=group, PARTS=parts, D=D, WIDTH=width, M=tile.M, N=tile.N, PACKED=stop is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        _add_parts_kernel[(triton.cdiv(dk.numel(), 2048),)](
            dk_parts, dv_parts, dk, dv, dk.numel(), PARTS=parts, BLOCK=2048, num_warps=4
        )
    return dk, dv

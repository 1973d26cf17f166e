"""Triton kernels of the router: forward in one launch, backward in three and a small sum.

The logits decide which experts compute, so their product has fp32 accuracy whatever the operands: fp32 operands are
multiplied outside the tensor cores, and bf16 pairs exactly on them; an fp32 operand that meets a bf16 one is split into
bf16 pieces that add up to it (three hold 24 bits).  Tensor cores cut off what they add to a long sum instead of
rounding it, so long sums are broken into short ones.

Suffixes: T tokens, D width, E experts (E_PAD: next power of two), K chosen per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import INTERPRET

WARPS = 8


@triton.jit
def _rest(x, FIRST: tl.constexpr):
    """Piece number FIRST of x: what the pieces before it left over, rounded to bf16."""
    rest = x
    for _ in tl.static_range(FIRST):
        rest -= rest.to(tl.bfloat16).to(tl.float32)
    return rest.to(tl.bfloat16)


@triton.jit
def _dot(a, b, acc, SPLIT: tl.constexpr, COUNT: tl.constexpr):
    """acc + a b.  SPLIT: in bf16, products of pieces i and j with i + j < COUNT; otherwise in fp32."""
    if SPLIT:
        A: tl.constexpr = COUNT if a.dtype == tl.float32 else 1
        B: tl.constexpr = COUNT if b.dtype == tl.float32 else 1
        for i in tl.static_range(A):
            for j in tl.static_range(B):
                if i + j < COUNT:
                    ai = _rest(a, i) if A > 1 else a
                    bj = _rest(b, j) if B > 1 else b
                    acc = tl.dot(ai, bj, acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def _sort_key(score, col, E_PAD: tl.constexpr):
    """An int64 that orders as score does, and among equals puts the lowest column first."""
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards as integers
    return (bits.to(tl.int64) << 32) | (E_PAD - 1 - col).to(tl.int64)


@triton.jit
def _route_kernel(
    x_ptr, w_ptr, bias_ptr, scores_ptr, weights_ptr, experts_ptr, T, x_stride, scale,
    D: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    N_GROUP: tl.constexpr, G_PAD: tl.constexpr, TOPK_GROUP: tl.constexpr, NORM: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens and all experts.  x (T, D), w (E, D), scores (T, E), weights and experts (T, K)."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < T
    t = t.to(tl.int64)
    col = tl.arange(0, E_PAD)
    logits = tl.zeros([BLOCK_T, E_PAD], tl.float32)
    for d0 in range(0, D, 2 * BLOCK_D):
        short = tl.zeros([BLOCK_T, E_PAD], tl.float32)
        for half in tl.static_range(2):
            d = d0 + half * BLOCK_D + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + t[:, None] * x_stride + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
            w = tl.load(w_ptr + col[None, :] * D + d[:, None], mask=(col < E)[None, :] & (d < D)[:, None], other=0.0)
            short = _dot(x, w, short, SPLIT, 3)
        logits += short
    scores = 1.0 / (1.0 + tl.exp(-logits))
    tl.store(scores_ptr + t[:, None] * E + col[None, :], scores, mask=live[:, None] & (col < E)[None, :])

    # Picking the largest K times leaves no state behind but the marks of those taken.
    LOWEST: tl.constexpr = -(2**63)
    bias = tl.load(bias_ptr + col, mask=col < E, other=0.0).to(tl.float32)
    key = tl.where((col < E)[None, :], _sort_key(scores + bias[None, :], col[None, :], E_PAD), LOWEST)
    if N_GROUP > 1:
        SIZE: tl.constexpr = E // N_GROUP
        g_col = tl.arange(0, G_PAD)
        group_key = tl.full([BLOCK_T, G_PAD], LOWEST, tl.int64)
        select = scores + bias[None, :]
        for g in tl.static_range(N_GROUP):
            inside = tl.where((col // SIZE == g)[None, :], key, LOWEST)
            best = tl.max(inside, 1)
            second = tl.max(tl.where(inside == best[:, None], LOWEST, inside), 1)
            both = (key == best[:, None]) | (key == second[:, None])
            value = tl.sum(tl.where(both & (col < E)[None, :], select, 0.0), 1)
            group_key = tl.where((g_col == g)[None, :], _sort_key(value[:, None], g_col[None, :], G_PAD), group_key)
        kept = tl.zeros([BLOCK_T, E_PAD], tl.int32)
        for _ in tl.static_range(TOPK_GROUP):
            best = tl.max(group_key, 1)
            g = (G_PAD - 1 - (best & 0xFFFFFFFF)).to(tl.int32)
            kept = tl.where((col // SIZE)[None, :] == g[:, None], 1, kept)
            group_key = tl.where(group_key == best[:, None], LOWEST, group_key)
        key = tl.where(kept == 1, key, LOWEST)

    k_col = tl.arange(0, K_PAD)
    weights = tl.zeros([BLOCK_T, K_PAD], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for k in tl.static_range(K):
        best = tl.max(key, 1)
        # The clamp matters only if fewer than K experts remain: a wrong id must not become a wild address.
        e = tl.minimum((E_PAD - 1 - (best & 0xFFFFFFFF)).to(tl.int32), E - 1)
        s = tl.sum(tl.where(col[None, :] == e[:, None], scores, 0.0), 1)
        key = tl.where(key == best[:, None], LOWEST, key)
        tl.store(experts_ptr + t * K + k, e.to(tl.int64), mask=live)
        weights = tl.where((k_col == k)[None, :], s[:, None], weights)
        total += s
    if NORM:
        weights = weights / (total[:, None] + 1e-20)
    tl.store(weights_ptr + t[:, None] * K + k_col[None, :], weights * scale, mask=live[:, None] & (k_col < K)[None, :])


def _blocks(E: int, x: Tensor) -> dict[str, int]:
    """Tiles of at most 8,192 numbers (fp32: half, its products need more registers): 32 a thread."""
    E_PAD = max(16, triton.next_power_of_2(E))
    if INTERPRET:
        return {"E_PAD": E_PAD, "BLOCK_T": 16, "BLOCK_D": 16}
    wide = x.element_size() == 4
    rows = max(16, min(64, (4096 if wide else 8192) // E_PAD))
    return {"E_PAD": E_PAD, "BLOCK_T": rows, "BLOCK_D": rows}


def _splits(x: Tensor, w: Tensor) -> bool:
    """bf16 on the tensor cores, unless everything is fp32 already (or fp16, whose pieces would underflow)."""
    return x.dtype == torch.bfloat16 and w.dtype in (torch.bfloat16, torch.float32)


def route_forward(
    x: Tensor, w: Tensor, bias: Tensor, K: int, n_group: int, topk_group: int, norm: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """scores (T, E) and weights (T, K) in fp32, experts (T, K) int64.  x: (T, D) with unit last stride, w: (E, D)."""
    (T, D), E = x.shape, w.shape[0]
    scores = torch.empty(T, E, dtype=torch.float32, device=x.device)
    weights = torch.empty(T, K, dtype=torch.float32, device=x.device)
    experts = torch.empty(T, K, dtype=torch.int64, device=x.device)
    blocks = _blocks(E, x)
    _route_kernel[(triton.cdiv(T, blocks["BLOCK_T"]),)](
        x, w, bias, scores, weights, experts, T, x.stride(0), scale,
        D=D, E=E, K=K, K_PAD=triton.next_power_of_2(K), N_GROUP=n_group, G_PAD=triton.next_power_of_2(n_group),
        TOPK_GROUP=topk_group, NORM=norm, SPLIT=_splits(x, w), **blocks, num_warps=WARPS, num_stages=2,
    )  # fmt: skip
    return scores, weights, experts


# With W = sum_k s_k and w_k = scale s_k / W:   ds_k = scale (dw_k - sum_j dw_j s_j / W) / W;   dl = ds s (1 - s).
@triton.jit
def _dlogits_kernel(
    dscores_ptr, dweights_ptr, scores_ptr, experts_ptr, dlogits_ptr, pieces_ptr, T, scale,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    HAS_DSCORES: tl.constexpr, HAS_DWEIGHTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens.  dlogits (T, E) fp32; pieces, if given, (T, 2, E): two bf16 that add up to it."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < T
    t = t.to(tl.int64)
    col = tl.arange(0, E_PAD)
    mask = live[:, None] & (col < E)[None, :]
    scores = tl.load(scores_ptr + t[:, None] * E + col[None, :], mask=mask, other=0.0)
    ds = tl.zeros([BLOCK_T, E_PAD], tl.float32)
    if HAS_DSCORES:
        ds += tl.load(dscores_ptr + t[:, None] * E + col[None, :], mask=mask, other=0.0)
    if HAS_DWEIGHTS:
        total = tl.full([BLOCK_T], 1e-20, tl.float32)
        inner = tl.zeros([BLOCK_T], tl.float32)
        if NORM:
            for k in range(K):
                e = tl.load(experts_ptr + t * K + k, mask=live, other=0)
                s = tl.load(scores_ptr + t * E + e, mask=live, other=1.0)
                total += s
                inner += s * tl.load(dweights_ptr + t * K + k, mask=live, other=0.0)
        for k in range(K):
            e = tl.load(experts_ptr + t * K + k, mask=live, other=0).to(tl.int32)
            ds_k = scale * tl.load(dweights_ptr + t * K + k, mask=live, other=0.0)
            if NORM:
                ds_k = (ds_k - scale * inner / total) / total
            ds += tl.where(col[None, :] == e[:, None], ds_k[:, None], 0.0)
    dlogits = ds * scores * (1.0 - scores)
    tl.store(dlogits_ptr + t[:, None] * E + col[None, :], dlogits, mask=mask)
    if pieces_ptr is not None:
        for i in tl.static_range(2):
            tl.store(pieces_ptr + (2 * t[:, None] + i) * E + col[None, :], _rest(dlogits, i), mask=mask)


@triton.jit
def _dx_kernel(
    dlogits_ptr, w_ptr, dx_ptr, T,
    D: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dx = dlogits w, (T, D)."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < T
    t = t.to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        dl = tl.load(dlogits_ptr + t[:, None] * E + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0)
        w = tl.load(w_ptr + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0)
        dx = _dot(dl, w, dx, SPLIT, 2)  # two pieces, 16 bits: SPLIT means a bf16 result
    dx_ptrs = dx_ptr + t[:, None] * D + d[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _dw_kernel(
    dlogits_ptr, x_ptr, part_ptr, T, x_stride, tokens,
    D: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, SPLIT: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: dlogits^T x over `tokens` tokens and BLOCK_D columns.  part (splits, E, D) fp32, summed later."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.program_id(1) * tokens
    end = tl.minimum(begin + tokens, T)
    col = tl.arange(0, E_PAD)
    acc = tl.zeros([E_PAD, BLOCK_D], tl.float32)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = t < end
        t = t.to(tl.int64)
        dl = tl.load(dlogits_ptr + t[None, :] * E + col[:, None], mask=live[None, :] & (col < E)[:, None], other=0.0)
        x = tl.load(x_ptr + t[:, None] * x_stride + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        acc = _dot(dl, x, acc, SPLIT, COUNT)
    where = (tl.program_id(1).to(tl.int64) * E + col)[:, None] * D + d[None, :]
    tl.store(part_ptr + where, acc, mask=(col < E)[:, None] & (d < D)[None, :])


def route_backward(
    dscores: Tensor | None,
    dweights: Tensor | None,
    x: Tensor,
    w: Tensor,
    scores: Tensor,
    experts: Tensor,
    norm: bool,
    scale: float,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    (T, D), (E, K) = x.shape, (w.shape[0], experts.shape[1])
    blocks = _blocks(E, x)
    dlogits = torch.empty_like(scores)
    pieces = None
    if need_dx and _splits(x, w) and w.dtype == x.dtype:
        pieces = torch.empty(T, 2 * E, dtype=x.dtype, device=x.device)
    few = max(2, 2048 // blocks["E_PAD"])  # few tokens: a thread keeps K ids and gradients of each of its rows
    _dlogits_kernel[(triton.cdiv(T, few),)](
        dscores, dweights, scores, experts, dlogits, pieces, T, scale, E=E, E_PAD=blocks["E_PAD"], K=K, NORM=norm,
        HAS_DSCORES=dscores is not None, HAS_DWEIGHTS=dweights is not None, BLOCK_T=few, num_warps=4,
    )  # fmt: skip
    dx = None
    if pieces is not None:  # one product of bf16, which cuBLAS has four times faster than `_dx_kernel`
        dx = pieces @ torch.cat([w, w])
    elif need_dx:
        dx = torch.empty(T, D, dtype=x.dtype, device=x.device)
        block_t, block_d, block_e = (16, 32, 16) if INTERPRET else (64, 128, 64)
        _dx_kernel[(triton.cdiv(D, block_d) * triton.cdiv(T, block_t),)](
            dlogits, w, dx, T, D=D, E=E, SPLIT=_splits(x, w),
            BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_E=block_e,
            num_warps=WARPS, num_stages=2,
        )  # fmt: skip
    if not need_dw:
        return dx, None
    tokens = blocks["BLOCK_T"] * max(1, triton.cdiv(T, 8 * blocks["BLOCK_T"]))  # at most 8 partial sums
    splits = triton.cdiv(T, tokens)
    part = torch.empty(splits, E, D, dtype=torch.float32, device=x.device)
    _dw_kernel[(triton.cdiv(D, blocks["BLOCK_D"]), splits)](
        dlogits, x, part, T, x.stride(0), tokens, D=D, E=E, SPLIT=_splits(x, w),
        COUNT=3 if w.dtype == torch.float32 else 2, **blocks, num_warps=WARPS, num_stages=2,
    )  # fmt: skip
    return dx, part.sum(0).to(w.dtype)

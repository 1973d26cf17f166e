"""The forward kernels of `kernels.attention`: a tile of queries walks along its keys with a running softmax.

    S = scale Q K^T        m, l: running row maximum and sum of exp(S - m)        O = sum exp(S - m) V / l

Source: online softmax, arXiv:1805.02867; the tiling and the saved log-sum-exp, FlashAttention-2, arXiv:2307.08691.
Exponentials are powers of two with log2(e) folded into the scale.  Saved for the backward: lse = m + log2 l, one fp32
number a query and head.  Decoding (one query) splits the keys over programs and adds the parts up in order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._descriptors import descriptor

LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-1.0e30)  # a hidden score: finite, so that a row with no visible key yet gives 1 and not NaN


@dataclass(frozen=True)
class Tile:
    """Sizes of one launch.  M: queries, N: keys a step.  defer: the product P V of a step is issued after the next
    step's Q K^T, so that the tensor cores work on it during the next softmax."""

    M: int
    N: int
    warps: int
    stages: int
    defer: bool = False


# large: 16-bit operands where a program may have 200 KB of shared memory (Hopper, Blackwell); small: elsewhere;
# fp32: exact arithmetic does without tensor cores, and only has to fit.
FORWARD_TILE = {
    "large": Tile(64, 64, 4, 3),
    "small": Tile(64, 32, 8, 2),
    "fp32": Tile(16, 16, 8, 1, defer=True),
}
PAD = 128  # rows of lse and delta are padded to this, so that a whole tile of queries can be read without a mask


@triton.jit
def _softmax_step(s, m, l, scale):
    """Fold the scores s (M, N) into the running maximum m and sum l; returns p, alpha, m, l.  m is in units of log2."""
    new = tl.maximum(m, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    alpha = tl.exp2(m - new)
    return p, alpha, new, l * alpha + tl.sum(p, axis=1)


@triton.jit
def _forward_kernel(
    q_desc, k_desc, v_desc, o_ptr, lse_ptr, start_ptr,
    B, Sq, Skv, padded, scale,
    Hq: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr, DEFER: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one head.  q (B, Hq, Sq, D), k and v (B, Hkv, Skv, D) behind descriptors of WIDTH
    columns, o (B, Sq, Hq, D), lse (B, Hq, padded), start (B, Skv): the first token of each token's document.

    Heads vary fastest, so that the heads of a group read the same keys at the same time; long tiles run first, so
    that no long one is left over at the end.
    """
    pid = tl.program_id(0)
    head = pid % Hq
    b = (pid // Hq) % B
    tiles = tl.cdiv(padded, M)
    tile = tiles - 1 - pid // (Hq * B)
    kv_head = head // GROUP
    q = q_desc.load([b, head, tile * M, 0]).reshape([M, WIDTH])
    rows = tile * M + tl.arange(0, M)
    position = rows + (Skv - Sq)  # the queries are the last ones
    cols = tl.arange(0, N)

    # Blocks of N keys in three runs: [first, clean) has keys of other documents, [clean, diagonal) is seen whole by
    # every query, [diagonal, end) has keys ahead of some.  The masked runs go first, as one loop.
    lowest = tile * M + (Skv - Sq)
    diagonal = lowest // N
    end = tl.cdiv(tl.minimum(lowest + M, Skv), N)
    diagonal = tl.minimum(diagonal, end - 1)  # a tile that lies wholly in the padding still needs one block
    first = 0
    clean = 0
    start = tl.zeros([M], tl.int32)
    if PACKED:
        line = start_ptr + b.to(tl.int64) * Skv
        start = tl.load(line + tl.minimum(rows, Sq - 1))
        first = tl.minimum(tl.load(line + tl.minimum(tile * M, Sq - 1)) // N, diagonal)
        clean = tl.minimum(tl.cdiv(tl.load(line + tl.minimum(tile * M + M, Sq) - 1), N), diagonal)
    masked = end - diagonal + clean - first

    m = tl.full([M], LOWEST, tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDTH], tl.float32)
    if DEFER:
        k = k_desc.load([b, kv_head, diagonal * N, 0]).reshape([N, WIDTH])
        s = tl.dot(q, k.T, input_precision="ieee")
        key = diagonal * N + cols
        visible = position[:, None] >= key[None, :]
        if PACKED:
            visible &= key[None, :] >= start[:, None]
        p, alpha, m, l = _softmax_step(tl.where(visible, s, LOWEST), m, l, scale)
        p = p.to(q.dtype)
        for i in tl.range(1, masked):
            j = tl.where(i < end - diagonal, diagonal + i, first + i - (end - diagonal))
            before = tl.where(i - 1 < end - diagonal, diagonal + i - 1, first + i - 1 - (end - diagonal))
            k = k_desc.load([b, kv_head, j * N, 0]).reshape([N, WIDTH])
            s = tl.dot(q, k.T, input_precision="ieee")
            v = v_desc.load([b, kv_head, before * N, 0]).reshape([N, WIDTH])
            acc = acc * alpha[:, None]
            acc = tl.dot(p, v, acc, input_precision="ieee")
            key = j * N + cols
            visible = position[:, None] >= key[None, :]
            if PACKED:
                visible &= key[None, :] >= start[:, None]
            p, alpha, m, l = _softmax_step(tl.where(visible, s, LOWEST), m, l, scale)
            p = p.to(q.dtype)
        last = tl.where(clean > first, clean - 1, end - 1)
        for j in tl.range(clean, diagonal):
            k = k_desc.load([b, kv_head, j * N, 0]).reshape([N, WIDTH])
            s = tl.dot(q, k.T, input_precision="ieee")
            before = tl.where(j > clean, j - 1, last)
            v = v_desc.load([b, kv_head, before * N, 0]).reshape([N, WIDTH])
            acc = acc * alpha[:, None]
            acc = tl.dot(p, v, acc, input_precision="ieee")
            p, alpha, m, l = _softmax_step(s, m, l, scale)
            p = p.to(q.dtype)
        last = tl.where(diagonal > clean, diagonal - 1, last)
        v = v_desc.load([b, kv_head, last * N, 0]).reshape([N, WIDTH])
        acc = acc * alpha[:, None]
        acc = tl.dot(p, v, acc, input_precision="ieee")
    else:
        for i in tl.range(0, masked):
            j = tl.where(i < end - diagonal, diagonal + i, first + i - (end - diagonal))
            k = k_desc.load([b, kv_head, j * N, 0]).reshape([N, WIDTH])
            s = tl.dot(q, k.T, input_precision="ieee")
            key = j * N + cols
            visible = position[:, None] >= key[None, :]
            if PACKED:
                visible &= key[None, :] >= start[:, None]
            p, alpha, m, l = _softmax_step(tl.where(visible, s, LOWEST), m, l, scale)
            v = v_desc.load([b, kv_head, j * N, 0]).reshape([N, WIDTH])
            acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision="ieee")
        for j in tl.range(clean, diagonal):
            k = k_desc.load([b, kv_head, j * N, 0]).reshape([N, WIDTH])
            s = tl.dot(q, k.T, input_precision="ieee")
            p, alpha, m, l = _softmax_step(s, m, l, scale)
            v = v_desc.load([b, kv_head, j * N, 0]).reshape([N, WIDTH])
            acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision="ieee")

    real = rows < Sq
    # In the padding lse = inf: the backward's exp2(s - lse) is then 0 there, without a mask.
    lse = tl.where(real, m + tl.log2(l), float("inf"))
    tl.store(lse_ptr + (b * Hq + head).to(tl.int64) * padded + rows, lse)
    d = tl.arange(0, WIDTH)
    o = o_ptr + ((b.to(tl.int64) * Sq + rows[:, None]) * Hq + head) * D + d[None, :]
    tl.store(o, (acc / l[:, None]).to(o_ptr.dtype.element_ty), mask=real[:, None] & (d[None, :] < D))


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr,
    Skv, split, scale, q_batch, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    Hkv: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: the GROUP queries of one key-value head against `split` keys.

    part (splits, B, Hq, D) and lse (splits, B, Hq), fp32: the softmax over these keys alone, and its log-sum-exp.
    """
    b = (tl.program_id(0) // Hkv).to(tl.int64)
    kv_head = tl.program_id(0) % Hkv
    part = tl.program_id(1)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    head = kv_head * GROUP + r
    q = tl.load(
        q_ptr + b * q_batch + head[:, None].to(tl.int64) * q_head + d[None, :],
        mask=(r[:, None] < GROUP) & (d[None, :] < D),
        other=0.0,
    )
    k_ptr += b * k_batch + kv_head.to(tl.int64) * k_head
    v_ptr += b * v_batch + kv_head.to(tl.int64) * v_head
    m = tl.full([ROWS], LOWEST, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    stop = tl.minimum((part + 1) * split, Skv)
    for key0 in tl.range(part * split, stop, N):
        key = key0 + tl.arange(0, N)
        inside = (key[:, None] < stop) & (d[None, :] < D)
        at = key[:, None].to(tl.int64)
        k = tl.load(k_ptr + at * k_row + d[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + at * v_row + d[None, :], mask=inside, other=0.0)
        s = tl.dot(q, k.T, input_precision="ieee")
        p, alpha, m, l = _softmax_step(tl.where(key[None, :] < stop, s, LOWEST), m, l, scale)
        acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision="ieee")
    out = (part * (tl.num_programs(0) // Hkv) + b) * (Hkv * GROUP) + head
    tl.store(lse_ptr + out, m + tl.log2(l), mask=r < GROUP)
    tl.store(part_ptr + out[:, None] * D + d[None, :], acc / l[:, None], mask=(r[:, None] < GROUP) & (d[None, :] < D))


@triton.jit
def _combine_kernel(
    part_ptr, lse_ptr, o_ptr, lines, splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):
    """One program: a head of a sequence; o (lines, D) = sum over parts of part * exp(lse_part - lse)."""
    line = tl.program_id(0)
    i = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    lse = tl.load(lse_ptr + i * lines + line, mask=i < splits, other=-float("inf"))
    weight = tl.exp2(lse - tl.max(lse, axis=0))
    weight /= tl.sum(weight, axis=0)
    at = (i[:, None].to(tl.int64) * lines + line) * D + d[None, :]
    parts = tl.load(part_ptr + at, mask=(i[:, None] < splits) & (d[None, :] < D), other=0.0)
    o = tl.sum(parts * weight[:, None], axis=0)
    tl.store(o_ptr + line.to(tl.int64) * D + d, o.to(o_ptr.dtype.element_ty), mask=d < D)


def describe(t: Tensor, rows: int, width: int) -> TensorDescriptor:
    """A descriptor of t (B, S, H, D) for tiles of `rows` positions of one head; what lies outside reads as 0."""
    return descriptor(t.transpose(1, 2), [1, 1, rows, width])


def tile_class(q: Tensor) -> str:
    if q.element_size() == 4:
        return "fp32"
    return "large" if not q.is_cuda or torch.cuda.get_device_capability(q.device) in ((9, 0), (10, 0)) else "small"


def width_of(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def padded_length(S: int) -> int:
    return triton.cdiv(S, PAD) * PAD


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """q (B, Sq, Hq, D), k and v (B, Skv, Hkv, D), all describable; start (B, S) int32 or None -> o like q, and lse."""
    B, Sq, Hq, D = q.shape
    Skv, Hkv = k.shape[1:3]
    tile = tile or FORWARD_TILE[tile_class(q)]
    width, padded = width_of(D), padded_length(Sq)
    o = torch.empty(B, Sq, Hq, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, Hq, padded, dtype=torch.float32, device=q.device)
    _forward_kernel[(Hq * B * triton.cdiv(padded, tile.M),)](
        describe(q, tile.M, width), describe(k, tile.N, width), describe(v, tile.N, width),
        o, lse, lse if start is None else start,
        B, Sq, Skv, padded, D**-0.5 * LOG2_E,
        Hq=Hq, GROUP=Hq // Hkv, D=D, WIDTH=width, M=tile.M, N=tile.N, PACKED=start is not None, DEFER=tile.defer,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return o, lse


def launch_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, 1, Hq, D), k and v (B, Skv, Hkv, D) with unit last stride -> (B, 1, Hq, D).  No gradient."""
    B, _, Hq, D = q.shape
    Skv, Hkv = k.shape[1:3]
    N = 64 if q.element_size() == 2 else 32
    # About two programs an SM of a large GPU, but no part so short that its start costs more than its keys.
    splits = max(1, min(256 // (B * Hkv), triton.cdiv(Skv, 4 * N), 128))
    split = triton.cdiv(triton.cdiv(Skv, splits), N) * N
    splits = triton.cdiv(Skv, split)
    part = torch.empty(splits, B, Hq, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, B, Hq, dtype=torch.float32, device=q.device)
    o = torch.empty(B, 1, Hq, D, dtype=q.dtype, device=q.device)
    _decode_kernel[(B * Hkv, splits)](
        q, k, v, part, lse,
        Skv, split, D**-0.5 * LOG2_E, q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3],
        Hkv=Hkv, GROUP=Hq // Hkv, ROWS=max(16, triton.next_power_of_2(Hq // Hkv)), D=D, WIDTH=width_of(D), N=N,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _combine_kernel[(B * Hq,)](
        part, lse, o, B * Hq, splits, D=D, WIDTH=width_of(D), SPLITS=triton.next_power_of_2(splits), num_warps=4
    )
    return o

"""What the SSD kernels share: tiles, and everything that depends on dt alone, before and after the large kernels.

`prepare` turns dt into a few fp32 numbers per token and head (steps, decays, resets) that the other kernels only load;
`ddt_and_parameters` takes what the backward kernels leave per token and head (the flows) back through the decay sums,
the clamp and softplus.  `kernels.ssd_backward` derives the flows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import INTERPRET

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-37)  # below this a step counts as zero: its logarithm stays finite
# Rows of `Steps.vectors`, described in `_prepare_kernel`.
KINDS = tl.constexpr(6)
STEP, DECAY, SOURCE, TO_END, FROM_START, MIDDLE = (tl.constexpr(i) for i in range(6))
LARGEST = tl.constexpr(126.0)  # exponents are cut here so that masked-out pairs give 0 * finite, not 0 * inf

# Rows of the flows, (B, chunks, H, FLOWS, Q) in fp32: what the large kernels leave for `_ddt_kernel`.
FLOWS = tl.constexpr(6)
ROWS, COLUMNS, ACROSS, SKIP, LEAVE, ENTER = (tl.constexpr(i) for i in range(6))
# ROWS     row sums of M, of the two blocks on the diagonal
# COLUMNS  their column sums, over the very same numbers
# ACROSS   of the block between them: row sums in the first half of the chunk, column sums in the second
# SKIP     x_j . dy_j
# LEAVE    e_j, towards the state
# ENTER    r_i, from the state


class Tiles(NamedTuple):
    """Sizes that the kernels are built for.  R: tokens of a block, half a chunk.  P, N: the padded state."""

    R: int
    P: int
    N: int
    warps: int
    stages: int  # loads in flight in the loops over heads

    @property
    def Q(self) -> int:
        return 2 * self.R


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def pick_tiles(dtype: torch.dtype, device: torch.device, P: int, N: int) -> Tiles | None:
    """None if the state is too large for these kernels."""
    BP, BN = (max(16, triton.next_power_of_2(n)) for n in (P, N))
    if BP > 128 or BN > 256:
        return None
    small = BP <= 64 and BN <= 128
    if INTERPRET:
        return Tiles(16, BP, BN, 4, 1)
    if dtype == torch.float32:  # for checking and small models: exact products, no tensor cores, hence many registers
        return Tiles(16, BP, BN, 8, 1)
    room = shared_memory(device)
    if small and room >= 160_000:  # A100, H100, B200
        return Tiles(64, BP, BN, 4, 2)
    return Tiles(32, BP, BN, 4, 1 if room < 120_000 or not small else 2)


@triton.jit
def load_rows(ptr, start, stride, end, rows, cols, COLS: tl.constexpr):
    """[rows, cols] from row `start` on, zeros from row `end` and from column COLS on.  ptr: row 0."""
    mask = (rows < end - start)[:, None]
    if cols.shape[0] > COLS or COLS & (COLS - 1) != 0:  # else no block of columns reaches past the row's end
        mask = mask & (cols < COLS)[None, :]
    ptr += start.to(tl.int64) * stride
    return tl.load(ptr + (rows[:, None] * stride + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def softplus(v):
    """max(v, 0) + log(1 + exp(-|v|)), the logarithm as a series in u / (2 + u): right to 1e-7 for tiny u too."""
    u = tl.exp(-tl.abs(v))
    s = u / (2.0 + u)  # at most 1/3; log(1 + u) = 2 artanh(s)
    q = s * s
    p = 1.0 / 13.0 + q * (1.0 / 15.0)
    p = 1.0 / 11.0 + q * p
    p = 1.0 / 9.0 + q * p
    p = 1.0 / 7.0 + q * p
    p = 1.0 / 5.0 + q * p
    p = 1.0 / 3.0 + q * p
    return tl.maximum(v, 0.0) + 2.0 * s * (1.0 + q * p)


@triton.jit
def _prepare_kernel(
    dt_ptr,
    A_ptr,
    bias_ptr,
    idx_ptr,
    vectors_ptr,
    keep_ptr,
    S,
    H,
    n_chunks,
    dt_batch,
    dt_token,
    idx_batch,
    low,
    high,
    CLAMP: tl.constexpr,
    HAS_IDX: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: a chunk of Q = 2 R tokens, BLOCK_H heads.  dt (B, S, H) strided; vectors (B, chunks, H, KINDS, Q).

    step        dt after bias, softplus and clamp; 0 past the end of the row, which makes those tokens no-ops
    decay       a_t / ln 2
    source      (a_t - ln dt_t) / ln 2: 2^(decay_i - source_j) = exp(a_i - a_j) dt_j
    to_end      exp(a_last - a_t) dt_t, 0 if t is not of the chunk's last document
    from_start  exp(a_t), 0 if t is not of the document that enters the chunk
    middle      first block: exp(a_m - a_t) dt_t with m its last token; second block: exp(a_t - a_m)
    keep        exp(a_last), 0 if the chunk holds a document's start
    """
    Q: tl.constexpr = 2 * R
    row = tl.program_id(0) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    q = tl.arange(0, Q)
    t = chunk * Q + q
    heads = h < H
    inside = heads[:, None] & (t < S)[None, :]  # [BLOCK_H, Q]
    p_dt = (
        dt_ptr + row.to(tl.int64) * dt_batch + (chunk.to(tl.int64) * Q) * dt_token + q[None, :] * dt_token + h[:, None]
    )
    dt = tl.load(p_dt, mask=inside, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + h, mask=heads, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + h, mask=heads, other=0.0).to(tl.float32)
    dt = softplus(dt + bias[:, None])
    if CLAMP:
        dt = tl.minimum(tl.maximum(dt, low), high)
    dt = tl.where(inside, dt, 0.0)
    a = tl.cumsum(dt * (A * LOG2E)[:, None], axis=1)
    a_last = tl.sum(tl.where((q == Q - 1)[None, :], a, 0.0), axis=1)
    a_middle = tl.sum(tl.where((q == R - 1)[None, :], a, 0.0), axis=1)
    to_end = tl.exp2(a_last[:, None] - a) * dt
    from_start = tl.exp2(a)
    first = (q < R)[None, :]
    gap = tl.where(first, a_middle[:, None] - a, a - a_middle[:, None])
    middle = tl.exp2(gap) * tl.where(first, dt, 1.0)
    keep = tl.exp2(a_last)
    if HAS_IDX:
        p_idx = idx_ptr + row.to(tl.int64) * idx_batch
        idx = tl.load(p_idx + t, mask=t < S, other=-1)
        last = tl.load(p_idx + tl.minimum(chunk * Q + Q, S) - 1)
        before = tl.load(
            p_idx + tl.maximum(chunk * Q - 1, 0)
        )  # the initial state belongs to the first token's document
        to_end = tl.where((idx == last)[None, :], to_end, 0.0)
        from_start = tl.where((idx == before)[None, :], from_start, 0.0)
        keep = tl.where(last == before, keep, 0.0)
    vector = (tl.program_id(0) * H + h).to(tl.int64)  # (row, chunk, head)
    out = vectors_ptr + vector[:, None] * (KINDS * Q) + q[None, :]
    tl.store(out + STEP * Q, dt, mask=heads[:, None])
    tl.store(out + DECAY * Q, a, mask=heads[:, None])
    tl.store(out + SOURCE * Q, a - tl.log2(tl.maximum(dt, TINY)), mask=heads[:, None])
    tl.store(out + TO_END * Q, to_end, mask=heads[:, None])
    tl.store(out + FROM_START * Q, from_start, mask=heads[:, None])
    tl.store(out + MIDDLE * Q, middle, mask=heads[:, None])
    tl.store(keep_ptr + vector, keep, mask=heads)


class Steps(NamedTuple):
    """What `prepare` makes of dt, in fp32: per head and chunk side by side, so that one address serves."""

    vectors: Tensor  # (B, chunks, H, KINDS, 2 R)
    keep: Tensor  # (B, chunks, H)


def prepare(
    dt: Tensor, A: Tensor, dt_bias: Tensor, dt_limit: tuple[float, float], seq_idx: Tensor | None, tiles: Tiles
) -> Steps:
    """dt: (B, S, H), any strides with the last 1."""
    Bt, S, H = dt.shape
    n_chunks = triton.cdiv(S, tiles.Q)
    vectors = torch.empty(Bt, n_chunks, H, KINDS.value, tiles.Q, device=dt.device, dtype=torch.float32)
    steps = Steps(vectors, torch.empty(Bt, n_chunks, H, device=dt.device, dtype=torch.float32))
    block = min(16, triton.next_power_of_2(H))
    _prepare_kernel[(Bt * n_chunks, triton.cdiv(H, block))](
        dt, A, dt_bias, dt if seq_idx is None else seq_idx, *steps, S, H, n_chunks,
        dt.stride(0), dt.stride(1), 0 if seq_idx is None else seq_idx.stride(0), *dt_limit,
        CLAMP=dt_limit != (0.0, torch.inf), HAS_IDX=seq_idx is not None, R=tiles.R, BLOCK_H=block,
        num_warps=4,
    )  # fmt: skip
    return steps


@triton.jit
def _ddt_kernel(
    dt_ptr,
    A_ptr,
    bias_ptr,
    vectors_ptr,
    own_ptr,
    flows_ptr,
    through_ptr,
    ddt_ptr,
    parts_ptr,
    S,
    H,
    n_chunks,
    share,
    dt_batch,
    dt_token,
    ddt_batch,
    ddt_token,
    low,
    high,
    CLAMP: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program: a chunk, BLOCK_H heads.  q (module docstring), then the chain rule through clamp and softplus.

    dt and ddt (B, S, H) strided; parts (3, B chunks, H): this chunk's share of dA, dD and ddt_bias.
    """
    Q: tl.constexpr = 2 * R
    item = tl.program_id(0)
    row = item // n_chunks
    chunk = item % n_chunks
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    q = tl.arange(0, Q)
    heads = h < H
    real = heads[:, None] & (q < S - chunk * Q)[None, :]
    vector = (item * H + h).to(tl.int64)
    p_f = flows_ptr + vector[:, None] * (FLOWS * Q) + q[None, :]
    some = heads[:, None]
    A = tl.load(A_ptr + h, mask=heads, other=0.0).to(tl.float32)
    step = tl.load(vectors_ptr + vector[:, None] * (KINDS * Q) + STEP * Q + q[None, :], mask=some, other=0.0)
    leave = tl.load(p_f + LEAVE * Q, mask=some, other=0.0)
    skip = tl.load(p_f + SKIP * Q, mask=some, other=0.0)
    rows = tl.load(p_f + ROWS * Q, mask=some, other=0.0)
    columns = tl.load(p_f + COLUMNS * Q, mask=some, other=0.0)
    crossing = (columns - rows) + tl.load(p_f + ENTER * Q, mask=some, other=0.0)
    across = tl.load(p_f + ACROSS * Q, mask=some, other=0.0)
    p_through = through_ptr + vector[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    through = tl.sum(tl.load(p_through, mask=some, other=0.0), axis=1)
    flow = tl.cumsum(crossing, axis=1, reverse=True) + (tl.cumsum(leave, axis=1) - leave) + through[:, None]
    from_first = tl.cumsum(across, axis=1) - across
    to_second = tl.cumsum(across, axis=1, reverse=True)
    first = (q < R)[None, :]
    flow += tl.where(first, from_first, to_second)
    inverse = tl.where(step > TINY, 1.0 / tl.maximum(step, TINY), 0.0)  # a step of 0 has a softplus of slope 0
    group = (item * (H // share)).to(tl.int64) + h // share
    own = tl.load(own_ptr + group[:, None] * Q + q[None, :], mask=some, other=0.0)
    dstep = (rows + tl.where(first, across, 0.0) + leave) * inverse + own * skip + A[:, None] * flow
    p_dt = (
        dt_ptr + row.to(tl.int64) * dt_batch + (chunk.to(tl.int64) * Q) * dt_token + q[None, :] * dt_token + h[:, None]
    )
    raw = tl.load(p_dt, mask=real, other=0.0).to(tl.float32)
    raw += tl.load(bias_ptr + h, mask=heads, other=0.0).to(tl.float32)[:, None]
    slope = 1.0 / (1.0 + tl.exp(-raw))  # of softplus
    if CLAMP:
        free = softplus(raw)
        slope = tl.where((free >= low) & (free <= high), slope, 0.0)
    ddt = tl.where(real, dstep * slope, 0.0)
    ddt_ptr += row.to(tl.int64) * ddt_batch + (chunk.to(tl.int64) * Q) * ddt_token
    tl.store(ddt_ptr + q[None, :] * ddt_token + h[:, None], ddt, mask=real)
    part = parts_ptr + item.to(tl.int64) * H + h
    size = tl.num_programs(0).to(tl.int64) * H
    tl.store(part, tl.sum(tl.where(real, step * flow, 0.0), axis=1), mask=heads)
    tl.store(part + size, tl.sum(tl.where(real, skip, 0.0), axis=1), mask=heads)
    tl.store(part + 2 * size, tl.sum(ddt, axis=1), mask=heads)


def ddt_and_parameters(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    steps: Steps,
    own: Tensor,
    flows: Tensor,
    through: Tensor,
    tiles: Tiles,
    ddt: Tensor,
) -> Tensor:
    """Writes ddt, (B, S, H) with any strides but the last, 1; returns what each chunk adds to the gradients of A, D and
    dt_bias: (3, B chunks, H) fp32."""
    Bt, S, H = dt.shape
    n_chunks = triton.cdiv(S, tiles.Q)
    parts = torch.empty(3, Bt * n_chunks, H, device=dt.device, dtype=torch.float32)
    block = min(16, triton.next_power_of_2(H))
    _ddt_kernel[(Bt * n_chunks, triton.cdiv(H, block))](
        dt, A, dt_bias, steps.vectors, own, flows, through, ddt, parts, S, H, n_chunks, H // own.shape[2],
        dt.stride(0), dt.stride(1), ddt.stride(0), ddt.stride(1), *dt_limit, CLAMP=dt_limit != (0.0, torch.inf),
        R=tiles.R, BLOCK_H=block, PARTS=through.shape[-1], num_warps=4,
    )  # fmt: skip
    return parts

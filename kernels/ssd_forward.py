"""The forward kernels of the SSD (`kernels.ssd` has the formula and the public function), and its decode step.

Per head, a_t is the sum of dt A from the chunk's start through token t, S_c the state entering chunk c:

    y_i     = sum_{j <= i} (C_i . B_j) exp(a_i - a_j) dt_j x_j  +  exp(a_i) S_c C_i  +  D x_i
    S_{c+1} = exp(a_last) S_c + sum_j exp(a_last - a_j) dt_j x_j B_j^T

Three launches.  `_prepare_kernel`: everything that depends on dt alone, one number per token and head each, and the
resets of packed documents folded into it as zeros.  `_states_kernel`: one program carries a block of one head's state
in fp32 registers through the whole row and leaves S_c behind in x's dtype, so no fp32 state and no partial state
touch memory. `_scan_kernel`: one program per half chunk and group of heads; C B^T is made once and shared by the
group's heads. At T tokens x, B, C are read twice, the states written and read once: 47 kB a token at Nemotron 3
Nano's sizes in bf16.

A chunk is two blocks of R tokens.  Inside a block the decay between two tokens takes an exponential per pair; from
the first block to the second it is the product of two factors at most 1, so it takes none.  The diagonal of the
masked product and D x are added in fp32.  Decays are kept in base 2: the hardware's exponential is.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import INTERPRET

PRECISION = tl.constexpr("tf32x3")  # of fp32 products: three tf32 products, right to 2^-21; no matter to bf16
LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-37)  # below this a step counts as zero: its logarithm stays finite
# Rows of `Steps.vectors`, described in `_prepare_kernel`.
KINDS = tl.constexpr(6)
STEP, DECAY, SOURCE, TO_END, FROM_START, MIDDLE = (tl.constexpr(i) for i in range(6))
LARGEST = tl.constexpr(126.0)  # exponents are cut here so that masked-out pairs give 0 * finite, not 0 * inf


# --- what depends on dt alone ----------------------------------------------------------------------------------------


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


# --- tiles -----------------------------------------------------------------------------------------------------------


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

    @property
    def deep(self) -> int:
        """Stages of the kernels that hold little else: with one more, two programs still share a multiprocessor."""
        return self.stages + 1 if self.stages > 1 else 1


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
    if dtype == torch.float32:  # for checking and small models: exact products, no tensor cores
        return Tiles(32 if small else 16, BP, BN, 4, 1)
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
    return tl.load((ptr + rows[:, None] * stride) + cols[None, :], mask=mask, other=0.0)


# --- states ----------------------------------------------------------------------------------------------------------


@triton.jit
def _states_kernel(
    x_ptr,
    B_ptr,
    first_ptr,
    states_ptr,
    last_ptr,
    dy_ptr,
    C_ptr,
    dlast_ptr,
    dstates_ptr,
    dfirst_ptr,
    vectors_ptr,
    keep_ptr,
    S,
    H,
    n_chunks,
    share,
    x_batch,
    x_token,
    x_head,
    B_batch,
    B_token,
    B_group,
    C_batch,
    C_token,
    C_group,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_DLAST: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_P: tl.constexpr,
    SPLIT_N: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: SPLIT_P x SPLIT_N of one head's state through the whole row; what enters each chunk is stored.

        state <- keep state + sum_t weight_t value_t key_t^T

    Forwards S, from x, B and to_end.  Backwards the gradient of the state that each chunk leaves, by the transposed
    recurrence, from dy, C and from_start.  With both, each has its half of the grid: neither waits for the other.
    states, dstates (B, chunks, H, BLOCK_P, BLOCK_N); first, last, dlast, dfirst (B, H, P, N); dy (B, S, H, P).
    """
    Q: tl.constexpr = 2 * R
    row = tl.program_id(0) // H
    h = tl.program_id(0) % H
    b = row.to(tl.int64)
    splits: tl.constexpr = BLOCK_N // SPLIT_N
    p = (tl.program_id(1) // splits) * SPLIT_P + tl.arange(0, SPLIT_P)
    n = (tl.program_id(1) % splits) * SPLIT_N + tl.arange(0, SPLIT_N)
    q = tl.arange(0, Q)
    block = p[:, None] * BLOCK_N + n[None, :]
    real = (p < P)[:, None] & (n < N)[None, :]
    exact = (b * H + h) * (P * N) + (p[:, None] * N + n[None, :])
    # One loop for both directions: two would need twice the shared memory.
    if BACKWARD and (not FORWARD or tl.program_id(2) == 1):
        value_ptr = dy_ptr + (b * S * H + h) * P
        value_token = H * P
        key_ptr = C_ptr + b * C_batch + (h // share) * C_group
        key_token = C_token
        weight_ptr = vectors_ptr + FROM_START * Q
        out_ptr = dstates_ptr
        end_ptr = dfirst_ptr
        chunk = n_chunks - 1
        advance = -1
        state = tl.zeros([SPLIT_P, SPLIT_N], dtype=tl.float32)
        if HAS_DLAST:
            state = tl.load(dlast_ptr + exact, mask=real, other=0.0).to(tl.float32)
    else:
        value_ptr = x_ptr + (b * x_batch + h * x_head)
        value_token = x_token
        key_ptr = B_ptr + b * B_batch + (h // share) * B_group
        key_token = B_token
        weight_ptr = vectors_ptr + TO_END * Q
        out_ptr = states_ptr
        end_ptr = last_ptr
        chunk = n_chunks * 0
        advance = 1
        state = tl.zeros([SPLIT_P, SPLIT_N], dtype=tl.float32)
        if HAS_FIRST:
            state = tl.load(first_ptr + exact, mask=real, other=0.0).to(tl.float32)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        c = chunk + i * advance
        start = c * Q
        vector = ((row * n_chunks + c) * H + h).to(tl.int64)
        tl.store(out_ptr + vector * (BLOCK_P * BLOCK_N) + block, state.to(out_ptr.dtype.element_ty))
        token = (q < S - start)[None, :]
        if P != BLOCK_P:
            token = token & (p < P)[:, None]
        p_value = value_ptr + start.to(tl.int64) * value_token
        value = tl.load(p_value + (q[None, :] * value_token + p[:, None]), mask=token, other=0.0)  # [P, Q]
        key = load_rows(key_ptr, start, key_token, S, q, n, N)  # [Q, N]
        weight = tl.load(weight_ptr + vector * (KINDS * Q) + q)
        value = (value.to(tl.float32) * weight[None, :]).to(key.dtype)
        state = state * tl.load(keep_ptr + vector)
        state = tl.dot(value, key, state, input_precision=PRECISION)  # [P, Q] @ [Q, N]
    tl.store(end_ptr + exact, state, mask=real)


# --- output ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scan_block(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    vectors_ptr,
    states_ptr,
    y_ptr,
    idx_ptr,
    item,
    chunk,
    h0,
    S,
    H: tl.constexpr,
    x_token: tl.constexpr,
    x_head,
    B_token: tl.constexpr,
    C_token: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The first or second block of a chunk, HEADS heads of one group from h0 on.  Pointers are at the row (and group).

    item: row and chunk as one number.  R rows i; columns j are the same R tokens, and for the second block the
    first's too.
    """
    Q: tl.constexpr = 2 * R
    half: tl.constexpr = R if SECOND else 0
    r = tl.arange(0, R)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    begin = chunk * Q
    start = begin + half
    C = load_rows(C_ptr, start, C_token, S, r, n, N)
    B = load_rows(B_ptr, start, B_token, S, r, n, N)
    visible = r[:, None] > r[None, :]
    if HAS_IDX:
        idx = tl.load(idx_ptr + start + r, mask=r < S - start, other=-1)
        visible = visible & (idx[:, None] == idx[None, :])
    CB = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # [R, N] @ [N, R]
    own = tl.sum(tl.where(r[:, None] == r[None, :], CB, 0.0), axis=1)  # C_i . B_i
    CB = tl.where(visible, CB, 0.0)
    if SECOND:
        B = load_rows(B_ptr, begin, B_token, S, r, n, N)
        CB_left = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        if HAS_IDX:
            earlier = tl.load(idx_ptr + begin + r, mask=r < S - begin, other=-1)
            CB_left = tl.where(idx[:, None] == earlier[None, :], CB_left, 0.0)
    state_offset = p[:, None] * BLOCK_N + n[None, :]
    for k in tl.range(0, HEADS, num_stages=STAGES):
        h = h0 + k
        vector = (item * H + h).to(tl.int64)
        p_v = vectors_ptr + vector * (KINDS * Q) + half + r
        state = tl.load(states_ptr + vector * (BLOCK_P * BLOCK_N) + state_offset)  # [P, N]
        from_start = tl.load(p_v + FROM_START * Q)
        y = tl.dot(C, tl.trans(state), input_precision=PRECISION) * from_start[:, None]  # [R, N] @ [N, P]
        if SECOND:
            x_left = load_rows(x_ptr + h * x_head, begin, x_token, S, r, p, P)
            before = tl.load(p_v + (MIDDLE * Q - R))
            after = tl.load(p_v + MIDDLE * Q)
            mixing = CB_left * (after[:, None] * before[None, :])
            y = tl.dot(mixing.to(x_left.dtype), x_left, y, input_precision=PRECISION)  # [R, R] @ [R, P]
        x = load_rows(x_ptr + h * x_head, start, x_token, S, r, p, P)  # [R, P]
        D = tl.load(D_ptr + h).to(tl.float32)
        y += x.to(tl.float32) * (own * tl.load(p_v + STEP * Q) + D)[:, None]
        a = tl.load(p_v + DECAY * Q)
        source = tl.load(p_v + SOURCE * Q)
        mixing = CB * tl.exp2(tl.minimum(a[:, None] - source[None, :], LARGEST))
        y = tl.dot(mixing.to(x.dtype), x, y, input_precision=PRECISION)
        mask = (r < S - start)[:, None]
        if P != BLOCK_P:
            mask = mask & (p < P)[None, :]
        tl.store(y_ptr + (start.to(tl.int64) * H + h) * P + r[:, None] * (H * P) + p[None, :], y, mask=mask)


@triton.jit
def _scan_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    vectors_ptr,
    states_ptr,
    y_ptr,
    idx_ptr,
    S,
    H: tl.constexpr,
    n_chunks,
    share,
    x_batch,
    x_token: tl.constexpr,
    x_head,
    B_batch,
    B_token: tl.constexpr,
    B_group,
    C_batch,
    C_token: tl.constexpr,
    C_group,
    idx_batch,
    HAS_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: one block of R tokens, HEADS heads of one group.  y (B, S, H, P) contiguous, the rest strided."""
    second = tl.program_id(0) % 2
    h0 = (tl.program_id(0) // 2) * HEADS
    item = tl.program_id(1)
    row = item // n_chunks
    chunk = item % n_chunks
    g = h0 // share
    b = row.to(tl.int64)
    x = x_ptr + b * x_batch
    B = B_ptr + b * B_batch + g * B_group
    C = C_ptr + b * C_batch + g * C_group
    y = y_ptr + b * S * H * P
    idx = idx_ptr + b * idx_batch
    if second == 1:
        _scan_block(
            x, B, C, D_ptr, vectors_ptr, states_ptr, y, idx, item, chunk, h0, S, H,
            x_token, x_head, B_token, C_token, True, HAS_IDX, P, N, BLOCK_P, BLOCK_N, R, HEADS, STAGES,
        )  # fmt: skip
    else:
        _scan_block(
            x, B, C, D_ptr, vectors_ptr, states_ptr, y, idx, item, chunk, h0, S, H,
            x_token, x_head, B_token, C_token, False, HAS_IDX, P, N, BLOCK_P, BLOCK_N, R, HEADS, STAGES,
        )  # fmt: skip


# --- decoding --------------------------------------------------------------------------------------------------------


@triton.jit
def _step_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    y_ptr,
    new_ptr,
    H,
    share,
    x_batch,
    x_head,
    dt_batch,
    B_batch,
    B_group,
    C_batch,
    C_group,
    low,
    high,
    CLAMP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_P channels of one head of one row.  state, new (B, H, P, N) and y (B, H, P) contiguous."""
    b = tl.program_id(0).to(tl.int64) // H
    h = tl.program_id(0) % H
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    dt = softplus(tl.load(dt_ptr + b * dt_batch + h).to(tl.float32) + tl.load(bias_ptr + h).to(tl.float32))
    if CLAMP:
        dt = tl.minimum(tl.maximum(dt, low), high)
    keep = tl.exp(dt * tl.load(A_ptr + h).to(tl.float32))
    x = tl.load(x_ptr + b * x_batch + h * x_head + p, mask=p < P, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + b * B_batch + (h // share) * B_group + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_batch + (h // share) * C_group + n, mask=n < N, other=0.0).to(tl.float32)
    vector = (b * H + h) * P + p
    block = vector[:, None] * N + n[None, :]
    real = (p < P)[:, None] & (n < N)[None, :]
    state = tl.load(state_ptr + block, mask=real, other=0.0).to(tl.float32)
    state = state * keep + (x * dt)[:, None] * B[None, :]
    tl.store(new_ptr + block, state, mask=real)
    y = tl.sum(state * C[None, :], axis=1) + tl.load(D_ptr + h).to(tl.float32) * x
    tl.store(y_ptr + vector, y, mask=p < P)


# --- launchers -------------------------------------------------------------------------------------------------------


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


def carry_states(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    steps: Steps,
    tiles: Tiles,
    initial_state: Tensor | None = None,
    dy: Tensor | None = None,
    dlast: Tensor | None = None,
    forward: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """States entering each chunk and after the last; with dy (contiguous), also gradients of the state leaving each
    chunk and of the initial state.  (B, chunks, H, padded P, padded N) in x's dtype, and (B, H, P, N) in fp32; None
    if not asked.
    """
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    n_chunks = triton.cdiv(S, tiles.Q)
    backward = dy is not None

    def outputs(wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        if not wanted:
            return None, None
        return x.new_empty(Bt, n_chunks, H, tiles.P, tiles.N), x.new_empty(Bt, H, P, N, dtype=torch.float32)

    (states, last), (dstates, dfirst) = outputs(forward), outputs(backward)
    # A row is walked in order, so programs come from heads and pieces of the state only: enough pieces to fill the GPU.
    split_p, split_n = tiles.P, min(tiles.N, 64)
    if not INTERPRET:
        while Bt * H * (tiles.P // split_p) * (tiles.N // split_n) < 120 and split_n > 32:
            split_n //= 2
        while Bt * H * (tiles.P // split_p) * (tiles.N // split_n) < 120 and split_p > 32:
            split_p //= 2
    _states_kernel[(Bt * H, (tiles.P // split_p) * (tiles.N // split_n), forward + backward)](
        x, B, initial_state, states, last, dy, C, dlast, dstates, dfirst, *steps,
        S, H, n_chunks, H // G,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1),
        C.stride(2), FORWARD=forward, BACKWARD=backward, HAS_FIRST=initial_state is not None, HAS_DLAST=dlast is not
        None, P=P, N=N, BLOCK_P=tiles.P, BLOCK_N=tiles.N, SPLIT_P=split_p, SPLIT_N=split_n, R=tiles.R,
        STAGES=tiles.deep, num_warps=4,
    )  # fmt: skip
    return states, last, dstates, dfirst


def scan(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor, steps: Steps, states: Tensor, seq_idx: Tensor | None, tiles: Tiles
) -> Tensor:
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    n_chunks, share = triton.cdiv(S, tiles.Q), H // G
    heads = max(k for k in range(1, min(share, 8) + 1) if share % k == 0)
    y = torch.empty(Bt, S, H, P, device=x.device, dtype=x.dtype)
    _scan_kernel[(2 * (H // heads), Bt * n_chunks)](
        x, B, C, D, steps.vectors, states, y, x if seq_idx is None else seq_idx,
        S, H, n_chunks, share,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1),
        C.stride(2), 0 if seq_idx is None else seq_idx.stride(0), HAS_IDX=seq_idx is not None, P=P, N=N,
        BLOCK_P=tiles.P, BLOCK_N=tiles.N, R=tiles.R, HEADS=heads, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return y


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Shapes as in `kernels.ssd.ssd_step`; state contiguous.  y in x's dtype, the new state in fp32."""
    Bt, H, P, N = state.shape
    y = torch.empty(Bt, H, P, device=x.device, dtype=x.dtype)
    new = torch.empty(Bt, H, P, N, device=x.device, dtype=torch.float32)
    block_n = triton.next_power_of_2(N)
    block_p = min(triton.next_power_of_2(P), max(1, 2048 // block_n))
    _step_kernel[(Bt * H, triton.cdiv(P, block_p))](
        state, x, dt, A, B, C, D, dt_bias, y, new, H, H // B.shape[1],
        x.stride(0), x.stride(1), dt.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1), *dt_limit,
        CLAMP=dt_limit != (0.0, torch.inf), P=P, N=N, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y, new

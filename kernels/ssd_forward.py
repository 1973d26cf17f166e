"""The forward kernels of the SSD (`kernels.ssd` has the formula and the public function), and its decode step.

Per head, a_t is the sum of dt A from the chunk's start through token t, S_c the state entering chunk c:

    y_i     = sum_{j <= i} (C_i . B_j) exp(a_i - a_j) dt_j x_j  +  exp(a_i) S_c C_i  +  D x_i
    S_{c+1} = exp(a_last) S_c + sum_j exp(a_last - a_j) dt_j x_j B_j^T

Three launches.  `_prepare_kernel`: everything that depends on dt alone, one number per token and head each, and the
resets of packed documents folded into it as zeros.  `_states_kernel` (`kernels.ssd_states`): one program carries a
block of one head's state in fp32 registers through the whole row and leaves S_c behind in x's dtype, so no fp32 state
and no partial state touch memory.  `_scan_kernel`: one program per half chunk and group of heads; C B^T is made once
and shared by the group's heads.  At T tokens x, B, C are read twice, the states written and read once: 47 kB a token at
Nemotron 3 Nano's sizes in bf16.

A chunk is two blocks of R tokens.  Inside a block the decay between two tokens takes an exponential per pair; from
the first block to the second it is the product of two factors at most 1, so it takes none.  The diagonal of the
masked product and D x are added in fp32.  Decays are kept in base 2: the hardware's exponential is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ssd_steps import DECAY, FROM_START, KINDS, LARGEST, MIDDLE, SOURCE, STEP, Steps, Tiles, load_rows, softplus


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
    CB = tl.dot(C, tl.trans(B), input_precision="ieee")  # [R, N] @ [N, R]
    own = tl.sum(tl.where(r[:, None] == r[None, :], CB, 0.0), axis=1)  # C_i . B_i
    CB = tl.where(visible, CB, 0.0)
    if SECOND:
        B = load_rows(B_ptr, begin, B_token, S, r, n, N)
        CB_left = tl.dot(C, tl.trans(B), input_precision="ieee")
        if HAS_IDX:
            earlier = tl.load(idx_ptr + begin + r, mask=r < S - begin, other=-1)
            CB_left = tl.where(idx[:, None] == earlier[None, :], CB_left, 0.0)
    state_offset = p[:, None] * BLOCK_N + n[None, :]
    for k in tl.range(0, HEADS, num_stages=STAGES):
        h = h0 + k
        vector = (item * H + h).to(tl.int64)
        x_h = x_ptr + h.to(tl.int64) * x_head
        p_v = vectors_ptr + vector * (KINDS * Q) + half + r
        state = tl.load(states_ptr + vector * (BLOCK_P * BLOCK_N) + state_offset)  # [P, N]
        from_start = tl.load(p_v + FROM_START * Q)
        y = tl.dot(C, tl.trans(state), input_precision="ieee") * from_start[:, None]  # [R, N] @ [N, P]
        if SECOND:
            x_left = load_rows(x_h, begin, x_token, S, r, p, P)
            before = tl.load(p_v + (MIDDLE * Q - R))
            after = tl.load(p_v + MIDDLE * Q)
            mixing = CB_left * (after[:, None] * before[None, :])
            y = tl.dot(mixing.to(x_left.dtype), x_left, y, input_precision="ieee")  # [R, R] @ [R, P]
        x = load_rows(x_h, start, x_token, S, r, p, P)  # [R, P]
        D = tl.load(D_ptr + h).to(tl.float32)
        y += x.to(tl.float32) * (own * tl.load(p_v + STEP * Q) + D)[:, None]
        a = tl.load(p_v + DECAY * Q)
        source = tl.load(p_v + SOURCE * Q)
        mixing = CB * tl.exp2(tl.minimum(a[:, None] - source[None, :], LARGEST))
        y = tl.dot(mixing.to(x.dtype), x, y, input_precision="ieee")
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
    pid = tl.program_id(0) % (2 * (H // HEADS))
    item = tl.program_id(0) // (2 * (H // HEADS))
    second = pid % 2
    h0 = (pid // 2) * HEADS
    row = item // n_chunks
    chunk = item % n_chunks
    g = h0 // share
    b = row.to(tl.int64)
    x = x_ptr + b * x_batch
    B = B_ptr + b * B_batch + g.to(tl.int64) * B_group
    C = C_ptr + b * C_batch + g.to(tl.int64) * C_group
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


def scan(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor, steps: Steps, states: Tensor, seq_idx: Tensor | None, tiles: Tiles
) -> Tensor:
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    n_chunks, share = triton.cdiv(S, tiles.Q), H // G
    heads = max(k for k in range(1, min(share, 8) + 1) if share % k == 0)
    y = torch.empty(Bt, S, H, P, device=x.device, dtype=x.dtype)
    _scan_kernel[(2 * (H // heads) * Bt * n_chunks,)](
        x, B, C, D, steps.vectors, states, y, x if seq_idx is None else seq_idx,
        S, H, n_chunks, share,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1),
        C.stride(2), 0 if seq_idx is None else seq_idx.stride(0), HAS_IDX=seq_idx is not None, P=P, N=N,
        BLOCK_P=tiles.P, BLOCK_N=tiles.N, R=tiles.R, HEADS=heads, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return y


# --- decoding ---------------------------------------------------------------------------------------------------------


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
    h = (tl.program_id(0) % H).to(tl.int64)
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

"""The backward kernels of the SSD (notation and forward: `kernels.ssd_forward`).

With dy, and dS_c the gradient of the state that chunk c leaves behind, w_j = exp(a_last - a_j) dt_j, u_i = exp(a_i):

    G_ji  = x_j . dy_i                      L_ji = exp(a_i - a_j) dt_j  for i >= j in one document, else 0
    dx_j  = sum_i (C_i . B_j) L_ji dy_i + w_j dS B_j + D dy_j
    dCB   = sum over the group's heads of G L;   dB_j = sum_i dCB_ji C_i + sum_h w_j x_j dS,
                                                 dC_i = sum_j dCB_ji B_j + sum_h u_i dy_i S
    dD    = sum_j x_j . dy_j
    ddt_j = ( sum_i M_ji + w_j x_j dS B_j ) / dt_j + A q_j,   M_ji = (C_i . B_j) G_ji L_ji,   dA = sum_t dt_t q_t

q_t is the gradient of dt_t A: the sum of everything that decays over t, that is of M_ji with j < t <= i, of e_j = w_j
x_j dS B_j with j < t, of r_i = u_i dy_i S C_i with i >= t, and of keep <dS, S>.  The first is a suffix sum of row
sums minus column sums of M, which would cancel to noise if the two were not sums over the very same fp32 numbers, or
if they held the diagonal (often the largest part, and no decay passes over it): here both come from one M with a zero
diagonal, in one program.

Launches: `_prepare_kernel`, `_states_kernel` (S again and dS together), `_dx_kernel` (dx, dCB, what ddt needs of them),
`_dBC_kernel` (dB, dC, r, keep <dS, S>), `_ddt_kernel`, and one sum over chunks for A, D and dt_bias.
No atomics: every sum has one owner and one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ssd_forward import (
    DECAY,
    FROM_START,
    KINDS,
    LARGEST,
    MIDDLE,
    PRECISION,
    SOURCE,
    STEP,
    TINY,
    TO_END,
    Steps,
    Tiles,
    load_rows,
    softplus,
)

# Rows of the flows, (B, chunks, H, FLOWS, Q) in fp32: what the large kernels leave for `_ddt_kernel`.
FLOWS = tl.constexpr(6)
DIRECT, NET, ACROSS, SKIP, LEAVE, ENTER = (tl.constexpr(i) for i in range(6))
# DIRECT  gradient of dt_j inside the chunk, decays held fixed
# NET     row sums minus column sums of M, of the two blocks on the diagonal
# ACROSS  of the block between them: column sums in the first half of the chunk, row sums in the second
# SKIP    x_j . dy_j
# LEAVE   e_j, towards the state
# ENTER   r_i, from the state


# --- dx and dCB ------------------------------------------------------------------------------------------------------


@triton.jit
def _dx_block(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    vectors_ptr,
    dstates_ptr,
    dx_ptr,
    dCB_ptr,
    flows_ptr,
    idx_ptr,
    item,
    chunk,
    g,
    S,
    H: tl.constexpr,
    x_token: tl.constexpr,
    x_head,
    B_token: tl.constexpr,
    C_token: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows j: the first or second block of a chunk.  Columns i: the same tokens, and for the first the second's."""
    Q: tl.constexpr = 2 * R
    half: tl.constexpr = 0 if FIRST else R
    r = tl.arange(0, R)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    start = chunk * Q + half
    later = start + R
    B = load_rows(B_ptr, start, B_token, S, r, n, N)
    C = load_rows(C_ptr, start, C_token, S, r, n, N)
    visible = r[:, None] < r[None, :]  # [j, i], without the diagonal
    diagonal = r[:, None] == r[None, :]
    if HAS_IDX:
        idx = tl.load(idx_ptr + start + r, mask=r < S - start, other=-1)
        match = idx[:, None] == idx[None, :]
        visible = visible & match
    BC = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # [R, N] @ [N, R]
    own = tl.sum(tl.where(diagonal, BC, 0.0), axis=1)
    BC = tl.where(visible, BC, 0.0)
    dBC = tl.zeros([R, R], dtype=tl.float32)
    down = tl.zeros([R], dtype=tl.float32)  # its diagonal, by itself: there a - log2(dt) would lose digits of dt
    if FIRST:
        C_right = load_rows(C_ptr, later, C_token, S, r, n, N)
        BC_right = tl.dot(B, tl.trans(C_right), input_precision=PRECISION)  # [R, N] @ [N, R]
        dBC_right = tl.zeros([R, R], dtype=tl.float32)
        if HAS_IDX:
            idx_right = tl.load(idx_ptr + later + r, mask=r < S - later, other=-1)
            match_right = idx[:, None] == idx_right[None, :]
            BC_right = tl.where(match_right, BC_right, 0.0)
    state_offset = p[:, None] * BLOCK_N + n[None, :]
    real = (r < S - start)[:, None]
    if P != BLOCK_P:
        real = real & (p < P)[None, :]
    for k in tl.range(0, SHARE, num_stages=STAGES):
        h = g * SHARE + k
        vector = (item * H + h).to(tl.int64)
        p_v = vectors_ptr + vector * (KINDS * Q) + half + r
        p_f = flows_ptr + vector * (FLOWS * Q) + half + r
        x = load_rows(x_ptr + h * x_head, start, x_token, S, r, p, P)  # [R, P]
        # Registers are scarce: values are loaded where they are used, sums of M come before the product that needs the
        # mixing tile, and the state's share is added to dx last.
        dy = load_rows(dy_ptr + h * P, start, H * P, S, r, p, P)
        a = tl.load(p_v + DECAY * Q)
        source = tl.load(p_v + SOURCE * Q)
        G = tl.dot(x, tl.trans(dy), input_precision=PRECISION)  # [j, i]: [R, P] @ [P, R]
        skip = tl.sum(tl.where(diagonal, G, 0.0), axis=1)
        L = tl.exp2(tl.minimum(a[None, :] - source[:, None], LARGEST))  # wrong, but finite, for i < j
        dBC += G * L
        L = BC * L
        G = G * L  # M
        columns = tl.sum(G, axis=1)
        tl.store(p_f + NET * Q, tl.sum(G, axis=0) - columns)
        dx = tl.dot(L.to(x.dtype), dy, input_precision=PRECISION)  # [R, R] @ [R, P]
        step = tl.load(p_v + STEP * Q)
        D = tl.load(D_ptr + h).to(tl.float32)
        dx += dy.to(tl.float32) * (own * step + D)[:, None]
        down += skip * step
        if FIRST:
            before = tl.load(p_v + MIDDLE * Q)
            after = tl.load(p_v + (MIDDLE * Q + R))
            dy_right = load_rows(dy_ptr + h * P, later, H * P, S, r, p, P)
            G = tl.dot(x, tl.trans(dy_right), input_precision=PRECISION) * before[:, None] * after[None, :]
            dBC_right += G
            G = G * BC_right
            crossing = tl.sum(G, axis=1)
            columns += crossing
            tl.store(p_f + ACROSS * Q, crossing)
            tl.store(p_f + (ACROSS * Q + R), tl.sum(G, axis=0))
            L = BC_right * before[:, None] * after[None, :]
            dx = tl.dot(L.to(x.dtype), dy_right, dx, input_precision=PRECISION)
        dstate = tl.load(dstates_ptr + vector * (BLOCK_P * BLOCK_N) + state_offset)  # [P, N]
        to_end = tl.load(p_v + TO_END * Q)
        dx += tl.dot(B, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]  # [R, N] @ [N, P]
        inverse = tl.where(step > TINY, 1.0 / tl.maximum(step, TINY), 0.0)  # a step of 0 has a softplus of slope 0
        tl.store(p_f + DIRECT * Q, columns * inverse + own * skip)
        tl.store(p_f + SKIP * Q, skip)
        tl.store(dx_ptr + (start.to(tl.int64) * H + h) * P + (r[:, None] * (H * P) + p[None, :]), dx, mask=real)
    out = dCB_ptr + half * Q + half + r[:, None] * Q + r[None, :]
    element: tl.constexpr = dCB_ptr.dtype.element_ty
    tl.store(out, tl.where(visible, dBC, tl.where(diagonal, down[:, None], 0.0)).to(element))
    if FIRST:
        if HAS_IDX:
            dBC_right = tl.where(match_right, dBC_right, 0.0)
        tl.store(out + R, dBC_right.to(element))


@triton.jit
def _dx_kernel(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    vectors_ptr,
    dstates_ptr,
    dx_ptr,
    dCB_ptr,
    flows_ptr,
    idx_ptr,
    S,
    H: tl.constexpr,
    n_chunks,
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
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: one block of R tokens, the SHARE heads of one group.

    x, B, C strided; dy, dx (B, S, H, P) contiguous; dCB (B, chunks, G, Q, Q), [.., j, i], blocks i >= j only.
    """
    first = tl.program_id(0) % 2 == 0
    g = tl.program_id(0) // 2
    item = tl.program_id(1)
    row = item // n_chunks
    chunk = item % n_chunks
    b = row.to(tl.int64)
    x = x_ptr + b * x_batch
    dy = dy_ptr + b * S * H * P
    B = B_ptr + b * B_batch + g * B_group
    C = C_ptr + b * C_batch + g * C_group
    dx = dx_ptr + b * S * H * P
    dCB = dCB_ptr + (item * (H // SHARE) + g).to(tl.int64) * (4 * R * R)
    idx = idx_ptr + b * idx_batch
    if first:
        _dx_block(
            x, dy, B, C, D_ptr, vectors_ptr, dstates_ptr, dx, dCB, flows_ptr, idx, item, chunk, g, S, H, x_token,
            x_head, B_token, C_token, True, HAS_IDX, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    else:
        _dx_block(
            x, dy, B, C, D_ptr, vectors_ptr, dstates_ptr, dx, dCB, flows_ptr, idx, item, chunk, g, S, H, x_token,
            x_head, B_token, C_token, False, HAS_IDX, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip


# --- dB and dC -------------------------------------------------------------------------------------------------------


@triton.jit
def _dB_block(
    x_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    dstates_ptr,
    dCB_ptr,
    dB_ptr,
    flows_ptr,
    item,
    chunk,
    g,
    S,
    H: tl.constexpr,
    x_token: tl.constexpr,
    x_head,
    B_token: tl.constexpr,
    C_token: tl.constexpr,
    FIRST: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dB_j = sum_i dCB_ji C_i + sum_h w_j x_j dS for one block of tokens j, and e_j."""
    Q: tl.constexpr = 2 * R
    half: tl.constexpr = 0 if FIRST else R
    r = tl.arange(0, R)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    begin = chunk * Q
    start = begin + half
    dCB = tl.load(dCB_ptr + (half + r)[:, None] * Q + half + r[None, :])  # [j, i]
    C = load_rows(C_ptr, start, C_token, S, r, n, N)
    dB = tl.dot(dCB, C, input_precision=PRECISION)  # [R, R] @ [R, N]
    if FIRST:
        dCB = tl.load(dCB_ptr + r[:, None] * Q + R + r[None, :])
        C = load_rows(C_ptr, begin + R, C_token, S, r, n, N)
        dB = tl.dot(dCB, C, dB, input_precision=PRECISION)
    B = load_rows(B_ptr, start, B_token, S, r, n, N)
    state_offset = p[:, None] * BLOCK_N + n[None, :]
    for k in tl.range(0, SHARE, num_stages=STAGES):
        h = g * SHARE + k
        vector = (item * H + h).to(tl.int64)
        to_end = tl.load(vectors_ptr + vector * (KINDS * Q) + (TO_END * Q + half) + r)
        x = load_rows(x_ptr + h * x_head, start, x_token, S, r, p, P)
        dstate = tl.load(dstates_ptr + vector * (BLOCK_P * BLOCK_N) + state_offset)
        part = tl.dot(x, dstate, input_precision=PRECISION) * to_end[:, None]  # [R, P] @ [P, N]
        dB += part
        tl.store(flows_ptr + vector * (FLOWS * Q) + (LEAVE * Q + half) + r, tl.sum(part * B.to(tl.float32), axis=1))
    mask = (r < S - start)[:, None]
    if N != BLOCK_N:
        mask = mask & (n < N)[None, :]
    groups = H // SHARE
    tl.store(dB_ptr + (start.to(tl.int64) * groups + g) * N + r[:, None] * (groups * N) + n[None, :], dB, mask=mask)


@triton.jit
def _dC_block(
    dy_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    states_ptr,
    dCB_ptr,
    dC_ptr,
    flows_ptr,
    item,
    chunk,
    g,
    S,
    H: tl.constexpr,
    B_token: tl.constexpr,
    C_token: tl.constexpr,
    FIRST: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dC_i = sum_j dCB_ji B_j + sum_h u_i dy_i S for one block of tokens i, and r_i."""
    Q: tl.constexpr = 2 * R
    half: tl.constexpr = 0 if FIRST else R
    r = tl.arange(0, R)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    begin = chunk * Q
    start = begin + half
    # Read as [i, j]: the transposition is in the addresses.
    dCB = tl.load(dCB_ptr + half * Q + half + r[:, None] + r[None, :] * Q)
    B = load_rows(B_ptr, start, B_token, S, r, n, N)
    dC = tl.dot(dCB, B, input_precision=PRECISION)  # [R, R] @ [R, N]
    if not FIRST:
        dCB = tl.load(dCB_ptr + half + r[:, None] + r[None, :] * Q)
        B = load_rows(B_ptr, begin, B_token, S, r, n, N)
        dC = tl.dot(dCB, B, dC, input_precision=PRECISION)
    C = load_rows(C_ptr, start, C_token, S, r, n, N)
    state_offset = p[:, None] * BLOCK_N + n[None, :]
    for k in tl.range(0, SHARE, num_stages=STAGES):
        h = g * SHARE + k
        vector = (item * H + h).to(tl.int64)
        from_start = tl.load(vectors_ptr + vector * (KINDS * Q) + (FROM_START * Q + half) + r)
        dy = load_rows(dy_ptr + h * P, start, H * P, S, r, p, P)
        state = tl.load(states_ptr + vector * (BLOCK_P * BLOCK_N) + state_offset)
        part = tl.dot(dy, state, input_precision=PRECISION) * from_start[:, None]  # [R, P] @ [P, N]
        dC += part
        tl.store(flows_ptr + vector * (FLOWS * Q) + (ENTER * Q + half) + r, tl.sum(part * C.to(tl.float32), axis=1))
    mask = (r < S - start)[:, None]
    if N != BLOCK_N:
        mask = mask & (n < N)[None, :]
    groups = H // SHARE
    tl.store(dC_ptr + (start.to(tl.int64) * groups + g) * N + r[:, None] * (groups * N) + n[None, :], dC, mask=mask)


@triton.jit
def _through_block(
    keep_ptr,
    states_ptr,
    dstates_ptr,
    through_ptr,
    item,
    g,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """keep <dS, S> of a chunk, for a group's heads.  The programs beside this one read the same states: L2 has them."""
    e = tl.arange(0, SIZE)
    for k in tl.range(0, SHARE, num_stages=STAGES):
        vector = (item * H + g * SHARE + k).to(tl.int64)
        state = tl.load(states_ptr + vector * SIZE + e).to(tl.float32)
        dstate = tl.load(dstates_ptr + vector * SIZE + e).to(tl.float32)
        tl.store(through_ptr + vector, tl.sum(state * dstate, axis=0) * tl.load(keep_ptr + vector))


@triton.jit
def _dBC_kernel(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    keep_ptr,
    states_ptr,
    dstates_ptr,
    dCB_ptr,
    dB_ptr,
    dC_ptr,
    flows_ptr,
    through_ptr,
    S,
    H: tl.constexpr,
    n_chunks,
    x_batch,
    x_token: tl.constexpr,
    x_head,
    B_batch,
    B_token: tl.constexpr,
    B_group,
    C_batch,
    C_token: tl.constexpr,
    C_group,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: one group and dB or dC of R tokens, or keep <dS, S> of a chunk.  dB, dC (B, S, G, N) contiguous."""
    role = tl.program_id(0) % 5
    g = tl.program_id(0) // 5
    item = tl.program_id(1)
    row = item // n_chunks
    chunk = item % n_chunks
    groups = H // SHARE
    b = row.to(tl.int64)
    x = x_ptr + b * x_batch
    dy = dy_ptr + b * S * H * P
    B = B_ptr + b * B_batch + g * B_group
    C = C_ptr + b * C_batch + g * C_group
    dB = dB_ptr + b * S * groups * N
    dC = dC_ptr + b * S * groups * N
    dCB = dCB_ptr + (item * groups + g).to(tl.int64) * (4 * R * R)
    if role == 0:
        _dB_block(
            x, B, C, vectors_ptr, dstates_ptr, dCB, dB, flows_ptr, item, chunk, g, S, H, x_token, x_head, B_token,
            C_token, True, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    elif role == 1:
        _dB_block(
            x, B, C, vectors_ptr, dstates_ptr, dCB, dB, flows_ptr, item, chunk, g, S, H, x_token, x_head, B_token,
            C_token, False, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    elif role == 2:
        _dC_block(
            dy, B, C, vectors_ptr, states_ptr, dCB, dC, flows_ptr, item, chunk, g, S, H, B_token, C_token,
            True, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    elif role == 3:
        _dC_block(
            dy, B, C, vectors_ptr, states_ptr, dCB, dC, flows_ptr, item, chunk, g, S, H, B_token, C_token,
            False, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    else:
        _through_block(
            keep_ptr, states_ptr, dstates_ptr, through_ptr, item, g, H, BLOCK_P * BLOCK_N, SHARE, STAGES
        )  # fmt: skip


# --- ddt, dA, dD, ddt_bias -------------------------------------------------------------------------------------------


@triton.jit
def _ddt_kernel(
    dt_ptr,
    A_ptr,
    bias_ptr,
    vectors_ptr,
    flows_ptr,
    through_ptr,
    ddt_ptr,
    parts_ptr,
    S,
    H,
    n_chunks,
    dt_batch,
    dt_token,
    low,
    high,
    CLAMP: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: a chunk, BLOCK_H heads.  q (module docstring), then the chain rule through clamp and softplus.

    ddt (B, S, H) contiguous; parts (3, B chunks, H): this chunk's share of dA, dD and ddt_bias.
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
    crossing = tl.load(p_f + NET * Q, mask=some, other=0.0) + tl.load(p_f + ENTER * Q, mask=some, other=0.0)
    across = tl.load(p_f + ACROSS * Q, mask=some, other=0.0)
    through = tl.load(through_ptr + vector, mask=heads, other=0.0)
    flow = tl.cumsum(crossing, axis=1, reverse=True) + (tl.cumsum(leave, axis=1) - leave) + through[:, None]
    from_first = tl.cumsum(across, axis=1) - across
    to_second = tl.cumsum(across, axis=1, reverse=True)
    flow += tl.where((q < R)[None, :], from_first, to_second)
    inverse = tl.where(step > TINY, 1.0 / tl.maximum(step, TINY), 0.0)  # a step of 0 has a softplus of slope 0
    dstep = tl.load(p_f + DIRECT * Q, mask=some, other=0.0) + leave * inverse + A[:, None] * flow
    at = row.to(tl.int64) * S + chunk * Q
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
    tl.store(ddt_ptr + at * H + q[None, :] * H + h[:, None], ddt, mask=real)
    part = parts_ptr + item.to(tl.int64) * H + h
    size = tl.num_programs(0).to(tl.int64) * H
    tl.store(part, tl.sum(tl.where(real, step * flow, 0.0), axis=1), mask=heads)
    tl.store(part + size, tl.sum(tl.where(real, skip, 0.0), axis=1), mask=heads)
    tl.store(part + 2 * size, tl.sum(ddt, axis=1), mask=heads)


# --- launchers -------------------------------------------------------------------------------------------------------


def dx_and_dCB(
    x: Tensor,
    dy: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    steps: Steps,
    dstates: Tensor,
    seq_idx: Tensor | None,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dCB (B, chunks, G, Q, Q) in x's dtype, and the flows, of which LEAVE and ENTER are still to be written."""
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    n_chunks = triton.cdiv(S, tiles.Q)
    dx = torch.empty(Bt, S, H, P, device=x.device, dtype=x.dtype)
    dCB = torch.empty(Bt, n_chunks, G, tiles.Q, tiles.Q, device=x.device, dtype=x.dtype)
    flows = torch.empty(Bt, n_chunks, H, FLOWS.value, tiles.Q, device=x.device, dtype=torch.float32)
    _dx_kernel[(2 * G, Bt * n_chunks)](
        x, dy, B, C, D, steps.vectors, dstates, dx, dCB, flows, x if seq_idx is None else seq_idx, S, H, n_chunks,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1),
        C.stride(2), 0 if seq_idx is None else seq_idx.stride(0), HAS_IDX=seq_idx is not None, P=P, N=N,
        BLOCK_P=tiles.P, BLOCK_N=tiles.N, R=tiles.R, SHARE=H // G, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return dx, dCB, flows


def dB_and_dC(
    x: Tensor,
    dy: Tensor,
    B: Tensor,
    C: Tensor,
    dCB: Tensor,
    steps: Steps,
    states: Tensor,
    dstates: Tensor,
    flows: Tensor,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """dB, dC, and keep <dS, S> per chunk and head; writes LEAVE and ENTER of the flows."""
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    n_chunks = triton.cdiv(S, tiles.Q)
    dB = torch.empty(Bt, S, G, N, device=x.device, dtype=B.dtype)
    dC = torch.empty(Bt, S, G, N, device=x.device, dtype=C.dtype)
    through = torch.empty_like(steps.keep)
    _dBC_kernel[(5 * G, Bt * n_chunks)](
        x, dy, B, C, *steps, states, dstates, dCB, dB, dC, flows, through,
        S, H, n_chunks,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1),
        C.stride(2), P=P, N=N, BLOCK_P=tiles.P, BLOCK_N=tiles.N, R=tiles.R, SHARE=H // G, STAGES=tiles.deep,
        num_warps=tiles.warps,
    )  # fmt: skip
    return dB, dC, through


def ddt_and_parameters(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    steps: Steps,
    flows: Tensor,
    through: Tensor,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """ddt (B, S, H) in dt's dtype, and dA, dD, ddt_bias as (3, H) in fp32."""
    Bt, S, H = dt.shape
    n_chunks = triton.cdiv(S, tiles.Q)
    ddt = torch.empty(Bt, S, H, device=dt.device, dtype=dt.dtype)
    parts = torch.empty(3, Bt * n_chunks, H, device=dt.device, dtype=torch.float32)
    block = min(16, triton.next_power_of_2(H))
    _ddt_kernel[(Bt * n_chunks, triton.cdiv(H, block))](
        dt, A, dt_bias, steps.vectors, flows, through, ddt, parts, S, H, n_chunks, dt.stride(0), dt.stride(1),
        *dt_limit, CLAMP=dt_limit != (0.0, torch.inf), R=tiles.R, BLOCK_H=block, num_warps=4,
    )  # fmt: skip
    return ddt, parts.sum(1)

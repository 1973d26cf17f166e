"""The backward kernels of the SSD (notation and forward: `kernels.ssd_forward`).

With dy, and dS_c the gradient of the state that chunk c leaves behind, w_j = exp(a_last - a_j) dt_j, u_i = exp(a_i):

    G_ji  = x_j . dy_i                      L_ji = exp(a_i - a_j) dt_j  for i >= j in one document, else 0
    dx_j  = sum_i (C_i . B_j) L_ji dy_i + w_j dS B_j + D dy_j
    dCB   = sum over the group's heads of G L;   dB_j = sum_i dCB_ji C_i + sum_h w_j x_j dS,
                                                 dC_i = sum_j dCB_ji B_j + sum_h u_i dy_i S
    dD    = sum_j x_j . dy_j
    ddt_j = ( sum_i M_ji + w_j x_j dS B_j ) / dt_j + A q_j,   M_ji = (C_i . B_j) G_ji L_ji,   dA = sum_t dt_t q_t

q_t is the gradient of dt_t A: the sum of everything that decays over t, that is of M_ji with j < t <= i, of e_j = w_j x_j dS
B_j with j < t, of r_i = u_i dy_i S C_i with i >= t, and of keep <dS, S>.  The first is a suffix sum of row sums minus column
sums of M, which would cancel to noise if the two were not sums over the very same fp32 numbers, or if they held the diagonal
(often the largest part, and no decay passes over it): here both come from one M with a zero diagonal, in one program.

Launches: `_prepare_kernel`, `_states_kernel` (S again and dS together), `_dx_kernel` (dx, dCB, what ddt needs of them),
`_dBC_kernel` (dB, dC, r, keep <dS, S>), `_ddt_kernel`, and one sum over chunks for A, D and dt_bias.
No atomics: every sum has one owner and one order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ssd_forward import LARGEST, TINY, Steps, Tiles, load_rows, softplus


class Flows(NamedTuple):
    """What `_dx_kernel` and `_dBC_kernel` leave for `_ddt_kernel`: fp32, (B, chunks, H, Q); through: (B, chunks, H)."""

    direct: Tensor  # of dt_j, decays held fixed
    net: Tensor  # row sums minus column sums of M, blocks on the diagonal and columns of the block below them
    late: Tensor  # row sums of the block below the diagonal, second half of a chunk only
    leave: Tensor  # e_j
    skip: Tensor  # x_j . dy_j
    enter: Tensor  # r_i
    through: Tensor  # keep <dS, S>


# --- dx and dCB ------------------------------------------------------------------------------------------------------


@triton.jit
def _dx_block(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    step_ptr,
    decay_ptr,
    source_ptr,
    to_end_ptr,
    middle_ptr,
    dstates_ptr,
    dx_ptr,
    dCB_ptr,
    direct_ptr,
    net_ptr,
    late_ptr,
    leave_ptr,
    skip_ptr,
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
    """Rows j: the first or second block of a chunk.  Columns i: the same tokens, and for the first block the second's too."""
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
    BC = tl.dot(B, tl.trans(C), input_precision="ieee")  # [R, N] @ [N, R]
    own = tl.sum(tl.where(diagonal, BC, 0.0), axis=1)
    BC = tl.where(visible, BC, 0.0)
    dBC = tl.zeros([R, R], dtype=tl.float32)
    down = tl.zeros([R], dtype=tl.float32)  # its diagonal, by itself: there a - log2(dt) would lose digits of dt
    if FIRST:
        C = load_rows(C_ptr, later, C_token, S, r, n, N)
        BC_right = tl.dot(B, tl.trans(C), input_precision="ieee")
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
        v = vector * Q + half
        step = tl.load(step_ptr + v + r)
        a = tl.load(decay_ptr + v + r)
        to_end = tl.load(to_end_ptr + v + r)
        D = tl.load(D_ptr + h).to(tl.float32)
        x = load_rows(x_ptr + h * x_head, start, x_token, S, r, p, P)  # [R, P]
        dy = load_rows(dy_ptr + h * P, start, H * P, S, r, p, P)
        dstate = tl.load(dstates_ptr + vector * (BLOCK_P * BLOCK_N) + state_offset)  # [P, N]
        dx = tl.dot(B, tl.trans(dstate), input_precision="ieee") * to_end[:, None]  # [R, N] @ [N, P]
        leave = tl.sum(dx * x.to(tl.float32), axis=1)
        dx += dy.to(tl.float32) * (own * step + D)[:, None]
        # Sums of M come before the product that needs `mixing`, so that fewer tiles are alive at once.
        G = tl.dot(x, tl.trans(dy), input_precision="ieee")  # [j, i]: [R, P] @ [P, R]
        skip = tl.sum(tl.where(diagonal, G, 0.0), axis=1)
        source = tl.load(source_ptr + v + r)
        L = tl.exp2(tl.minimum(a[None, :] - source[:, None], LARGEST))  # wrong, but finite, for i < j
        dBC += G * L
        down += skip * step
        mixing = BC * L
        M = mixing * G
        columns = tl.sum(M, axis=1)
        rows = tl.sum(M, axis=0)
        dx = tl.dot(mixing.to(x.dtype), dy, dx, input_precision="ieee")  # [R, R] @ [R, P]
        if FIRST:
            before = tl.load(middle_ptr + v + r)
            after = tl.load(middle_ptr + v + R + r)
            dy_right = load_rows(dy_ptr + h * P, later, H * P, S, r, p, P)
            G = tl.dot(x, tl.trans(dy_right), input_precision="ieee")
            L = before[:, None] * after[None, :]
            dBC_right += G * L
            mixing = BC_right * L
            M = mixing * G
            columns += tl.sum(M, axis=1)
            tl.store(late_ptr + v + R + r, tl.sum(M, axis=0))
            dx = tl.dot(mixing.to(x.dtype), dy_right, dx, input_precision="ieee")
        inverse = tl.where(step > TINY, 1.0 / tl.maximum(step, TINY), 0.0)  # a step of 0 has a softplus of slope 0
        tl.store(direct_ptr + v + r, (columns + leave) * inverse + own * skip)
        tl.store(net_ptr + v + r, rows - columns)
        tl.store(leave_ptr + v + r, leave)
        tl.store(skip_ptr + v + r, skip)
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
    step_ptr,
    decay_ptr,
    source_ptr,
    to_end_ptr,
    middle_ptr,
    dstates_ptr,
    dx_ptr,
    dCB_ptr,
    direct_ptr,
    net_ptr,
    late_ptr,
    leave_ptr,
    skip_ptr,
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
            x, dy, B, C, D_ptr, step_ptr, decay_ptr, source_ptr, to_end_ptr, middle_ptr, dstates_ptr, dx, dCB,
            direct_ptr, net_ptr, late_ptr, leave_ptr, skip_ptr, idx, item, chunk, g, S, H, x_token, x_head, B_token, C_token,
            True, HAS_IDX, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    else:
        _dx_block(
            x, dy, B, C, D_ptr, step_ptr, decay_ptr, source_ptr, to_end_ptr, middle_ptr, dstates_ptr, dx, dCB,
            direct_ptr, net_ptr, late_ptr, leave_ptr, skip_ptr, idx, item, chunk, g, S, H, x_token, x_head, B_token, C_token,
            False, HAS_IDX, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip


# --- dB and dC -------------------------------------------------------------------------------------------------------


@triton.jit
def _dB_block(
    x_ptr,
    C_ptr,
    to_end_ptr,
    dstates_ptr,
    dCB_ptr,
    dB_ptr,
    item,
    chunk,
    g,
    half,
    S,
    H: tl.constexpr,
    x_token: tl.constexpr,
    x_head,
    C_token: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dB_j = sum_i dCB_ji C_i + sum_h w_j x_j dS for one block of tokens j."""
    Q: tl.constexpr = 2 * R
    r = tl.arange(0, R)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    begin = chunk * Q
    start = begin + half
    dCB = tl.load(dCB_ptr + (half + r)[:, None] * Q + half + r[None, :])  # [j, i]
    C = load_rows(C_ptr, start, C_token, S, r, n, N)
    dB = tl.dot(dCB, C, input_precision="ieee")  # [R, R] @ [R, N]
    if half == 0:
        dCB = tl.load(dCB_ptr + r[:, None] * Q + R + r[None, :])
        C = load_rows(C_ptr, begin + R, C_token, S, r, n, N)
        dB = tl.dot(dCB, C, dB, input_precision="ieee")
    state_offset = p[:, None] * BLOCK_N + n[None, :]
    for k in tl.range(0, SHARE, num_stages=STAGES):
        h = g * SHARE + k
        vector = (item * H + h).to(tl.int64)
        to_end = tl.load(to_end_ptr + (vector * Q + half) + r)
        x = load_rows(x_ptr + h * x_head, start, x_token, S, r, p, P)
        dstate = tl.load(dstates_ptr + vector * (BLOCK_P * BLOCK_N) + state_offset)
        dB += tl.dot(x, dstate, input_precision="ieee") * to_end[:, None]  # [R, P] @ [P, N]
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
    from_start_ptr,
    states_ptr,
    dCB_ptr,
    dC_ptr,
    enter_ptr,
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
    dC = tl.dot(dCB, B, input_precision="ieee")  # [R, R] @ [R, N]
    if not FIRST:
        dCB = tl.load(dCB_ptr + half + r[:, None] + r[None, :] * Q)
        B = load_rows(B_ptr, begin, B_token, S, r, n, N)
        dC = tl.dot(dCB, B, dC, input_precision="ieee")
    C = load_rows(C_ptr, start, C_token, S, r, n, N)
    state_offset = p[:, None] * BLOCK_N + n[None, :]
    for k in tl.range(0, SHARE, num_stages=STAGES):
        h = g * SHARE + k
        vector = (item * H + h).to(tl.int64)
        v = vector * Q + half
        from_start = tl.load(from_start_ptr + v + r)
        dy = load_rows(dy_ptr + h * P, start, H * P, S, r, p, P)
        state = tl.load(states_ptr + vector * (BLOCK_P * BLOCK_N) + state_offset)
        part = tl.dot(dy, state, input_precision="ieee") * from_start[:, None]  # [R, P] @ [P, N]
        dC += part
        tl.store(enter_ptr + v + r, tl.sum(part * C.to(tl.float32), axis=1))
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
    to_end_ptr,
    from_start_ptr,
    keep_ptr,
    states_ptr,
    dstates_ptr,
    dCB_ptr,
    dB_ptr,
    dC_ptr,
    enter_ptr,
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
    if role < 2:
        _dB_block(
            x, C, to_end_ptr, dstates_ptr, dCB, dB, item, chunk, g, role * R, S, H, x_token, x_head, C_token,
            P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    elif role == 2:
        _dC_block(
            dy, B, C, from_start_ptr, states_ptr, dCB, dC, enter_ptr, item, chunk, g, S, H, B_token, C_token,
            True, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    elif role == 3:
        _dC_block(
            dy, B, C, from_start_ptr, states_ptr, dCB, dC, enter_ptr, item, chunk, g, S, H, B_token, C_token,
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
    step_ptr,
    direct_ptr,
    net_ptr,
    late_ptr,
    leave_ptr,
    skip_ptr,
    enter_ptr,
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
    v = vector[:, None] * Q + q[None, :]
    some = heads[:, None]
    A = tl.load(A_ptr + h, mask=heads, other=0.0).to(tl.float32)
    step = tl.load(step_ptr + v, mask=some, other=0.0)
    leave = tl.load(leave_ptr + v, mask=some, other=0.0)
    skip = tl.load(skip_ptr + v, mask=some, other=0.0)
    crossing = tl.load(net_ptr + v, mask=some, other=0.0) + tl.load(enter_ptr + v, mask=some, other=0.0)
    crossing += tl.load(late_ptr + v, mask=some & (q >= R)[None, :], other=0.0)
    through = tl.load(through_ptr + vector, mask=heads, other=0.0)
    flow = tl.cumsum(crossing, axis=1, reverse=True) + (tl.cumsum(leave, axis=1) - leave) + through[:, None]
    dstep = tl.load(direct_ptr + v, mask=some, other=0.0) + A[:, None] * flow
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
) -> tuple[Tensor, Tensor, Flows]:
    """dx, dCB (B, chunks, G, Q, Q) in x's dtype, and flows with `enter` and `through` still to be written."""
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    n_chunks = triton.cdiv(S, tiles.Q)
    dx = torch.empty(Bt, S, H, P, device=x.device, dtype=x.dtype)
    dCB = torch.empty(Bt, n_chunks, G, tiles.Q, tiles.Q, device=x.device, dtype=x.dtype)
    vectors = torch.empty(6, Bt, n_chunks, H, tiles.Q, device=x.device, dtype=torch.float32)
    flows = Flows(*vectors.unbind(0), torch.empty_like(steps.keep))
    _dx_kernel[(2 * G, Bt * n_chunks)](
        x, dy, B, C, D, steps.step, steps.decay, steps.source, steps.to_end, steps.middle, dstates, dx, dCB,
        flows.direct, flows.net, flows.late, flows.leave, flows.skip, x if seq_idx is None else seq_idx, S, H, n_chunks,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1), C.stride(2),
        0 if seq_idx is None else seq_idx.stride(0),
        HAS_IDX=seq_idx is not None, P=P, N=N, BLOCK_P=tiles.P, BLOCK_N=tiles.N, R=tiles.R, SHARE=H // G,
        STAGES=tiles.stages, num_warps=tiles.warps,
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
    flows: Flows,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    n_chunks = triton.cdiv(S, tiles.Q)
    dB = torch.empty(Bt, S, G, N, device=x.device, dtype=B.dtype)
    dC = torch.empty(Bt, S, G, N, device=x.device, dtype=C.dtype)
    _dBC_kernel[(5 * G, Bt * n_chunks)](
        x, dy, B, C, steps.to_end, steps.from_start, steps.keep, states, dstates, dCB, dB, dC, flows.enter, flows.through,
        S, H, n_chunks,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1), C.stride(2),
        P=P, N=N, BLOCK_P=tiles.P, BLOCK_N=tiles.N, R=tiles.R, SHARE=H // G, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return dB, dC


def ddt_and_parameters(
    dt: Tensor, A: Tensor, dt_bias: Tensor, dt_limit: tuple[float, float], steps: Steps, flows: Flows, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """ddt (B, S, H) in dt's dtype, and dA, dD, ddt_bias as (3, H) in fp32."""
    Bt, S, H = dt.shape
    n_chunks = triton.cdiv(S, tiles.Q)
    ddt = torch.empty(Bt, S, H, device=dt.device, dtype=dt.dtype)
    parts = torch.empty(3, Bt * n_chunks, H, device=dt.device, dtype=torch.float32)
    block = min(16, triton.next_power_of_2(H))
    _ddt_kernel[(Bt * n_chunks, triton.cdiv(H, block))](
        dt, A, dt_bias, steps.step, flows.direct, flows.net, flows.late, flows.leave, flows.skip, flows.enter, flows.through,
        ddt, parts, S, H, n_chunks, dt.stride(0), dt.stride(1), *dt_limit,
        CLAMP=dt_limit != (0.0, torch.inf), R=tiles.R, BLOCK_H=block, num_warps=4,
    )  # fmt: skip
    return ddt, parts.sum(1)

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

Launches: `_prepare_kernel`, `_states_kernel` (S again), the same backwards (dS and keep <dS, S>; `kernels.ssd_states`),
`_dx_kernel` (dx and dCB, what ddt needs of them), `_dBC_kernel` (dB, dC, e and r; in `kernels.ssd_backward_keys`),
`_ddt_kernel` (in `kernels.ssd_steps`), and one sum over chunks for A, D and dt_bias.
No atomics: every sum has one owner and one order.

Two programs of `_dx_kernel` and of `_dBC_kernel` share a multiprocessor, if none takes more than half of its 64 K
registers and 228 KB of shared memory: 255 a thread, 113 KB a program.  That shapes the code of the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import INTERPRET
from kernels._descriptors import describable, descriptor
from kernels.ssd_steps import (
    ACROSS,
    COLUMNS,
    DECAY,
    FLOWS,
    KINDS,
    LARGEST,
    MIDDLE,
    ROWS,
    SKIP,
    SOURCE,
    STEP,
    TO_END,
    Steps,
    Tiles,
    load_rows,
)

DESCRIPTORS = True  # x, dy and dS through tensor descriptors in `_dx_kernel`; False: by pointers everywhere


@triton.jit
def _load_head(
    ptr, desc, b, h, start, head_stride, token_stride, S,
    P: tl.constexpr, BLOCK_P: tl.constexpr, R: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[R, BLOCK_P]: R tokens of one head from `start` on, zeros past the row's end.  ptr: the row's first token.

    Through a descriptor it costs no registers for addresses and masks, by pointers some forty a thread.
    """
    if TMA:
        tile = desc.load([b, start, h, 0]).reshape([R, BLOCK_P])
    else:
        r = tl.arange(0, R)
        tile = load_rows(ptr + h.to(tl.int64) * head_stride, start, token_stride, S, r, tl.arange(0, BLOCK_P), P)
    return tile


@triton.jit
def _dx_block(
    x_ptr,
    x_desc,
    dy_ptr,
    dy_desc,
    B_ptr,
    C_ptr,
    D_ptr,
    vectors_ptr,
    dstates_ptr,
    dstates_desc,
    dx_ptr,
    dCB_ptr,
    own_ptr,
    flows_ptr,
    idx_ptr,
    b,
    item,
    chunk,
    g,
    S,
    H: tl.constexpr,
    x_token: tl.constexpr,
    x_head,
    B_token: tl.constexpr,
    C_token: tl.constexpr,
    dx_token: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    """dx of one block of tokens j, and what its block on the diagonal (i in it, too) adds to dCB and the flows."""
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
        visible = visible & (idx[:, None] == idx[None, :])
    BC = tl.dot(B, tl.trans(C), input_precision="ieee")  # [R, N] @ [N, R]
    own = tl.sum(tl.where(diagonal, BC, 0.0), axis=1)
    tl.store(own_ptr + half + r, own)
    BC = tl.where(visible, BC, 0.0)
    dBC = tl.zeros([R, R], dtype=tl.float32)
    down = tl.zeros([R], dtype=tl.float32)  # its diagonal, by itself: there a - log2(dt) would lose digits of dt
    if FIRST:
        C_right = load_rows(C_ptr, later, C_token, S, r, n, N)
        BC_right = tl.dot(B, tl.trans(C_right), input_precision="ieee")
        if HAS_IDX:
            idx_right = tl.load(idx_ptr + later + r, mask=r < S - later, other=-1)
            BC_right = tl.where(idx[:, None] == idx_right[None, :], BC_right, 0.0)
    real = (r < S - start)[:, None]
    if P != BLOCK_P:
        real = real & (p < P)[None, :]
    first_vector = (item * H + g * SHARE).to(tl.int64)
    vectors_ptr += first_vector * (KINDS * Q) + half
    flows_ptr += first_vector * (FLOWS * Q) + half
    for k in tl.range(0, SHARE, num_stages=STAGES, disable_licm=True):
        h = g * SHARE + k
        p_v = vectors_ptr + k * (KINDS * Q) + r
        p_f = flows_ptr + k * (FLOWS * Q) + r
        # Registers are scarce: values are loaded where they are used, and the sums of M come before dx exists.
        x = _load_head(x_ptr, x_desc, b, h, start, x_head, x_token, S, P, BLOCK_P, R, TMA)
        dy = _load_head(dy_ptr, dy_desc, b, h, start, P, H * P, S, P, BLOCK_P, R, TMA)
        a = tl.load(p_v + DECAY * Q)
        source = tl.load(p_v + SOURCE * Q)
        G = tl.dot(x, tl.trans(dy), input_precision="ieee")  # [j, i]: [R, P] @ [P, R]
        skip = tl.sum(tl.where(diagonal, G, 0.0), axis=1)
        tl.store(p_f + SKIP * Q, skip)
        L = tl.exp2(tl.minimum(a[None, :] - source[:, None], LARGEST))  # wrong, but finite, for i < j
        dBC += G * L
        L = BC * L  # in this order: where BC is 0 because i < j, G L may be infinite
        G = G * L  # M
        tl.store(p_f + COLUMNS * Q, tl.sum(G, axis=0))
        tl.store(p_f + ROWS * Q, tl.sum(G, axis=1))
        step = tl.load(p_v + STEP * Q)
        down += skip * step
        # dx += (own step + D) dy: on the diagonal of the product that dx needs anyway, where it is rounded to dy's
        # dtype; what the rounding took away is a second product.  With dy in registers instead, there are too few.
        straight = own * step + tl.load(D_ptr + h).to(tl.float32)
        L = tl.where(diagonal, straight[:, None], L)
        dx = tl.dot(L.to(dy.dtype), dy, input_precision="ieee")  # [R, R] @ [R, P]
        if dy.dtype != tl.float32:
            straight -= straight.to(dy.dtype).to(tl.float32)
            L = tl.where(diagonal, straight[:, None], 0.0)
            dx = tl.dot(L.to(dy.dtype), dy, dx, input_precision="ieee")
        if FIRST:
            before = tl.load(p_v + MIDDLE * Q)
            after = tl.load(p_v + (MIDDLE * Q + R))
            dy_right = _load_head(dy_ptr, dy_desc, b, h, later, P, H * P, S, P, BLOCK_P, R, TMA)
            L = BC_right * (before[:, None] * after[None, :])
            dx = tl.dot(L.to(dy.dtype), dy_right, dx, input_precision="ieee")
        if TMA:
            dstate = dstates_desc.load([(item * H + h) * BLOCK_P, 0])  # [P, N]
        else:
            vector = (item * H + h).to(tl.int64)
            dstate = tl.load(dstates_ptr + vector * (BLOCK_P * BLOCK_N) + (p[:, None] * BLOCK_N + n[None, :]))
        to_end = tl.load(p_v + TO_END * Q)
        dx += tl.dot(B, tl.trans(dstate), input_precision="ieee") * to_end[:, None]  # [R, N] @ [N, P]
        p_dx = dx_ptr + start.to(tl.int64) * dx_token + h * P
        tl.store(p_dx + (r[:, None] * dx_token + p[None, :]), dx, mask=real)
    out = dCB_ptr + half * Q + half + r[:, None] * Q + r[None, :]
    tl.store(out, tl.where(visible, dBC, tl.where(diagonal, down[:, None], 0.0)).to(dCB_ptr.dtype.element_ty))


@triton.jit
def _across_block(
    x_ptr,
    x_desc,
    dy_ptr,
    dy_desc,
    B_ptr,
    C_ptr,
    vectors_ptr,
    dCB_ptr,
    flows_ptr,
    idx_ptr,
    b,
    item,
    chunk,
    g,
    S,
    H: tl.constexpr,
    x_token: tl.constexpr,
    x_head,
    B_token: tl.constexpr,
    C_token: tl.constexpr,
    HAS_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    """What the block off the diagonal, j in the chunk's first half and i in its second, adds to dCB and the flows."""
    Q: tl.constexpr = 2 * R
    r = tl.arange(0, R)
    n = tl.arange(0, BLOCK_N)
    start = chunk * Q
    later = start + R
    B = load_rows(B_ptr, start, B_token, S, r, n, N)
    C = load_rows(C_ptr, later, C_token, S, r, n, N)
    BC = tl.dot(B, tl.trans(C), input_precision="ieee")  # [R, N] @ [N, R]
    if HAS_IDX:
        idx = tl.load(idx_ptr + start + r, mask=r < S - start, other=-1)
        idx_right = tl.load(idx_ptr + later + r, mask=r < S - later, other=-1)
        match = idx[:, None] == idx_right[None, :]
        BC = tl.where(match, BC, 0.0)
    dBC = tl.zeros([R, R], dtype=tl.float32)
    for k in tl.range(0, SHARE, num_stages=STAGES):
        h = g * SHARE + k
        vector = (item * H + h).to(tl.int64)
        p_v = vectors_ptr + vector * (KINDS * Q) + MIDDLE * Q + r
        p_f = flows_ptr + vector * (FLOWS * Q) + ACROSS * Q + r
        x = _load_head(x_ptr, x_desc, b, h, start, x_head, x_token, S, P, BLOCK_P, R, TMA)
        dy = _load_head(dy_ptr, dy_desc, b, h, later, P, H * P, S, P, BLOCK_P, R, TMA)
        before = tl.load(p_v)
        after = tl.load(p_v + R)
        G = tl.dot(x, tl.trans(dy), input_precision="ieee") * (before[:, None] * after[None, :])  # [j, i]
        dBC += G
        G = G * BC  # M
        tl.store(p_f, tl.sum(G, axis=1))
        tl.store(p_f + R, tl.sum(G, axis=0))
    if HAS_IDX:
        dBC = tl.where(match, dBC, 0.0)
    tl.store(dCB_ptr + R + r[:, None] * Q + r[None, :], dBC.to(dCB_ptr.dtype.element_ty))


@triton.jit
def _dx_kernel(
    x_ptr,
    x_desc,
    dy_ptr,
    dy_desc,
    B_ptr,
    C_ptr,
    D_ptr,
    vectors_ptr,
    dstates_ptr,
    dstates_desc,
    dx_ptr,
    dCB_ptr,
    own_ptr,
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
    dx_batch,
    dx_token: tl.constexpr,
    idx_batch,
    HAS_IDX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: the SHARE heads of one group, and dx of R tokens or the block of a chunk between its two halves.

    x, B, C strided; dy (B, S, H, P) contiguous; dx with batch and token strides; dCB (B, chunks, G, Q, Q), [.., j, i],
    blocks i >= j only; own (B, chunks, G, Q): B_j . C_j.
    """
    pid = tl.program_id(0) % (3 * (H // SHARE))
    item = tl.program_id(0) // (3 * (H // SHARE))
    role = pid % 3
    g = pid // 3
    row = item // n_chunks
    chunk = item % n_chunks
    b = row.to(tl.int64)
    x = x_ptr + b * x_batch
    dy = dy_ptr + b * S * H * P
    B = B_ptr + b * B_batch + g.to(tl.int64) * B_group
    C = C_ptr + b * C_batch + g.to(tl.int64) * C_group
    dx = dx_ptr + b * dx_batch
    group = (item * (H // SHARE) + g).to(tl.int64)
    dCB = dCB_ptr + group * (4 * R * R)
    own = own_ptr + group * (2 * R)
    idx = idx_ptr + b * idx_batch
    if role == 0:
        _dx_block(
            x, x_desc, dy, dy_desc, B, C, D_ptr, vectors_ptr, dstates_ptr, dstates_desc, dx, dCB, own, flows_ptr, idx,
            row, item, chunk, g, S, H, x_token, x_head, B_token, C_token, dx_token, True, HAS_IDX, P, N, BLOCK_P,
            BLOCK_N, R, SHARE, STAGES, TMA,
        )  # fmt: skip
    elif role == 1:
        _dx_block(
            x, x_desc, dy, dy_desc, B, C, D_ptr, vectors_ptr, dstates_ptr, dstates_desc, dx, dCB, own, flows_ptr, idx,
            row, item, chunk, g, S, H, x_token, x_head, B_token, C_token, dx_token, False, HAS_IDX, P, N, BLOCK_P,
            BLOCK_N, R, SHARE, STAGES, TMA,
        )  # fmt: skip
    else:
        _across_block(
            x, x_desc, dy, dy_desc, B, C, vectors_ptr, dCB, flows_ptr, idx, row, item, chunk, g, S, H, x_token, x_head,
            B_token, C_token, HAS_IDX, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES, TMA,
        )  # fmt: skip


def _reads_by_descriptor(*tensors: Tensor) -> bool:
    """Whether tiles of these (B, S, H, P) come through tensor descriptors: where the copy engine is, in 16 bits (fp32
    products spill on what it lays out), with all strides in multiples of 16 bytes.
    """
    able = DESCRIPTORS and all(describable(t) for t in tensors)
    if not able or INTERPRET:
        return able
    x = tensors[0]
    return x.element_size() == 2 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


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
    dx: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dx; returns dCB (B, chunks, G, Q, Q) in x's dtype, own (B, chunks, G, Q), and the flows (LEAVE and ENTER
    unwritten).

    dx: (B, S, H, P), rows and tokens anywhere, the heads of a token side by side.
    """
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    assert dx.stride()[2:] == (P, 1)
    n_chunks = triton.cdiv(S, tiles.Q)
    dCB = torch.empty(Bt, n_chunks, G, tiles.Q, tiles.Q, device=x.device, dtype=x.dtype)
    own = torch.empty(Bt, n_chunks, G, tiles.Q, device=x.device, dtype=torch.float32)
    flows = torch.empty(Bt, n_chunks, H, FLOWS.value, tiles.Q, device=x.device, dtype=torch.float32)
    descriptors = [None] * 3
    if tma := _reads_by_descriptor(x, dy):
        block = [1, tiles.R, 1, tiles.P]
        descriptors = [descriptor(t, block) for t in (x, dy)]
        descriptors.append(descriptor(dstates.view(-1, tiles.N), [tiles.P, tiles.N]))
    _dx_kernel[(3 * G * Bt * n_chunks,)](
        x, descriptors[0], dy, descriptors[1], B, C, D, steps.vectors, dstates, descriptors[2], dx, dCB, own, flows,
        x if seq_idx is None else seq_idx, S, H, n_chunks,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1),
        C.stride(2), dx.stride(0), dx.stride(1), 0 if seq_idx is None else seq_idx.stride(0),
        HAS_IDX=seq_idx is not None, P=P, N=N, BLOCK_P=tiles.P, BLOCK_N=tiles.N, R=tiles.R, SHARE=H // G,
        STAGES=tiles.stages, TMA=tma, num_warps=tiles.warps,
    )  # fmt: skip
    return dCB, own, flows

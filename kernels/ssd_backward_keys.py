"""dB and dC, the last large kernel of the SSD's backward pass; `kernels.ssd_backward` has formulas and notation."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.ssd_steps import ENTER, FLOWS, FROM_START, KINDS, LEAVE, TO_END, Steps, Tiles, load_rows


@triton.jit
def _dBC_block(
    value_ptr,
    value_token: tl.constexpr,
    value_head,
    own_ptr,
    own_token: tl.constexpr,
    other_ptr,
    other_token: tl.constexpr,
    vectors_ptr,
    states_ptr,
    dCB_ptr,
    out_ptr,
    flows_ptr,
    item,
    chunk,
    g,
    S,
    H: tl.constexpr,
    out_token: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """KEYS: dB_j = sum_i dCB_ji C_i + sum_h w_j x_j dS for one block of tokens j, and e_j.  Otherwise its mirror image
    dC_i = sum_j dCB_ji B_j + sum_h u_i dy_i S for one block of tokens i, and r_i.

    own: B for dB, C for dC; other: the other one; value and states: x and dS, or dy and S.
    """
    Q: tl.constexpr = 2 * R
    half: tl.constexpr = 0 if FIRST else R
    weight: tl.constexpr = TO_END if KEYS else FROM_START
    flow: tl.constexpr = LEAVE if KEYS else ENTER
    r = tl.arange(0, R)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    begin = chunk * Q
    start = begin + half
    # dC reads dCB as [i, j]: the transposition is in the addresses.
    at = r[:, None] * Q + r[None, :] if KEYS else r[:, None] + r[None, :] * Q
    dCB = tl.load(dCB_ptr + (half * Q + half) + at)
    other = load_rows(other_ptr, start, other_token, S, r, n, N)
    out = tl.dot(dCB, other, input_precision="ieee")  # [R, R] @ [R, N]
    if FIRST == KEYS:  # the block off the diagonal: j in the first half, i in the second
        dCB = tl.load(dCB_ptr + R + at)
        other = load_rows(other_ptr, begin + (R if KEYS else 0), other_token, S, r, n, N)
        out = tl.dot(dCB, other, out, input_precision="ieee")
    own = load_rows(own_ptr, start, own_token, S, r, n, N)
    state_offset = p[:, None] * BLOCK_N + n[None, :]
    for k in tl.range(0, SHARE, num_stages=STAGES):
        h = g * SHARE + k
        vector = (item * H + h).to(tl.int64)
        scale = tl.load(vectors_ptr + vector * (KINDS * Q) + (weight * Q + half) + r)
        value = load_rows(value_ptr + h.to(tl.int64) * value_head, start, value_token, S, r, p, P)
        state = tl.load(states_ptr + vector * (BLOCK_P * BLOCK_N) + state_offset)
        part = tl.dot(value, state, input_precision="ieee") * scale[:, None]  # [R, P] @ [P, N]
        out += part
        tl.store(flows_ptr + vector * (FLOWS * Q) + (flow * Q + half) + r, tl.sum(part * own.to(tl.float32), axis=1))
    mask = (r < S - start)[:, None]
    if N != BLOCK_N:
        mask = mask & (n < N)[None, :]
    out_ptr += start.to(tl.int64) * out_token + g * N
    tl.store(out_ptr + (r[:, None] * out_token + n[None, :]), out, mask=mask)


@triton.jit
def _dBC_kernel(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    states_ptr,
    dstates_ptr,
    dCB_ptr,
    dB_ptr,
    dC_ptr,
    flows_ptr,
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
    out_batch,
    out_token: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: one group and dB or dC of R tokens.

    dB, dC (B, S, G, N) with batch and token strides, the same for both, a token's groups side by side.
    """
    pid = tl.program_id(0) % (4 * (H // SHARE))
    item = tl.program_id(0) // (4 * (H // SHARE))
    role = pid % 4
    g = pid // 4
    row = item // n_chunks
    chunk = item % n_chunks
    groups = H // SHARE
    b = row.to(tl.int64)
    x = x_ptr + b * x_batch
    dy = dy_ptr + b * S * H * P
    B = B_ptr + b * B_batch + g.to(tl.int64) * B_group
    C = C_ptr + b * C_batch + g.to(tl.int64) * C_group
    dB = dB_ptr + b * out_batch
    dC = dC_ptr + b * out_batch
    dCB = dCB_ptr + (item * groups + g).to(tl.int64) * (4 * R * R)
    if role == 0:
        _dBC_block(
            x, x_token, x_head, B, B_token, C, C_token, vectors_ptr, dstates_ptr, dCB, dB, flows_ptr, item, chunk, g,
            S, H, out_token, True, True, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    elif role == 1:
        _dBC_block(
            x, x_token, x_head, B, B_token, C, C_token, vectors_ptr, dstates_ptr, dCB, dB, flows_ptr, item, chunk, g,
            S, H, out_token, True, False, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    elif role == 2:
        _dBC_block(
            dy, H * P, P, C, C_token, B, B_token, vectors_ptr, states_ptr, dCB, dC, flows_ptr, item, chunk, g,
            S, H, out_token, False, True, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip
    elif role == 3:  # not else: then Triton 3.6 runs out of registers
        _dBC_block(
            dy, H * P, P, C, C_token, B, B_token, vectors_ptr, states_ptr, dCB, dC, flows_ptr, item, chunk, g,
            S, H, out_token, False, False, P, N, BLOCK_P, BLOCK_N, R, SHARE, STAGES,
        )  # fmt: skip


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
    dB: Tensor,
    dC: Tensor,
) -> None:
    """Writes dB and dC, and LEAVE and ENTER of the flows.

    dB, dC: (B, S, G, N), rows and tokens anywhere but alike in both, the groups of a token side by side.
    """
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    assert dB.stride() == dC.stride()
    assert dB.stride()[2:] == (N, 1)
    n_chunks = triton.cdiv(S, tiles.Q)
    _dBC_kernel[(4 * G * Bt * n_chunks,)](
        x, dy, B, C, steps.vectors, states, dstates, dCB, dB, dC, flows,
        S, H, n_chunks,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1),
        C.stride(2), dB.stride(0), dB.stride(1), P=P, N=N, BLOCK_P=tiles.P, BLOCK_N=tiles.N, R=tiles.R, SHARE=H // G,
        STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip

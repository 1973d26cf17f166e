"""The states of the SSD that enter and leave its chunks, and their gradients (formulas: `kernels.ssd_forward`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import INTERPRET
from kernels.ssd_steps import FROM_START, KINDS, TO_END, Steps, Tiles, load_rows


@triton.jit
def _states_kernel(
    x_ptr,
    B_ptr,
    first_ptr,
    states_ptr,
    low_ptr,
    last_ptr,
    dy_ptr,
    C_ptr,
    dlast_ptr,
    dstates_ptr,
    dfirst_ptr,
    through_ptr,
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
    recurrence, from dy, C and from_start; and here, while it is in fp32, this block's share of keep <dS, S>.
    states, dstates (B, chunks, H, BLOCK_P, BLOCK_N); low, like states: what rounding took from them; None: not kept.
    first, last, dlast, dfirst (B, H, P, N); dy (B, S, H, P); through (B, chunks, H, blocks of a state).
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
    if BACKWARD:
        value_ptr = dy_ptr + (b * S * H + h) * P
        value_token = H * P
        key_ptr = C_ptr + b * C_batch + (h // share).to(tl.int64) * C_group
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
        value_ptr = x_ptr + (b * x_batch + h.to(tl.int64) * x_head)
        value_token = x_token
        key_ptr = B_ptr + b * B_batch + (h // share).to(tl.int64) * B_group
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
        at = vector * (BLOCK_P * BLOCK_N) + block
        rounded = state.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, rounded)
        if not BACKWARD and low_ptr is not None:
            tl.store(low_ptr + at, state - rounded.to(tl.float32))
        token = (q < S - start)[None, :]
        if P != BLOCK_P:
            token = token & (p < P)[:, None]
        p_value = value_ptr + start.to(tl.int64) * value_token
        value = tl.load(p_value + (q[None, :] * value_token + p[:, None]), mask=token, other=0.0)  # [P, Q]
        key = load_rows(key_ptr, start, key_token, S, q, n, N)  # [Q, N]
        weight = tl.load(weight_ptr + vector * (KINDS * Q) + q)
        value = (value.to(tl.float32) * weight[None, :]).to(key.dtype)
        state = state * tl.load(keep_ptr + vector)
        if BACKWARD:
            entering = tl.load(states_ptr + at).to(tl.float32)
            if low_ptr is not None:
                entering += tl.load(low_ptr + at).to(tl.float32)
            # As one row: Triton 3.6 has a fault in sums over an axis of what sm_100 keeps in tensor memory.
            part = tl.sum(tl.reshape(state * entering, [SPLIT_P * SPLIT_N]), axis=0)
            tl.store(through_ptr + vector * tl.num_programs(1) + tl.program_id(1), part)
        state = tl.dot(value, key, state, input_precision="ieee")  # [P, Q] @ [Q, N]
    tl.store(end_ptr + exact, state, mask=real)


def _split(x: Tensor, tiles: Tiles) -> tuple[int, int]:
    """The block of a head's state that a program carries.

    A row is walked in order, so programs come from heads and pieces of the state only: enough pieces to fill the GPU.
    """
    Bt, _, H, _ = x.shape
    split_p, split_n = tiles.P, min(tiles.N, 64)
    if not INTERPRET:
        while Bt * H * (tiles.P // split_p) * (tiles.N // split_n) < 120 and split_n > 32:
            split_n //= 2
        while Bt * H * (tiles.P // split_p) * (tiles.N // split_n) < 120 and split_p > 32:
            split_p //= 2
    return split_p, split_n


def _carry(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    steps: Steps,
    tiles: Tiles,
    states: tuple[Tensor, Tensor | None],
    first: Tensor | None,
    end: Tensor,
    gradients: tuple[Tensor, Tensor | None, Tensor, Tensor] | None = None,
) -> None:
    """One walk over every row; states and what rounding took from them; gradients: dy, dlast, dstates and through."""
    (Bt, S, H, P), (G, N) = x.shape, B.shape[2:]
    dy, dlast, dstates, through = gradients or (None,) * 4
    backward = gradients is not None
    split_p, split_n = _split(x, tiles)
    _states_kernel[(Bt * H, (tiles.P // split_p) * (tiles.N // split_n))](
        x, B, first, *states, None if backward else end, dy, C, dlast, dstates, end if backward else None, through,
        *steps, S, H, states[0].shape[1], H // G,
        x.stride(0), x.stride(1), x.stride(2), B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1),
        C.stride(2), BACKWARD=backward, HAS_FIRST=first is not None, HAS_DLAST=dlast is not None, P=P, N=N,
        BLOCK_P=tiles.P, BLOCK_N=tiles.N, SPLIT_P=split_p, SPLIT_N=split_n, R=tiles.R,
        STAGES=tiles.stages + 1 if tiles.stages > 1 else 1, num_warps=4,
    )  # fmt: skip


def carry_states(
    x: Tensor, B: Tensor, C: Tensor, steps: Steps, tiles: Tiles, initial_state: Tensor | None = None, low: bool = False
) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """The states entering each chunk, (B, chunks, H, padded P, padded N) in x's dtype, and the one after the last,
    (B, H, P, N) in fp32.  low: beside the former, if x is not fp32, what rounding took from them."""
    (Bt, S, H, P), N = x.shape, B.shape[3]
    states = x.new_empty(Bt, triton.cdiv(S, tiles.Q), H, tiles.P, tiles.N)
    last = x.new_empty(Bt, H, P, N, dtype=torch.float32)
    both = states, torch.empty_like(states) if low and x.dtype != torch.float32 else None
    _carry(x, B, C, steps, tiles, both, initial_state, last)
    return both, last


def carry_gradients(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    steps: Steps,
    tiles: Tiles,
    states: tuple[Tensor, Tensor | None],
    dy: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the states that the chunks leave, like those of `carry_states`, which enter them; of the initial
    state, (B, H, P, N) in fp32; and keep <dS, S> of each chunk and head in parts to be summed, (B, chunks, H, parts).

    The inner product is taken here because dS is at hand in fp32, and of S in two pieces: it is most of dA where states
    decay slowly, and each factor that is rounded once would add as much error as all else.  dy and dlast contiguous.
    """
    (Bt, _, H, P), N = x.shape, B.shape[3]
    split_p, split_n = _split(x, tiles)
    parts = (tiles.P // split_p) * (tiles.N // split_n)
    dstates, dfirst = torch.empty_like(states[0]), x.new_empty(Bt, H, P, N, dtype=torch.float32)
    through = x.new_empty(*dstates.shape[:3], parts, dtype=torch.float32)
    _carry(x, B, C, steps, tiles, states, None, dfirst, (dy, dlast, dstates, through))
    return dstates, dfirst, through

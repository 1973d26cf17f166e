"""SSD, the scan of Mamba-2 (arXiv:2405.21060).  Per head, with state S of shape (P, N):

    dt_t = clamp(softplus(dt_t + dt_bias), low, high)
    S_t  = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T            y_t = S_t C_t + D x_t

`ssd_recurrence` is that, token by token: the oracle.  `ssd_reference` is the chunked form used for training: inside a
chunk of L tokens the scan is a masked matrix product, between chunks only the state passes.  The state is reset where
a packed row begins a new document, wherever in a chunk that is.  Heads h of group g = h // (H / G) share B and C.
Decay sums, exponentials and states are fp32 (float64 for float64 input) whatever the dtype of x.

The Triton kernels are in `kernels.ssd_steps` (what depends on dt alone), `kernels.ssd_forward`, `kernels.ssd_backward`
and `kernels.ssd_backward_keys`.  They choose their own chunk, which the result does not depend on, and keep the inputs
for the backward, nothing else: decays and states are made again there.
"""

from __future__ import annotations  # so that ssd_steps.Tiles is not looked up where there is no triton

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._common import accumulate_dtype, triton, use_triton

if triton is not None:
    from kernels import ssd_backward, ssd_backward_keys, ssd_forward, ssd_states, ssd_steps


def time_steps(dt: Tensor, dt_bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """softplus(dt + dt_bias), clamped; fp32: in bf16 the step would be off by percents and the decay quantised."""
    acc = accumulate_dtype(dt)
    dt = F.softplus(dt.to(acc) + dt_bias.to(acc))
    return dt if limit == (0.0, torch.inf) else dt.clamp(*limit)


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ssd`.  One step per token: slow, and plainly the definition."""
    acc = accumulate_dtype(x)
    dt = time_steps(dt, dt_bias, dt_limit).to(acc)
    x, A, B, C, D = (t.to(acc) for t in (x, A, B, C, D))
    share = x.shape[2] // B.shape[2]
    B, C = (m.repeat_interleave(share, dim=2) for m in (B, C))  # (B, S, G, N) -> (B, S, H, N)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if initial_state is None else initial_state.to(acc)
    y = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        state = state * torch.exp(dt[:, t] * A)[..., None, None]
        state = state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        y.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(y, dim=1), state


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    chunk: int,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ssd`.  Letters: b batch, c chunk, i j tokens of a chunk, g group, r head of a group, p n as P N."""
    dtype, acc, S = x.dtype, accumulate_dtype(x), x.shape[1]
    G = B.shape[2]
    L = min(chunk, S)
    x, A, B, C, D = (t.to(acc) for t in (x, A, B, C, D))
    dt = time_steps(dt, dt_bias, dt_limit).to(acc)
    short = -S % L
    if short:  # a step of length zero neither decays nor adds: padding is exact
        x, dt, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, short)) for t in (x, dt, B, C))
    grouped = x.shape[2] // G
    xc = x.unflatten(2, (G, grouped)).unflatten(1, (-1, L))  # (b, c, j, g, r, p)
    dtc = dt.unflatten(2, (G, grouped)).unflatten(1, (-1, L)).permute(0, 1, 3, 4, 2)  # (b, c, g, r, j)
    Bc, Cc = (m.unflatten(1, (-1, L)).transpose(2, 3) for m in (B, C))  # (b, c, g, j, n)
    decay = (dtc * A.view(G, grouped, 1)).cumsum(-1)  # log of the decay from the chunk's start through token j
    last = decay[..., -1:]
    to_end = (last - decay).exp()  # from token j to the chunk's end
    from_start = decay.exp()
    visible = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
    keep = last.exp()  # what a whole chunk leaves of the state before it
    if seq_idx is not None:
        idx = (
            F.pad(seq_idx, (0, short), mode="replicate").unflatten(1, (-1, L))
            if short
            else seq_idx.unflatten(1, (-1, L))
        )
        before = torch.cat([idx[:, :1, 0], idx[:, :-1, -1]], dim=1)  # the document of the state entering each chunk
        visible = (visible & (idx.unsqueeze(-1) == idx.unsqueeze(-2)))[:, :, None, None]  # (b, c, 1, 1, i, j)
        to_end = to_end * (idx == idx[..., -1:])[:, :, None, None]
        from_start = from_start * (idx == before.unsqueeze(-1))[:, :, None, None]
        keep = keep * (idx[..., -1] == before)[:, :, None, None, None]
    # inside the chunk: y_i += sum_{j <= i} (C_i . B_j) exp(decay_i - decay_j) dt_j x_j
    xs = xc.permute(0, 1, 3, 4, 2, 5)  # (b, c, g, r, j, p)
    stepped = xs * dtc.unsqueeze(-1)  # dt_j x_j
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~visible, -torch.inf).exp()
    mixing = (Cc @ Bc.mT).unsqueeze(3) * between  # (b, c, g, r, i, j)
    y = mixing @ stepped
    # what each chunk adds to the state, (b, c, g, r, p, n); then the states pass from chunk to chunk
    added = (stepped * to_end.unsqueeze(-1)).mT @ Bc.unsqueeze(3)
    state = torch.zeros_like(added[:, 0]) if initial_state is None else initial_state.to(acc).unflatten(1, (G, grouped))
    entering = []
    for c in range(added.shape[1]):
        entering.append(state)
        state = state * keep[:, c].unsqueeze(-1) + added[:, c]
    # from the state entering the chunk: y_i += exp(decay_i) S C_i
    y = y + (Cc.unsqueeze(3) * from_start.unsqueeze(-1)) @ torch.stack(entering, dim=1).mT
    y = y + D.view(G, grouped, 1, 1) * xs
    y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :S]
    return y.to(dtype), state.flatten(1, 2)


def _aligned(t: Tensor | None) -> Tensor | None:
    """What the kernels can read: any strides but the last, which must be 1, and the second.

    From a chunk's first token to the others they count in 32 bits, for want of registers: 128 tokens at most.
    """
    return t if t is None or (t.stride(-1) == 1 and t.stride(1) < 2**24) else t.contiguous()


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    seq_idx: Tensor | None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels of `ssd`, outside autograd.  Strides: any but the last, which is 1; initial_state contiguous."""
    tiles = ssd_steps.pick_tiles(x.dtype, x.device, x.shape[3], B.shape[3])
    steps = ssd_steps.prepare(dt, A, dt_bias, dt_limit, seq_idx, tiles)
    (states, _), last = ssd_states.carry_states(x, B, C, steps, tiles, initial_state)
    return ssd_forward.scan(x, B, C, D, steps, states, seq_idx, tiles), last


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dy: Tensor,
    dlast: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    trained: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Writes dx, ddt, dB and dC into `gradients`; returns the gradients of A, D and dt_bias, if any of them is trained,
    and of the initial state.

    The first ten as for `forward`; dy and dlast contiguous.  `gradients` may be columns of wider tensors: a token's
    numbers lie side by side, and dB and dC have the same strides.
    """
    dx, ddt, dB, dC = gradients
    tiles = ssd_steps.pick_tiles(x.dtype, x.device, x.shape[3], B.shape[3])
    steps = ssd_steps.prepare(dt, A, dt_bias, dt_limit, seq_idx, tiles)
    states, _ = ssd_states.carry_states(x, B, C, steps, tiles, initial_state, low=True)
    dstates, dfirst, through = ssd_states.carry_gradients(x, B, C, steps, tiles, states, dy, dlast)
    dCB, own, flows = ssd_backward.dx_and_dCB(x, dy, B, C, D, steps, dstates, seq_idx, tiles, dx)
    ssd_backward_keys.dB_and_dC(x, dy, B, C, dCB, steps, states[0], dstates, flows, tiles, dB, dC)
    parts = ssd_steps.ddt_and_parameters(dt, A, dt_bias, dt_limit, steps, own, flows, through, tiles, ddt)
    sums = (None,) * 3
    if trained:
        sums = (total.to(t.dtype) for total, t in zip(parts.sum(1), (A, D, dt_bias), strict=True))
    return *sums, None if initial_state is None else dfirst.to(initial_state.dtype)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, dt_limit, seq_idx, initial_state):
        x, dt, B, C, seq_idx = map(_aligned, (x, dt, B, C, seq_idx))
        first = None if initial_state is None else initial_state.contiguous()
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, seq_idx, first)
        ctx.dt_limit = dt_limit
        ctx.set_materialize_grads(False)
        return forward(x, dt, A, B, C, D, dt_bias, dt_limit, seq_idx, first)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, dt_bias, seq_idx, first = ctx.saved_tensors
        dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
        dlast = None if dlast is None else dlast.contiguous()
        dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        dA, dD, dbias, dfirst = backward(
            x, dt, A, B, C, D, dt_bias, ctx.dt_limit, seq_idx, first, dy, dlast, (dx, ddt, dB, dC),
            trained=any(ctx.needs_input_grad[i] for i in (2, 5, 6)),
        )  # fmt: skip
        return dx, ddt, dA, dB, dC, dD, dbias, None, None, dfirst


def state_fits(x: Tensor, P: int, N: int) -> bool:
    """Whether the kernels, in x's dtype and on its device, can hold a head's state of P x N."""
    return ssd_steps.pick_tiles(x.dtype, x.device, P, N) is not None


def _check(
    what: str,
    lead: str,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    parameters: tuple[Tensor, ...],
    state: Tensor | None,
) -> None:
    """lead: how the dimensions before x's last two are called, in words of the error."""
    fits = x.ndim == B.ndim == 2 + lead.count(",") and dt.shape == x.shape[:-1]
    if not fits or B.shape != C.shape or B.shape[:-2] != x.shape[:-2]:
        raise ValueError(
            f"{what}: x {tuple(x.shape)}, dt {tuple(dt.shape)}, B {tuple(B.shape)} and C {tuple(C.shape)} do not fit "
            f"({lead}H, P), ({lead}H), ({lead}G, N), ({lead}G, N)"
        )
    (H, P), (G, N) = x.shape[-2:], B.shape[-2:]
    if any(t.shape != (H,) for t in parameters):
        raise ValueError(f"{what}: A, D and dt_bias need one number for each of {H} heads")
    if G == 0 or H % G:
        raise ValueError(f"{what}: {H} heads are not a multiple of {G} groups")
    if state is not None and state.shape != (len(x), H, P, N):
        raise ValueError(f"{what}: the state is {tuple(state.shape)}; x and B need {(len(x), H, P, N)}")


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    chunk: int,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x: (B, S, H, P); dt: (B, S, H), before softplus and bias; A, D, dt_bias: (H,), A negative; B, C: (B, S, G, N).

    seq_idx: (B, S) integers, the document of each token, non-decreasing along a row; initial_state: (B, H, P, N),
    belonging to the document of the first token.  Any S.  Returns y (B, S, H, P) in x's dtype and the state after the
    last token, (B, H, P, N) in fp32 (float64 for float64), both differentiable in every tensor argument.
    backend:
    "auto", "triton" or "torch" (`kernels._common.use_triton`).  The kernels need x, B and C in one dtype, P at most
    128 and N at most 256, else PyTorch runs.  They read any strides whose last is 1, run the same sums in the same
    order every time, and move 47 kB a token forward, 120 kB backward at H = 64, P = 64, G = 8, N = 128 in bf16: bound
    by memory.  Raises ValueError on shapes that do not fit, H that is not a multiple of G, and S of zero.
    """
    _check("ssd", "B, S, ", x, dt, B, C, (A, D, dt_bias), initial_state)
    if seq_idx is not None and seq_idx.shape != x.shape[:2]:
        raise ValueError(f"ssd: seq_idx is {tuple(seq_idx.shape)}; x {tuple(x.shape)} needs {tuple(x.shape[:2])}")
    if x.shape[1] == 0:
        raise ValueError("ssd: the sequence is empty")
    able = use_triton(x, backend) and x.dtype == B.dtype == C.dtype and x.numel() > 0
    if able and state_fits(x, x.shape[3], B.shape[3]):
        A, D, dt_bias = (t.contiguous() for t in (A, D, dt_bias))
        return _SSD.apply(x, dt, A, B, C, D, dt_bias, dt_limit, seq_idx, initial_state)
    return ssd_reference(x, dt, A, B, C, D, dt_bias, chunk, dt_limit, seq_idx, initial_state)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of decoding: state (B, H, P, N), x (B, H, P), dt (B, H), B and C (B, G, N).  Returns y and the new
    state.

    The kernel has no backward: where a gradient is wanted, PyTorch runs.  It reads and writes the state once.  Raises
    ValueError on shapes that do not fit.
    """
    _check("ssd_step", "B, ", x, dt, B, C, (A, D, dt_bias), state)
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (state, x, dt, A, B, C, D, dt_bias))
    if use_triton(x, backend) and not wants_grad:
        x, dt, B, C = map(_aligned, (x, dt, B, C))
        A, D, dt_bias = (t.contiguous() for t in (A, D, dt_bias))
        return ssd_forward.step(state.contiguous(), x, dt, A, B, C, D, dt_bias, dt_limit)
    y, state = ssd_recurrence(
        x.unsqueeze(1), dt.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1), D, dt_bias, dt_limit, None, state
    )
    return y.squeeze(1).to(x.dtype), state

"""Causal depthwise convolution and SiLU on channel-last data.

    y[t, c] = silu(bias[c] + sum_j weight[c, j] * x[t - W + 1 + j, c])    j = 0 .. W-1; the last tap is the token itself

A tap that would reach before the sequence reads `initial` (zeros if absent); one that would reach into another document
of a packed row reads zero.

The kernels walk down a run of rows with BLOCK channels and hold the last three rows in registers, so a row is loaded
once and not once per tap; loads of the next rows are on their way meanwhile.  Memory: the backward keeps x only and
computes the sum under the SiLU again from rows it reads anyway.  Traffic in elements: 2 S C forward, 3 S C backward.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._bandwidth import jit, sigmoid, sum_partials, tl
from kernels._common import accumulate_dtype, triton, use_triton


class Launch(NamedTuple):
    block: int  # channels of a program
    warps: int
    programs_per_sm: int  # as many as fit at once: each walks down its run of rows, and all end together
    stages: int  # loads of this many iterations, of 4 rows each, are in flight through shared memory


FORWARD = Launch(block=512, warps=4, programs_per_sm=4, stages=3)
BACKWARD = Launch(block=1024, warps=8, programs_per_sm=1, stages=4)
MIN_ROWS = 16  # of a run: below this, reading the neighbours' last rows again and the partial sums cost too much


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None, initial: Tensor | None = None
) -> Tensor:
    acc = accumulate_dtype(x)
    S, W = x.shape[1], weight.shape[1]
    before = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if initial is None else initial.to(x.dtype)
    padded = torch.cat([before, x], dim=1).to(acc)  # (B, W - 1 + S, C)
    if seq_idx is not None:
        documents = F.pad(seq_idx, (W - 1, 0), mode="replicate")  # `initial` belongs to the first token's document
    y = x.new_zeros(x.shape[2], dtype=acc) if bias is None else bias.to(acc)
    for j in range(W):
        tap = padded[:, j : j + S]
        if seq_idx is not None:
            tap = tap * (documents[:, j : j + S] == seq_idx).unsqueeze(-1)
        y = torch.addcmul(y, tap, weight[:, j].to(acc))
    return F.silu(y).to(x.dtype)


# In the kernels tuples count tokens back: w[0] multiplies the token itself, x[1] is the row before, d[3] the document
# three rows up.  Widths below 4 leave the far ones out.
@jit
def _place(S, C, steps, BLOCK: tl.constexpr):
    """This program's block of channels, its run among those of all sequences, and the runs of a sequence."""
    blocks = tl.cdiv(C, BLOCK)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.cdiv(S, 4 * steps)


@jit
def _rows(live, t, low, high):
    """The mask `live` of row t if low <= t < high, else nothing.  (The interpreter cannot combine it with a scalar.)"""
    t = tl.full(live.shape, t, tl.int64)
    return live & (t >= low) & (t < high)


@jit
def _weights(weight_ptr, bias_ptr, cols, live, W: tl.constexpr, BIAS: tl.constexpr):
    """The taps, nearest first, and the bias of a block of channels, fp32; zeros where there is none."""
    w0 = tl.load(weight_ptr + cols * W + (W - 1), mask=live, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + cols * W + (W - 2), mask=live, other=0.0).to(tl.float32)
    w2, w3, bias = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    if W > 2:
        w2 = tl.load(weight_ptr + cols * W + (W - 3), mask=live, other=0.0).to(tl.float32)
    if W > 3:
        w3 = tl.load(weight_ptr + cols * W + (W - 4), mask=live, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
    return (w0, w1, w2, w3), bias


@jit
def _before(x_ptr, initial_ptr, first, x_row, C, live, BACK: tl.constexpr, W: tl.constexpr, INITIAL: tl.constexpr):
    """The row BACK tokens before row `first` of a run; before the sequence it is initial's, or zero."""
    x = tl.load(x_ptr + (first - BACK) * x_row, mask=_rows(live, first, 1, first + 1), other=0.0).to(tl.float32)
    if INITIAL and BACK < W:
        x += tl.load(initial_ptr + (W - 1 - BACK) * C, mask=_rows(live, first, 0, 1), other=0.0).to(tl.float32)
    return x


@jit
def _document(seq_ptr, t, S, SEQ: tl.constexpr):
    """Document of row t; before the sequence that of its first token."""
    document = 0
    if SEQ:
        document = tl.load(seq_ptr + tl.minimum(tl.maximum(t, 0), S - 1)).to(tl.int32)
    return document


@jit
def _within(x, document, own, SEQ: tl.constexpr):
    """x, or zero where it belongs to another document."""
    if SEQ:
        x = tl.where(document == own, x, 0.0)
    return x


@jit
def _taps(x, d, SEQ: tl.constexpr):
    """The rows x that the token x[0] of document d[0] sees."""
    return x[0], _within(x[1], d[1], d[0], SEQ), _within(x[2], d[2], d[0], SEQ), _within(x[3], d[3], d[0], SEQ)


@jit
def _convolve(x, w, bias, W: tl.constexpr):
    a = bias + w[0] * x[0] + w[1] * x[1]
    if W > 2:
        a += w[2] * x[2]
    if W > 3:
        a += w[3] * x[3]
    return a


@jit
def _silu_row(x, d, w, bias, W: tl.constexpr, SEQ: tl.constexpr):
    a = _convolve(_taps(x, d, SEQ), w, bias, W)
    return a * sigmoid(a)


@jit(do_not_specialize=["S", "steps"])
def _fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, seq_ptr, initial_ptr, y_ptr, S, C, steps, x_batch, x_row: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, SEQ: tl.constexpr, INITIAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK channels of a run of 4 * steps rows of one sequence.

    x (B, S, C) with batch and row strides; weight (C, W), bias (C,), seq (B, S), initial (B, W-1, C), y contiguous.
    """
    block, run, runs = _place(S, C, steps, BLOCK)
    cols = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = cols < C
    first = (run % runs).to(tl.int64) * (4 * steps)
    batch = (run // runs).to(tl.int64)
    x_ptr += batch * x_batch + cols
    y_ptr += batch * S * C + cols
    seq_ptr += batch * S
    initial_ptr += batch * (W - 1) * C + cols
    w, bias = _weights(weight_ptr, bias_ptr, cols, live, W, BIAS)
    x1 = _before(x_ptr, initial_ptr, first, x_row, C, live, 1, W, INITIAL)  # [BLOCK]
    x2 = _before(x_ptr, initial_ptr, first, x_row, C, live, 2, W, INITIAL)
    x3 = _before(x_ptr, initial_ptr, first, x_row, C, live, 3, W, INITIAL)
    d1 = _document(seq_ptr, first - 1, S, SEQ)
    d2 = _document(seq_ptr, first - 2, S, SEQ)
    d3 = _document(seq_ptr, first - 3, S, SEQ)
    for step in tl.range(0, steps, num_stages=STAGES):
        t = first + 4 * step
        # All loads, then all stores: the compiler must assume that a store changes what a later load reads.
        xa = tl.load(x_ptr + t * x_row, mask=_rows(live, t, 0, S), other=0.0).to(tl.float32)
        xb = tl.load(x_ptr + (t + 1) * x_row, mask=_rows(live, t + 1, 0, S), other=0.0).to(tl.float32)
        xc = tl.load(x_ptr + (t + 2) * x_row, mask=_rows(live, t + 2, 0, S), other=0.0).to(tl.float32)
        xd = tl.load(x_ptr + (t + 3) * x_row, mask=_rows(live, t + 3, 0, S), other=0.0).to(tl.float32)
        da = _document(seq_ptr, t, S, SEQ)
        db = _document(seq_ptr, t + 1, S, SEQ)
        dc = _document(seq_ptr, t + 2, S, SEQ)
        dd = _document(seq_ptr, t + 3, S, SEQ)
        ya = _silu_row((xa, x1, x2, x3), (da, d1, d2, d3), w, bias, W, SEQ)
        yb = _silu_row((xb, xa, x1, x2), (db, da, d1, d2), w, bias, W, SEQ)
        yc = _silu_row((xc, xb, xa, x1), (dc, db, da, d1), w, bias, W, SEQ)
        yd = _silu_row((xd, xc, xb, xa), (dd, dc, db, da), w, bias, W, SEQ)
        tl.store(y_ptr + t * C, ya, mask=_rows(live, t, 0, S))
        tl.store(y_ptr + (t + 1) * C, yb, mask=_rows(live, t + 1, 0, S))
        tl.store(y_ptr + (t + 2) * C, yc, mask=_rows(live, t + 2, 0, S))
        tl.store(y_ptr + (t + 3) * C, yd, mask=_rows(live, t + 3, 0, S))
        x1, x2, x3, d1, d2, d3 = xd, xc, xb, dd, dc, db


def _runs(x: Tensor, launch: Launch) -> tuple[int, int, int]:
    """Blocks of channels, runs (of all sequences together), and the steps of 4 rows in a run."""
    B, S, C = x.shape
    blocks = triton.cdiv(C, launch.block)
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    runs = max(1, sms * launch.programs_per_sm // (blocks * B))
    steps = triton.cdiv(max(triton.cdiv(S, runs), MIN_ROWS), 4)
    return blocks, triton.cdiv(S, 4 * steps) * B, steps


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None = None,
    initial: Tensor | None = None,
) -> Tensor:
    """The kernel, outside autograd.  x: rows anywhere, neighbouring channels; the others contiguous."""
    B, S, C = x.shape
    y = torch.empty(B, S, C, dtype=x.dtype, device=x.device)
    blocks, runs, steps = _runs(x, FORWARD)
    _fwd_kernel[(blocks * runs,)](
        x, weight, bias, x if seq_idx is None else seq_idx, x if initial is None else initial, y,
        S, C, steps, x.stride(0), x.stride(1),
        W=weight.shape[1], BLOCK=FORWARD.block, BIAS=bias is not None, SEQ=seq_idx is not None,
        INITIAL=initial is not None, STAGES=FORWARD.stages, num_warps=FORWARD.warps,
    )  # fmt: skip
    return y


@jit
def _row_grad(dy, x, d, w, bias, sums, own, W: tl.constexpr, SEQ: tl.constexpr):
    """g of one row, and the sums that become dweight and dbias, moved on by this row if it is the run's own."""
    x = _taps(x, d, SEQ)
    a = _convolve(x, w, bias, W)
    s = sigmoid(a)
    g = dy * (s + a * s * (1.0 - s))
    n = tl.where(own, g, 0.0)
    dw0, dw1, dw2, dw3, dbias = sums
    if W > 2:
        dw2 += n * x[2]
    if W > 3:
        dw3 += n * x[3]
    return g, (dw0 + n * x[0], dw1 + n * x[1], dw2, dw3, dbias + n)


@jit
def _row_dx(g, d, w, W: tl.constexpr, SEQ: tl.constexpr):
    """dx of the row of g[3], three rows before that of g[0]."""
    dx = w[0] * g[3] + w[1] * _within(g[2], d[2], d[3], SEQ)
    if W > 2:
        dx += w[2] * _within(g[1], d[1], d[3], SEQ)
    if W > 3:
        dx += w[3] * _within(g[0], d[0], d[3], SEQ)
    return dx


# With a the sum under the SiLU and s = sigmoid(a):   g[t] = dy[t] * (s + a s (1 - s)),
# dx[t] = sum_n w_n g[t+n],   dw_n = sum_t g[t] x[t-n],   dbias = sum_t g[t];   only within a document.
@jit(do_not_specialize=["S", "steps"])
def _bwd_kernel(
    x_ptr, weight_ptr, bias_ptr, seq_ptr, initial_ptr, dy_ptr, dx_ptr, dinitial_ptr, partial_ptr,
    S, C, steps, x_batch, x_row: tl.constexpr, dy_batch, dy_row, dx_batch, dx_row: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, SEQ: tl.constexpr, INITIAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: dx of BLOCK channels of a run of 4 * steps rows, three rows behind the g it needs for that.

    It therefore runs one step past its end, where g is computed for dx but belongs to the next run's sums.
    x, dy, dx (B, S, C) with batch and row strides; partial (B * runs, W + 1, C) fp32, taps then bias; the others
    contiguous.
    """
    block, run, runs = _place(S, C, steps, BLOCK)
    cols = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = cols < C
    first = (run % runs).to(tl.int64) * (4 * steps)
    end = tl.minimum(first + 4 * steps, S)
    last = tl.minimum(first + 4 * steps + W - 1, S)  # rows from here on touch nothing of this run
    batch = (run // runs).to(tl.int64)
    x_ptr += batch * x_batch + cols
    dy_ptr += batch * dy_batch + cols
    dx_ptr += batch * dx_batch + cols
    seq_ptr += batch * S
    initial_ptr += batch * (W - 1) * C + cols
    dinitial_ptr += batch * (W - 1) * C + cols
    w, bias = _weights(weight_ptr, bias_ptr, cols, live, W, BIAS)
    x1 = _before(x_ptr, initial_ptr, first, x_row, C, live, 1, W, INITIAL)  # [BLOCK]
    x2 = _before(x_ptr, initial_ptr, first, x_row, C, live, 2, W, INITIAL)
    x3 = _before(x_ptr, initial_ptr, first, x_row, C, live, 3, W, INITIAL)
    d1 = _document(seq_ptr, first - 1, S, SEQ)
    d2 = _document(seq_ptr, first - 2, S, SEQ)
    d3 = _document(seq_ptr, first - 3, S, SEQ)
    zero = tl.zeros([BLOCK], tl.float32)
    g1, g2, g3 = zero, zero, zero  # of the run before: no row of this run needs them
    sums = (zero, zero, zero, zero, zero)  # dweight, nearest tap first, and dbias
    for step in tl.range(0, steps + 1, num_stages=STAGES):
        t = first + 4 * step
        xa = tl.load(x_ptr + t * x_row, mask=_rows(live, t, 0, last), other=0.0).to(tl.float32)
        xb = tl.load(x_ptr + (t + 1) * x_row, mask=_rows(live, t + 1, 0, last), other=0.0).to(tl.float32)
        xc = tl.load(x_ptr + (t + 2) * x_row, mask=_rows(live, t + 2, 0, last), other=0.0).to(tl.float32)
        xd = tl.load(x_ptr + (t + 3) * x_row, mask=_rows(live, t + 3, 0, last), other=0.0).to(tl.float32)
        ya = tl.load(dy_ptr + t * dy_row, mask=_rows(live, t, 0, last), other=0.0).to(tl.float32)
        yb = tl.load(dy_ptr + (t + 1) * dy_row, mask=_rows(live, t + 1, 0, last), other=0.0).to(tl.float32)
        yc = tl.load(dy_ptr + (t + 2) * dy_row, mask=_rows(live, t + 2, 0, last), other=0.0).to(tl.float32)
        yd = tl.load(dy_ptr + (t + 3) * dy_row, mask=_rows(live, t + 3, 0, last), other=0.0).to(tl.float32)
        da = _document(seq_ptr, t, S, SEQ)
        db = _document(seq_ptr, t + 1, S, SEQ)
        dc = _document(seq_ptr, t + 2, S, SEQ)
        dd = _document(seq_ptr, t + 3, S, SEQ)
        own = t < end  # of all four rows or none: `end` cuts a step only where dy was loaded as zero
        ga, sums = _row_grad(ya, (xa, x1, x2, x3), (da, d1, d2, d3), w, bias, sums, own, W, SEQ)
        gb, sums = _row_grad(yb, (xb, xa, x1, x2), (db, da, d1, d2), w, bias, sums, own, W, SEQ)
        gc, sums = _row_grad(yc, (xc, xb, xa, x1), (dc, db, da, d1), w, bias, sums, own, W, SEQ)
        gd, sums = _row_grad(yd, (xd, xc, xb, xa), (dd, dc, db, da), w, bias, sums, own, W, SEQ)
        dxa = _row_dx((ga, g1, g2, g3), (da, d1, d2, d3), w, W, SEQ)
        dxb = _row_dx((gb, ga, g1, g2), (db, da, d1, d2), w, W, SEQ)
        dxc = _row_dx((gc, gb, ga, g1), (dc, db, da, d1), w, W, SEQ)
        dxd = _row_dx((gd, gc, gb, ga), (dd, dc, db, da), w, W, SEQ)
        tl.store(dx_ptr + (t - 3) * dx_row, dxa, mask=_rows(live, t - 3, first, end))
        tl.store(dx_ptr + (t - 2) * dx_row, dxb, mask=_rows(live, t - 2, first, end))
        tl.store(dx_ptr + (t - 1) * dx_row, dxc, mask=_rows(live, t - 1, first, end))
        tl.store(dx_ptr + t * dx_row, dxd, mask=_rows(live, t, 0, end))
        if INITIAL:
            tl.store(dinitial_ptr + (W - 2) * C, dxc, mask=_rows(live, t, 0, 1))
            if W > 2:
                tl.store(dinitial_ptr + (W - 3) * C, dxb, mask=_rows(live, t, 0, 1))
            if W > 3:
                tl.store(dinitial_ptr + (W - 4) * C, dxa, mask=_rows(live, t, 0, 1))
        x1, x2, x3, d1, d2, d3, g1, g2, g3 = xd, xc, xb, dd, dc, db, gd, gc, gb
    partial_ptr += run.to(tl.int64) * (W + 1) * C + cols
    tl.store(partial_ptr + (W - 1) * C, sums[0], mask=live)
    tl.store(partial_ptr + (W - 2) * C, sums[1], mask=live)
    if W > 2:
        tl.store(partial_ptr + (W - 3) * C, sums[2], mask=live)
    if W > 3:
        tl.store(partial_ptr + (W - 4) * C, sums[3], mask=live)
    tl.store(partial_ptr + W * C, sums[4], mask=live)


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial: Tensor | None,
    dy: Tensor,
    dx: Tensor,
    trained: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Writes dx; returns dweight (C, W), dbias (C,) and dinitial, each in the dtype of its tensor.

    x, dy, dx: (B, S, C), rows anywhere, neighbouring channels; the others contiguous.  trained: whether weight or bias
    are, which otherwise get no gradient.
    """
    (_, S, C), W = x.shape, weight.shape[1]
    dinitial = None if initial is None else torch.empty_like(initial)
    blocks, runs, steps = _runs(x, BACKWARD)
    partial = torch.empty(runs, (W + 1) * C, dtype=torch.float32, device=x.device)
    _bwd_kernel[(blocks * runs,)](
        x, weight, bias, x if seq_idx is None else seq_idx, x if initial is None else initial,
        dy, dx, dx if dinitial is None else dinitial, partial,
        S, C, steps, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), dx.stride(0), dx.stride(1),
        W=W, BLOCK=BACKWARD.block, BIAS=bias is not None, SEQ=seq_idx is not None,
        INITIAL=initial is not None, STAGES=BACKWARD.stages, num_warps=BACKWARD.warps,
    )  # fmt: skip
    if not trained:
        return None, None, dinitial
    same = bias is None or bias.dtype == weight.dtype
    sums = sum_partials(partial, weight.dtype if same else torch.float32).view(W + 1, C)
    dbias = None if bias is None else sums[W].to(bias.dtype)
    return sums[:W].t().to(weight.dtype), dbias, dinitial


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, seq_idx, initial)
        return forward(x, weight, bias, seq_idx, initial)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, seq_idx, initial = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        trained = any(ctx.needs_input_grad[1:3])
        dweight, dbias, dinitial = backward(x, weight, bias, seq_idx, initial, channel_last(dy), dx, trained)
        return dx, dweight, dbias, None, dinitial


def channel_last(x: Tensor) -> Tensor:
    """x with neighbouring channels: itself (rows may lie apart) wherever its strides allow."""
    return x if x.stride(-1) == 1 else x.contiguous()


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None = None,
    initial: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x: (B, S, C); weight: (C, W), W from 2 to 4; bias: (C,) or None; returns (B, S, C) in x's dtype.

    seq_idx: (B, S) integers, the document of each token, non-decreasing along a row.  initial: (B, W-1, C), the columns
    before the first.  Sums and SiLU run in fp32.  Rows of x may lie apart (a slice of a wider tensor) without a copy.
    Differentiable in x, weight, bias and initial.  Raises ValueError on shapes that do not fit.
    """
    if x.ndim != 3 or weight.shape[0] != x.shape[2] or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"causal_conv1d: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit (B, S, C), (C, 2..4)"
        )
    B, S, C = x.shape
    expected = {"bias": (bias, (C,)), "seq_idx": (seq_idx, (B, S)), "initial": (initial, (B, weight.shape[1] - 1, C))}
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"causal_conv1d: {name} is {tuple(t.shape)}; x {tuple(x.shape)} needs {shape}")
    if not use_triton(x, backend) or x.numel() == 0:
        return causal_conv1d_reference(x, weight, bias, seq_idx, initial)
    return _CausalConv1d.apply(
        channel_last(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if seq_idx is None else seq_idx.contiguous(),
        None if initial is None else initial.to(x.dtype).contiguous(),
    )

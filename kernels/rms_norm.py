"""RMSNorm, alone, and as the place where the residual stream is summed, forwards and backwards.

    y[t] = x[t] * rstd[t] * weight,     rstd[t] = 1 / sqrt(mean(x[t]^2) + eps)          (arXiv:1910.07467, eq. 4)

The weight is applied in fp32, before the one rounding.  `join_rms_norm` first forms the new stream s = x + summands,
rounded once to x's dtype, and normalises that rounded s: with one summand the same numbers as an addition followed by
`rms_norm`.  It hands s on beside y, for the stream goes both ways, into the norm and past it, and it gives y to several
readers by as many names: the gradients of all of them, and that of s, meet in the backward kernel instead of in
additions of their own.

Memory: the backward keeps s (or x) and computes rstd again, one multiply-add per element that is read anyway.  Traffic
in elements: 2 T D forward and 3 T D backward; T D more for s and for each summand, reader and gradient that joins.  All
are limited by bandwidth.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._bandwidth import Launch, as_rows, jit, stages_of, sum_partials, tile_of, tl, walk
from kernels._common import accumulate_dtype, triton, use_triton

MAX_WIDTH = 8192  # a row is held in the registers of one program; twice as wide, the backward spills
FORWARD = Launch(tile=2048, warps=4)
BACKWARD = Launch(tile=2048, warps=8, programs_per_sm=2, stages=3)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    u = x.to(accumulate_dtype(x))
    return (u * (u.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(u.dtype)).to(x.dtype)


def join_rms_norm_reference(
    x: Tensor, summands: Sequence[Tensor], weight: Tensor, eps: float, readers: int = 1
) -> tuple[Tensor, ...]:
    total = x
    if summands:
        total = sum((t.to(accumulate_dtype(x)) for t in summands), start=x.to(accumulate_dtype(x))).to(x.dtype)
    return total, *[rms_norm_reference(total, weight, eps)] * readers


@jit(do_not_specialize=["T"])  # steps = 1 is compiled by itself, without the loop
def _fwd_kernel(
    x_ptr, a_ptr, b_ptr, weight_ptr, y_ptr, sum_ptr, T, steps, x_stride, a_stride, b_stride, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUMMANDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of ROWS rows, `steps` of them.

    x and the summands a and b (T, D) with row strides; y, sum (T, D) contiguous; weight (D,).
    """
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = first + step * (tl.num_programs(0) * ROWS)
        mask = (rows < T) & (cols < D)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if SUMMANDS > 0:
            x += tl.load(a_ptr + rows * a_stride + cols, mask=mask, other=0.0).to(tl.float32)
            if SUMMANDS > 1:
                x += tl.load(b_ptr + rows * b_stride + cols, mask=mask, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + rows * D + cols, rounded, mask=mask)
            x = rounded.to(tl.float32)  # what the next layer will read is what is normalised
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) * (1.0 / D) + eps)  # [ROWS, 1]
        tl.store(y_ptr + rows * D + cols, x * rstd * weight, mask=mask)


def _three(tensors: Sequence[Tensor]) -> tuple[list[Tensor | None], list[int]]:
    """Up to three tensors and their row strides, as a kernel takes them."""
    absent = [None] * (3 - len(tensors))
    return [*tensors, *absent], [*(t.stride(0) for t in tensors), *(0 for _ in absent)]


def _forward(x: Tensor, summands: Sequence[Tensor], weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """x and at most two summands: (T, D), last dimension contiguous.  Returns y and, with summands, the sum."""
    T, D = x.shape
    y = torch.empty(T, D, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if summands else None
    tensors, strides = _three([x, *summands])
    rows, block, warps = tile_of(D, FORWARD)
    programs, steps = walk(triton.cdiv(T, rows), FORWARD, x)
    stages = stages_of(FORWARD, (1 + len(summands)) * rows * block, x)
    _fwd_kernel[(programs,)](
        *tensors, weight, y, total, T, steps, *strides, eps,
        D=D, ROWS=rows, BLOCK=block, SUMMANDS=len(summands), STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y, total


# With n = x * rstd and m = mean(weight * dy * n):   dx = rstd * (weight * dy - n * m),   dweight = sum_t dy * n.
# Every summand receives dx plus the gradient that reaches the sum from later layers, added before the one rounding.
@jit(do_not_specialize=["T", "steps"])
def _bwd_kernel(
    x_ptr, weight_ptr, dy_ptr, dy2_ptr, dy3_ptr, dsum_ptr, dx_ptr, dweight_ptr, T, steps, x_stride, dy_stride,
    dy2_stride, dy3_stride, dsum_stride, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, READERS: tl.constexpr, ADD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of ROWS rows, `steps` of them.

    x, the readers' dy and dsum (T, D) with row strides; dx (T, D) contiguous; dweight (num_programs, D) fp32, a partial
    sum of each.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = first + step * (tl.num_programs(0) * ROWS)
        mask = (rows < T) & (cols < D)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if READERS > 1:
            dy += tl.load(dy2_ptr + rows * dy2_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if READERS > 2:
            dy += tl.load(dy3_ptr + rows * dy3_stride + cols, mask=mask, other=0.0).to(tl.float32)
        wdy = weight * dy
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) * (1.0 / D) + eps)  # [ROWS, 1]
        m = tl.sum(wdy * x, axis=1, keep_dims=True) * rstd * (1.0 / D)
        rstd = tl.where(rows < T, rstd, 0.0)  # rows past the end: eps = 0 would make 0 * inf
        n = x * rstd
        dweight += dy * n
        dx = (wdy - n * m) * rstd
        if ADD:
            dx += tl.load(dsum_ptr + rows * dsum_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * D + cols, dx, mask=mask)
    dweight = tl.sum(dweight, axis=0, keep_dims=True)  # [1, BLOCK]
    tl.store(dweight_ptr + tl.program_id(0) * D + cols, dweight, mask=cols < D)


def _backward(
    x: Tensor, weight: Tensor, dys: Sequence[Tensor], dsum: Tensor | None, eps: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """x, 1 to 3 dys, dsum: (T, D), last dimension contiguous.  Returns dx in x's dtype, and dweight in weight's if that
    is trained."""
    T, D = x.shape
    dx = torch.empty(T, D, dtype=x.dtype, device=x.device)
    dsum_stride = 0 if dsum is None else dsum.stride(0)
    tensors, strides = _three(dys)
    rows, block, warps = tile_of(D, BACKWARD)
    programs, steps = walk(triton.cdiv(T, rows), BACKWARD, x)
    stages = stages_of(BACKWARD, (2 + len(dys)) * rows * block, x)
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    _bwd_kernel[(programs,)](
        x, weight, *tensors, dsum, dx, partial, T, steps, x.stride(0), *strides, dsum_stride, eps,
        D=D, ROWS=rows, BLOCK=block, READERS=len(dys), ADD=dsum is not None, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return dx, sum_partials(partial, weight.dtype) if trained else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = as_rows(x)
        ctx.save_for_backward(rows, weight)
        ctx.eps = eps
        return _forward(rows, (), weight, eps)[0].view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = _backward(x, weight, [as_rows(dy)], None, ctx.eps, ctx.needs_input_grad[1])
        return dx.view(dy.shape), dweight, None


class _JoinRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, eps: float, readers: int, x: Tensor, *summands: Tensor) -> tuple[Tensor, ...]:
        rows = as_rows(x)
        y, total = _forward(rows, [as_rows(t) for t in summands], weight, eps)
        ctx.save_for_backward(rows if total is None else total, weight)
        ctx.eps, ctx.dtypes = eps, [t.dtype for t in (x, *summands)]
        ctx.set_materialize_grads(False)  # any output may go unused
        y = y.view(x.shape)
        return x.view_as(x) if total is None else total.view(x.shape), y, *(y.view_as(y) for _ in range(readers - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal: Tensor | None, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        given, dweight = [as_rows(dy) for dy in dys if dy is not None], None
        if given:
            shape = next(dy.shape for dy in dys if dy is not None)
            dsum = None if dtotal is None else as_rows(dtotal)
            dx, dweight = _backward(total, weight, given, dsum, ctx.eps, ctx.needs_input_grad[0])
            dtotal = dx.view(shape)
        return dweight, None, None, *(None if dtotal is None else dtotal.to(dtype) for dtype in ctx.dtypes)


def _runs(x: Tensor, weight: Tensor, backend: str) -> bool:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; give (D,)")
    return use_triton(x, backend) and x.shape[-1] <= MAX_WIDTH and x.numel() > 0


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """x: (..., D), weight: (D,); returns (..., D) in x's dtype.  Sums run in fp32 (float64 for float64 input).

    Any strides: rows may lie apart (a slice of a wider tensor) without a copy.  Differentiable in x and weight.
    Raises ValueError if the weight does not fit.  Rows wider than MAX_WIDTH run in PyTorch.
    """
    if not _runs(x, weight, backend):
        return rms_norm_reference(x, weight, eps)
    return _RMSNorm.apply(x, weight.contiguous(), eps)


def join_rms_norm(
    x: Tensor, summands: Sequence[Tensor], weight: Tensor, eps: float, readers: int = 1, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Returns the stream s = x + summands, rounded once to x's dtype, and rms_norm(s) `readers` times.

    x: (..., D), the stream; summands: none, one or two of x's shape, what layers add to it; weight: (D,); readers: 1 to
    3.  All as for `rms_norm`; differentiable through every output, in one kernel.  Raises ValueError on what does not
    fit.
    """
    if len(summands) > 2 or not 0 < readers < 4:
        raise ValueError(f"join_rms_norm: {len(summands)} summands and {readers} readers; up to 2, and 1 to 3")
    for t in summands:
        if t.shape != x.shape:
            raise ValueError(f"join_rms_norm: x {tuple(x.shape)} and a summand {tuple(t.shape)} differ")
    if not _runs(x, weight, backend):
        return join_rms_norm_reference(x, summands, weight, eps, readers)
    return _JoinRMSNorm.apply(weight.contiguous(), eps, readers, x, *summands)

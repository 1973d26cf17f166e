"""RMSNorm, alone, with the residual add in front of it fused in, and with that of its gradient.

    y[t] = x[t] * rstd[t] * weight,     rstd[t] = 1 / sqrt(mean(x[t]^2) + eps)          (arXiv:1910.07467, eq. 4)

The weight is applied in fp32, before the one rounding.  `add_rms_norm` first forms the new residual stream
s = x + residual, rounded to x's dtype, and normalises that rounded s: the same numbers as an addition followed by
`rms_norm`.  `fork_rms_norm` hands x on beside y, for the residual stream goes both ways: into the norm, and past it.
The two gradients meet in the backward kernel instead of in an addition of their own, with the same numbers.

Memory: the backward keeps x (or s) and computes rstd again, one multiply-add per element that is read anyway.  Traffic
in elements: 2 T D forward and 3 T D backward; with the add 4 T D each way.  All are limited by bandwidth.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

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


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    new_residual = (x + residual).to(x.dtype)
    return rms_norm_reference(new_residual, weight, eps), new_residual


@jit(do_not_specialize=["T"])  # steps = 1 is compiled by itself, without the loop
def _fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, T, steps, x_stride, residual_stride, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of ROWS rows, `steps` of them.

    x, residual (T, D) with row strides; y, sum (T, D) contiguous; weight (D,).
    """
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = first + step * (tl.num_programs(0) * ROWS)
        mask = (rows < T) & (cols < D)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if ADD:
            x += tl.load(residual_ptr + rows * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + rows * D + cols, rounded, mask=mask)
            x = rounded.to(tl.float32)  # what the next layer will read is what is normalised
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) * (1.0 / D) + eps)  # [ROWS, 1]
        tl.store(y_ptr + rows * D + cols, x * rstd * weight, mask=mask)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """x, residual: (T, D), last dimension contiguous.  Returns y and, with a residual, the sum."""
    T, D = x.shape
    y = torch.empty(T, D, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    residual_stride = 0 if residual is None else residual.stride(0)
    rows, block, warps = tile_of(D, FORWARD)
    programs, steps = walk(triton.cdiv(T, rows), FORWARD, x)
    stages = stages_of(FORWARD, 2 * rows * block, x)
    _fwd_kernel[(programs,)](
        x, residual, weight, y, total, T, steps, x.stride(0), residual_stride, eps,
        D=D, ROWS=rows, BLOCK=block, ADD=residual is not None, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y, total


# With n = x * rstd and m = mean(weight * dy * n):   dx = rstd * (weight * dy - n * m),   dweight = sum_t dy * n.
# With the residual add, both addends receive dx plus the gradient that reaches the sum from later layers.
@jit(do_not_specialize=["T", "steps"])
def _bwd_kernel(
    x_ptr, weight_ptr, dy_ptr, dsum_ptr, dx_ptr, dweight_ptr, T, steps, x_stride, dy_stride, dsum_stride, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of ROWS rows, `steps` of them.

    x, dy, dsum (T, D) with row strides; dx (T, D) contiguous; dweight (num_programs, D) fp32, a partial sum of each.
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
        wdy = weight * dy
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) * (1.0 / D) + eps)  # [ROWS, 1]
        m = tl.sum(wdy * x, axis=1, keep_dims=True) * rstd * (1.0 / D)
        rstd = tl.where(rows < T, rstd, 0.0)  # rows past the end: eps = 0 would make 0 * inf
        n = x * rstd
        dweight += dy * n
        dx = (wdy - n * m) * rstd
        if ADD:
            dx = dx.to(dx_ptr.dtype.element_ty).to(tl.float32)  # as an addition of two tensors would find it
            dx += tl.load(dsum_ptr + rows * dsum_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * D + cols, dx, mask=mask)
    dweight = tl.sum(dweight, axis=0, keep_dims=True)  # [1, BLOCK]
    tl.store(dweight_ptr + tl.program_id(0) * D + cols, dweight, mask=cols < D)


def _backward(x: Tensor, weight: Tensor, dy: Tensor, dsum: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x, dy, dsum: (T, D), last dimension contiguous.  Returns dx in x's dtype and dweight in weight's."""
    T, D = x.shape
    dx = torch.empty(T, D, dtype=x.dtype, device=x.device)
    dsum_stride = 0 if dsum is None else dsum.stride(0)
    rows, block, warps = tile_of(D, BACKWARD)
    programs, steps = walk(triton.cdiv(T, rows), BACKWARD, x)
    stages = stages_of(BACKWARD, 3 * rows * block, x)
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    _bwd_kernel[(programs,)](
        x, weight, dy, dsum, dx, partial, T, steps, x.stride(0), dy.stride(0), dsum_stride, eps,
        D=D, ROWS=rows, BLOCK=block, ADD=dsum is not None, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return dx, sum_partials(partial, weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = as_rows(x)
        ctx.save_for_backward(rows, weight)
        ctx.eps = eps
        return _forward(rows, None, weight, eps)[0].view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = _backward(x, weight, as_rows(dy), None, ctx.eps)
        return dx.view(dy.shape), dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total = _forward(as_rows(x), as_rows(residual), weight, eps)
        total = total.view(x.shape)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.residual_dtype = eps, residual.dtype
        ctx.set_materialize_grads(False)  # either output may go unused
        return y.view(x.shape), total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        if dy is None:
            dx, dweight = dtotal, None
        else:
            dx, dweight = _backward(
                as_rows(total), weight, as_rows(dy), None if dtotal is None else as_rows(dtotal), ctx.eps
            )
            dx = dx.view(total.shape)
        return dx, None if dx is None else dx.to(ctx.residual_dtype), dweight, None


class _ForkRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows = as_rows(x)
        ctx.save_for_backward(rows, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)  # either output may go unused
        return _forward(rows, None, weight, eps)[0].view(x.shape), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if dy is None:
            return dx, None, None
        found, dweight = _backward(x, weight, as_rows(dy), None if dx is None else as_rows(dx), ctx.eps)
        return found.view(dy.shape), dweight, None


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
    return _RMSNorm.apply(x, weight, eps)


def fork_rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Returns y = rms_norm(x) and x, so that both gradients of x are added in one kernel.

    All as for `rms_norm`; differentiable through both outputs.
    """
    if not _runs(x, weight, backend):
        return rms_norm_reference(x, weight, eps), x
    return _ForkRMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Returns y = rms_norm(new_residual) and new_residual = x + residual, both (..., D) in x's dtype.

    x, residual: (..., D), the output of a layer and the stream it is added to; weight: (D,).  Differentiable in all
    three, through both outputs, in one kernel.  Raises ValueError on shapes that do not fit.
    """
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} differ")
    if not _runs(x, weight, backend):
        return add_rms_norm_reference(x, residual, weight, eps)
    return _AddRMSNorm.apply(x, residual, weight, eps)

"""Squared ReLU, y = max(x, 0)^2 (arXiv:2109.08668), of the shared expert and of dense MLPs.

The backward needs max(x, 0), which is sqrt(y): so only y is kept, which the projection after it keeps anyway, and x is
not.  A root halves the relative error of a rounded y.  Traffic in elements: 2 n forward, 3 n backward, where PyTorch's
two operators move 4 n and 6 n and keep 2 n.

    dx = 2 sqrt(y) dy
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where there is no triton

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._bandwidth import jit, tl
from kernels._common import triton, use_triton

BLOCK, WARPS = 4096, 4


def relu2_reference(x: Tensor) -> Tensor:
    return x.relu().square()


@jit
def _fwd_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """One program: BLOCK elements.  x, y (n,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    x = tl.where(x < 0, 0.0, x)  # not maximum, which makes 0 of NaN
    tl.store(y_ptr + at, x * x, mask=at < n)


@jit
def _bwd_kernel(y_ptr, dy_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, 2.0 * tl.sqrt_rn(y) * dy, mask=at < n)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _fwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        dx = torch.empty_like(y)
        _bwd_kernel[(triton.cdiv(y.numel(), BLOCK),)](y, dy.contiguous(), dx, y.numel(), BLOCK=BLOCK, num_warps=WARPS)
        return dx


def relu2(x: Tensor, backend: str = "auto") -> Tensor:
    """x: any shape, fp32 or 16 bit for the kernel -> the same shape and dtype.  Differentiable once.

    An x whose square is less than the smallest number of its dtype has gradient 0 from the kernel.  Raises ValueError
    as `use_triton` does.
    """
    if not use_triton(x, backend) or x.numel() == 0:
        return relu2_reference(x)
    return _Relu2.apply(x.contiguous())

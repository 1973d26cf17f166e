"""A frozen linear layer with LoRA: y = x W^T + s (x A^T) B^T, without a pass over y or dx that a product can make.

    forward    t = x A^T,  y = x W^T,  y += s t B^T
    backward   u = dy B,   dx = dy W,  dx += s u A,   dA = s u^T x,   dB = s dy^T t

Left to autograd, the two gradients of x are two tensors and a third that adds them; here the second product adds to
the first's result.  Nothing but x and t is kept, and the gradient of W is not computed: it is frozen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._common import result_is_known
from kernels.fp8 import expanded


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (T, in)
        weight: Tensor,  # (out, in)
        scales: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        ends_block: bool,
    ) -> Tensor:
        thin = F.linear(x, A)  # (T, r)
        # Where x has no gradient W is not needed, and in FP8 would be kept for nothing.
        ctx.save_for_backward(x, thin, A, B, *((weight, scales) if ctx.needs_input_grad[0] else (None, None)))
        ctx.scale = scale
        if ends_block and result_is_known():
            return x.new_empty(x.shape[0], weight.shape[0])
        return F.linear(x, expanded(weight, scales, x.dtype)).addmm_(thin, B.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, thin, A, B, weight, scales = ctx.saved_tensors
        need_x, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        back = dy @ B  # (T, r)
        dx = dA = dB = None
        if need_x:
            dx = (dy @ expanded(weight, scales, x.dtype)).addmm_(back, A, alpha=ctx.scale)
        if need_A:
            dA = back.T @ x
        if need_B:
            dB = dy.T @ thin
        if ctx.scale != 1:
            for gradient in (dA, dB):
                if gradient is not None:
                    gradient.mul_(ctx.scale)
        return dx, None, None, dA, dB, None, None


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    scales: Tensor | None = None,
    ends_block: bool = False,
) -> Tensor:
    """x: (..., in); weight: (out, in); A: (r, in); B: (out, r), one dtype -> (..., out).

    Differentiable once, in x, A and B; weight must not require a gradient.  scales: of the weight, if it is codes of
    `fp8.quantise`.  ends_block: the result only joins the stream, so under `computing_again` it is left undefined.
    Raises ValueError on a weight that is trained.  Source: LoRA, arXiv:2106.09685, eq. 3.
    """
    if weight.requires_grad:
        raise ValueError("adapted_linear has no gradient for the weight; freeze it")
    rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    y = _AdaptedLinear.apply(rows, weight, scales, A, B, scale, ends_block)
    return y.unflatten(0, x.shape[:-1]) if x.ndim > 1 else y.squeeze(0)

"""Where a weight's gradient goes when autograd is not to have it: into a buffer that sums it over micro-batches.

A product that adds its result there itself saves what autograd's way costs: storing the gradient, then reading it, the
sum so far, and storing the new sum.  For the experts, whose weights are most of the model, that is more than half of
what their backward pass moves.  And the result is not rounded to the weight's dtype on its way into a wider sum.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._common import result_is_known


class GradientSink(Protocol):
    def open(self) -> tuple[Tensor, bool]:
        """The buffer, contiguous, of the weight's shape, fp32 or the weight's dtype, and whether it holds a sum yet.

        If not, what is in it means nothing, and the gradient overwrites it.  From now on it counts as a sum.
        """

    def close(self) -> None:
        """The gradient is in the buffer, or will be when the GPU comes to it.  Called in the backward pass."""


class Buffer:
    """A tensor that gradients are added to."""

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    def open(self) -> tuple[Tensor, bool]:
        return self.sums, True

    def close(self) -> None:
        pass


def sink_of(weight: Tensor) -> GradientSink | None:
    """The sink that a training loop gave a weight (`nano3/train/gradients.py`)."""
    return getattr(weight, "sink", None)


def add_product_(sums: Tensor, a: Tensor, b: Tensor, holds: bool) -> None:
    """sums += a^T b, or sums = a^T b if they hold nothing.  sums: (M, N), contiguous; a: (R, M); b: (R, N).

    The product is formed in the dtype of sums, which is that of a and b, or wider, and rounded once.
    """
    if sums.dtype == a.dtype:
        torch.addmm(sums, a.T, b, out=sums) if holds else torch.mm(a.T, b, out=sums)
    elif sums.is_cuda and sums.dtype == torch.float32:  # narrow operands, fp32 result: cuBLAS adds in its epilogue
        kind = {"out_dtype": torch.float32, "out": sums}
        torch.addmm(sums, a.T, b, **kind) if holds else torch.mm(a.T, b, **kind)
    else:
        add_product_(sums, a.to(sums.dtype), b.to(sums.dtype), holds)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sink: GradientSink, ends_block: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        if ends_block and result_is_known():
            return x.new_empty(*x.shape[:-1], weight.shape[0])
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        sums, holds = ctx.sink.open()
        add_product_(sums, *(t.flatten(0, -2) if t.ndim > 1 else t.unsqueeze(0) for t in (dy, x)), holds)
        ctx.sink.close()
        return dx, None, None, None


def linear(x: Tensor, weight: Tensor, sink: GradientSink | None = None, ends_block: bool = False) -> Tensor:
    """y = x W^T: x (..., in), weight (out, in) -> (..., out).

    With a sink the gradient of the weight goes there, and autograd gets none.  ends_block: the result only joins the
    stream, so under `computing_again` it is left undefined.
    """
    if sink is None or not weight.requires_grad or not torch.is_grad_enabled():
        return F.linear(x, weight)
    return _Linear.apply(x, weight, sink, ends_block)


class _Divert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, sink: GradientSink) -> Tensor:
        ctx.sink = sink
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        sums, holds = ctx.sink.open()
        sums.add_(grad) if holds else sums.copy_(grad)
        ctx.sink.close()
        return None, None


def divert(weight: Tensor, sink: GradientSink | None) -> Tensor:
    """The weight itself, whose gradient goes into the sink: for products that cannot add to a buffer."""
    return weight if sink is None else _Divert.apply(weight, sink)

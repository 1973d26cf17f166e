"""Where a weight's gradient goes when autograd is not to have it: into a buffer that sums it over micro-batches.

A product that adds its result there itself saves what autograd's way costs: storing the gradient, then reading it, the
sum so far, and storing the new sum.  For the experts, whose weights are most of the model, that is more than half of
what their backward pass moves.
"""

from typing import Protocol

import torch
from torch import Tensor


class GradientSink(Protocol):
    def open(self) -> tuple[Tensor, bool]:
        """The buffer, contiguous, of the weight's shape, fp32 or the weight's dtype, and whether it holds a sum yet.

        If not, what is in it means nothing, and the gradient overwrites it.  Called in the backward pass.
        """

    def close(self) -> None:
        """The gradient is in the buffer, or will be when the GPU comes to it."""


class Buffer:
    """A tensor that gradients are added to."""

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    def open(self) -> tuple[Tensor, bool]:
        return self.sums, True

    def close(self) -> None:
        pass


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

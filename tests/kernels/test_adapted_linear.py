"""A frozen linear layer with LoRA: values and gradients of W + s B A, and what is left out the second time."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import fp8
from kernels._common import computing_again
from kernels.adapted_linear import adapted_linear
from tests.oracles import relative

T, IN, OUT, R = 7, 12, 10, 3


def make(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.seen.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "fp8"])
def test_it_is_the_explicit_sum(scale: float, coded: bool) -> None:
    x, A, B = (t.requires_grad_() for t in (make(2, T, IN), make(R, IN), make(OUT, R)))
    weight, scales, dy = make(OUT, IN), None, make(2, T, OUT)
    plain = weight
    if coded:
        weight, scales = fp8.quantise(weight)
        plain = fp8.dequantise_reference(weight, scales, torch.float64)
    got = adapted_linear(x, weight, A, B, scale, scales=scales)
    expected = x @ (plain + scale * B @ A).T
    assert relative(got, expected) < 1e-13
    leaves = (x, A, B)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        assert relative(a, b) < 1e-13


@pytest.mark.parametrize("ends_block", [False, True])
def test_the_end_of_a_block_is_not_computed_again(ends_block: bool) -> None:
    """The thin product is, since backward needs it; the gradients are the same to the bit."""
    x, A, B = (t.requires_grad_() for t in (make(T, IN), make(R, IN), make(OUT, R)))
    weight, dy = make(OUT, IN), make(T, OUT)
    y = adapted_linear(x, weight, A, B, 0.7, ends_block=ends_block)
    with computing_again(), Products() as products:
        again = adapted_linear(x, weight, A, B, 0.7, ends_block=ends_block)
    assert products.seen == ([(T, R)] if ends_block else [(T, R), (T, OUT), (T, OUT)])
    assert again.shape == y.shape
    for a, b in zip(*(torch.autograd.grad(t, (x, A, B), dy) for t in (y, again)), strict=True):
        assert torch.equal(a, b)


def test_backward_is_five_products_and_no_sum_apart() -> None:
    x, A, B = (t.requires_grad_() for t in (make(T, IN), make(R, IN), make(OUT, R)))
    y = adapted_linear(x, make(OUT, IN), A, B, 1.0)
    with Products() as products:
        y.backward(make(T, OUT))
    assert sorted(products.seen) == sorted([(T, R), (T, IN), (T, IN), (R, IN), (OUT, R)])


def test_a_trained_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze it"):
        adapted_linear(make(T, IN), make(OUT, IN).requires_grad_(), make(R, IN), make(OUT, R), 1.0)

"""Squared ReLU against float64, forward and gradient."""

import pytest
import torch

from kernels.relu2 import BLOCK, relu2, relu2_reference
from tests.kernels.conftest import assert_as_accurate, relative_error

SHAPES = [(1,), (7, 5), (2, 3, 33), (BLOCK + 1,), (0, 4)]


def run(f, x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    leaf = x.detach().to(dtype).requires_grad_()
    y = f(leaf)
    return {"y": y, "dx": torch.autograd.grad(y, leaf, dy.to(dtype))[0]}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape: tuple[int, ...], device: str, poisoned_empty: None) -> None:
    x, dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    ours, truth = run(relu2, x, dy, torch.float32), run(relu2_reference, x, dy, torch.float64)
    for name, true in truth.items():
        assert ours[name].shape == shape
        assert relative_error(ours[name], true) < 1e-6, name  # three roundings of 6e-8


def test_what_is_not_positive_gives_zero_and_takes_none(device: str, poisoned_empty: None) -> None:
    x = torch.tensor([-3.0, -0.0, 0.0, 2.0], device=device)
    found = run(relu2, x, torch.full((4,), 5.0, device=device), torch.float32)
    assert found["y"].tolist() == [0, 0, 0, 4]
    assert found["dx"].tolist() == [0, 0, 0, 20]


def test_a_view_and_a_gradient_that_are_not_contiguous(device: str, poisoned_empty: None) -> None:
    x, dy = torch.randn(6, 10, device=device)[:, 2:7], torch.randn(5, 6, device=device).T
    ours, truth = run(relu2, x, dy, torch.float32), run(relu2_reference, x, dy, torch.float64)
    assert all(relative_error(ours[n], t) < 1e-6 for n, t in truth.items())


def test_only_the_result_is_kept(device: str) -> None:
    kept: list[int] = []
    x = torch.randn(64, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        y = relu2(x, "triton")
    assert kept == [y.data_ptr()]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1,), (63, 3712), (8192, 3712)], ids=str)
def test_on_the_gpu(shape: tuple[int, ...], poisoned_empty: None) -> None:
    x, dy = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    ours, again = run(relu2, x, dy, x.dtype), run(relu2, x, dy, x.dtype)
    eager, truth = run(relu2_reference, x, dy, x.dtype), run(relu2_reference, x, dy, torch.float64)
    for name, true in truth.items():
        assert_as_accurate(ours[name], eager[name], true, what=name)
        assert torch.equal(ours[name], again[name])

"""The sums of the balance loss against float64."""

import pytest
import torch

from kernels.balance import BLOCK_T, balance_sums, balance_sums_reference
from tests.kernels.conftest import relative_error

SHAPES = [(1, 1, 8, 1), (2, BLOCK_T + 5, 8, 3), (1, 70, 24, 6), (3, 33, 5, 5)]
NANO = [(1, 8192, 128, 6), (2, 4097, 512, 22)]


def compare(B: int, S: int, E: int, K: int, padded: bool, device: str) -> None:
    # Within a token no two are equal: which of them is chosen would be anyone's choice.
    scores = (torch.rand(B, S, E, device=device).argsort(-1) + 0.5 * torch.rand(B, S, E, device=device) + 0.1) / E
    real = torch.rand(B, S, device=device) < 0.7 if padded else None
    g = torch.randn(B, E, device=device)
    ours, truth = scores.clone().requires_grad_(), scores.double().requires_grad_()
    counts, sums = balance_sums(ours, K, real, "triton")
    true_counts, true_sums = balance_sums_reference(truth, K, real)
    assert not counts.requires_grad
    assert torch.equal(counts.double(), true_counts)
    # Sums of up to thousands of fp32 terms in blocks: about 1e-7; a token's gradient has one subtraction.
    assert relative_error(sums, true_sums) < 1e-6
    sums.backward(g)
    true_sums.backward(g.double())
    assert relative_error(ours.grad, truth.grad) < 1e-6
    assert real is None or not ours.grad[~real].any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("B", "S", "E", "K"), SHAPES)
def test_fp32(B: int, S: int, E: int, K: int, padded: bool, device: str, poisoned_empty: None) -> None:
    compare(B, S, E, K, padded, device)


def test_equal_scores_go_to_the_lower_expert(device: str, poisoned_empty: None) -> None:
    counts, sums = balance_sums(torch.full((1, 3, 6), 0.5, device=device), 2, None, "triton")
    assert counts.tolist() == [[3, 3, 0, 0, 0, 0]]
    assert torch.allclose(sums, torch.full((1, 6), 0.5, device=device))


def test_scores_that_underflow_divide_by_something(device: str, poisoned_empty: None) -> None:
    scores = torch.zeros(1, 4, 8, device=device, requires_grad=True)
    _, sums = balance_sums(scores, 2, None, "triton")
    sums.sum().backward()
    assert torch.isfinite(sums).all()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("B", "S", "E", "K"), [*SHAPES, *NANO])
def test_on_the_gpu(B: int, S: int, E: int, K: int, padded: bool, poisoned_empty: None) -> None:
    compare(B, S, E, K, padded, "cuda")

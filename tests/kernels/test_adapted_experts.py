"""Experts with LoRA: forward and every gradient against the dense float64 formula, in PyTorch and in the kernels."""

import importlib
from collections.abc import Callable
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels import grouped_gemm
from kernels._common import computing_again
from kernels.adapted_experts import adapted_experts, adapted_experts_reference
from kernels.grouped_gemm import experts
from tests.kernels.conftest import CAN_RUN_TRITON, assert_as_accurate, needs_triton, relative_error
from tests.kernels.test_grouped_gemm import FP32, choices

if CAN_RUN_TRITON:
    from kernels import grouped_gemm_configs

adapted_experts_module = importlib.import_module("kernels.adapted_experts")
NAMES = ("y", "dx", "dweights", "dA", "dB", "dA'", "dB'")


@pytest.fixture(params=["gather", "copy"], autouse=True)
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if CAN_RUN_TRITON:
        for name in ("INTERPRETED", "HOPPER"):
            chosen = getattr(grouped_gemm_configs, f"{name}_{request.param.upper()}")
            monkeypatch.setattr(grouped_gemm_configs, name, chosen)


def make(T: int, D: int, F: int, E: int, K: int, r: int, shared: bool, device: str) -> list[Tensor]:
    """x, weights, up, down, the two adapters and the gradient of y."""
    lead = () if shared else (E,)
    shapes = [(T, D), (T, K), (E, F, D), (E, D, F), (*lead, r, D), (*lead, F, r), (*lead, r, F), (*lead, D, r), (T, D)]
    scales = [1, 1, D**-0.5, F**-0.5, D**-0.5, r**-0.5, F**-0.5, r**-0.5, 1]
    return [(torch.randn(s) * f).to(device) for s, f in zip(shapes, scales, strict=True)]


def run(f, dtype: torch.dtype, inputs: list[Tensor]) -> list[Tensor]:
    """y and the gradients; routing weights stay fp32 where the rest is narrower."""
    wide = torch.promote_types(dtype, torch.float32)
    x, weights, up, down, *adapters, dy = (t.to(wide if i == 1 else dtype) for i, t in enumerate(inputs))
    leaves = [t.detach().requires_grad_() for t in (x, weights, *adapters)]
    y = f(leaves[0], leaves[1], up, down, leaves[2:4], leaves[4:])
    return [y, *torch.autograd.grad(y, leaves, dy)]


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("T", "D", "F", "E", "K", "r", "kind", "shared"),
    [(19, 40, 56, 3, 2, 40, "all", False), (17, 24, 29, 6, 2, 5, "few", False), (17, 40, 24, 4, 2, 5, "few", True)],
)
def test_the_kernels_are_the_formula(
    T: int, D: int, F: int, E: int, K: int, r: int, kind: str, shared: bool, device: str
) -> None:
    inputs, ids = make(T, D, F, E, K, r, shared, device), choices(T, K, E, kind).to(device)

    def truth(x, weights, up, down, first, second) -> Tensor:
        return adapted_experts_reference(x, weights, ids, up, down, first, second, 0.7)

    def ours(x, weights, up, down, first, second) -> Tensor:
        return adapted_experts(x, weights, ids, None, up, down, first, second, 0.7, "triton")

    exact = run(truth, torch.float64, inputs)
    for name, got, expected in zip(NAMES, run(ours, torch.float32, inputs), exact, strict=True):
        assert relative_error(got, expected) < FP32, name


@needs_triton
@pytest.mark.parametrize("which", [0, 1])
def test_an_adapter_on_one_of_the_two_and_b_of_zero_is_the_base_to_the_bit(which: int, device: str) -> None:
    x, weights, up, down, *adapters, _ = make(9, 24, 16, 4, 2, 3, False, device)
    ids, pairs = choices(9, 2, 4, "all").to(device), [None, None]
    pairs[which] = adapters[2 * which : 2 * which + 2]

    def ours() -> Tensor:
        return adapted_experts(x, weights, ids, None, up, down, *pairs, 2.0, "triton")

    truth = adapted_experts_reference(*(t.double() for t in (x, weights)), ids, up.double(), down.double(), *(
        None if p is None else [t.double() for t in p] for p in pairs), 2.0)  # fmt: skip
    assert relative_error(ours(), truth) < FP32
    pairs[which][1].zero_()
    assert torch.equal(ours(), experts(x, weights, ids, None, up, down, "triton"))


@needs_triton
@pytest.mark.parametrize("shared", [False, True], ids=["per-expert", "shared"])
def test_choices_that_are_computed_elsewhere(shared: bool, device: str) -> None:
    E, inputs = 4, make(11, 24, 16, 4, 2, 3, shared, device)
    ids = choices(11, 2, E, "all").where(torch.rand(11, 2) < 0.6, E).to(device)
    rows = int((ids < E).sum())

    def truth(x, weights, up, down, first, second) -> Tensor:
        weights = weights.where(ids < E, 0)
        return adapted_experts_reference(x, weights, ids.clamp(max=E - 1), up, down, first, second, 0.7)

    def ours(x, weights, up, down, first, second) -> Tensor:
        return adapted_experts(x, weights, ids, None, up, down, first, second, 0.7, "triton", rows=rows)

    exact = run(truth, torch.float64, inputs)
    for name, got, expected in zip(NAMES, run(ours, torch.float32, inputs), exact, strict=True):
        assert relative_error(got, expected) < FP32, name


@needs_triton
@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "bare"])
def test_what_is_computed_again_leaves_out_the_result_alone(adapted: bool, device: str) -> None:
    x, weights, up, down, *adapters, dy = make(9, 24, 16, 4, 2, 3, False, device)
    ids, leaves = choices(9, 2, 4, "all").to(device), [t.requires_grad_() for t in (x, weights, *adapters)]
    leaves, pairs = (leaves, (adapters[:2], adapters[2:])) if adapted else (leaves[:2], (None, None))

    def ours() -> Tensor:
        return adapted_experts(x, weights, ids, None, up, down, *pairs, 0.7, "triton")

    y = ours()
    with computing_again(), mock.patch.object(module_of(adapted), "sum_rows", side_effect=AssertionError):
        again = ours()
    assert (again.shape, again.dtype) == (y.shape, y.dtype)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(again, leaves, dy), strict=True):
        assert torch.equal(a, b)


def module_of(adapted: bool) -> ModuleType:
    return adapted_experts_module if adapted else grouped_gemm


@needs_triton
def test_auto_takes_the_kernels_for_what_is_frozen(device: str) -> None:
    x, weights, up, down, *adapters, _ = make(6, 16, 16, 2, 1, 3, False, device)
    ids = choices(6, 1, 2, "all").to(device)
    counts = torch.bincount(ids.flatten(), minlength=2)

    def ours(up: Tensor, backend: str) -> Tensor:
        return adapted_experts(x, weights, ids, counts, up, down, adapters[:2], adapters[2:], 1.0, backend)

    with mock.patch.object(adapted_experts_module, "_AdaptedExperts") as kernels:
        ours(up, "torch")
        assert ours(up.clone().requires_grad_(), "auto").requires_grad
        kernels.apply.assert_not_called()
        ours(up, "auto")
        kernels.apply.assert_called_once()


@needs_triton
def test_the_kernels_refuse_experts_that_are_trained(device: str) -> None:
    x, weights, up, down, *adapters, _ = make(6, 16, 16, 2, 1, 3, False, device)
    ids = choices(6, 1, 2, "all").to(device)
    with pytest.raises(ValueError, match="frozen experts only"):
        adapted_experts(x, weights, ids, None, up.requires_grad_(), down, adapters[:2], adapters[2:], 1.0, "triton")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("T", "D", "F", "E", "K", "r", "kind", "shared"),
    [
        (1, 256, 192, 8, 6, 32, "all", False),
        (300, 256, 192, 5, 1, 16, "one", False),
        (1500, 512, 320, 16, 6, 64, "few", False),
        (1500, 512, 320, 16, 6, 32, "all", True),
        (2048, 2688, 1856, 16, 6, 32, "all", False),
    ],
)
def test_in_bf16_on_the_gpu(T: int, D: int, F: int, E: int, K: int, r: int, kind: str, shared: bool) -> None:
    """As near the truth as PyTorch's way is, twice the same, and the base to the bit while B is zero."""
    inputs, ids = make(T, D, F, E, K, r, shared, "cuda"), choices(T, K, E, kind).cuda()
    inputs = [t if i == 1 else t.bfloat16() for i, t in enumerate(inputs)]
    counts = torch.bincount(ids.flatten(), minlength=E)

    def way(backend: str) -> Callable[..., Tensor]:
        return lambda x, weights, up, down, *pairs: adapted_experts(
            x, weights, ids, counts, up, down, *pairs, 0.7, backend
        )

    got, again, eager = (run(way(backend), torch.bfloat16, inputs) for backend in ("auto", "auto", "torch"))
    exact = run(way("torch"), torch.float64, inputs)
    for name, ours, same, theirs, truth in zip(NAMES, got, again, eager, exact, strict=True):
        assert torch.equal(ours, same), f"{name}: two runs differ"
        assert_as_accurate(ours, theirs, truth, what=name)
    inputs[5].zero_()
    inputs[7].zero_()
    base = experts(inputs[0], inputs[1], ids, counts, *inputs[2:4])
    assert torch.equal(run(way("auto"), torch.bfloat16, inputs)[0], base)

"""FP8 weights: the rounding on every code, expansion to the bit, the error, and what autograd keeps."""

import pytest
import torch
from torch import Tensor

from kernels.fp8 import BLOCK, CODE, dequantise, dequantise_reference, linear, quantise, scale_shape
from tests.kernels.conftest import relative_error

BYTES = torch.arange(256, dtype=torch.uint8)
FINITE = BYTES[(BYTES & 0x7F) != 0x7F].view(CODE)  # 0x7f and 0xff are NaN
SHAPES = [(5, 128), (3, 40), (67, 300), (3, 2, 129), (1, 1)]


def coded(values: Tensor) -> Tensor:
    """The codes of fp32 values of at most 448 in a block that also holds 448, so that its scale is 1."""
    rows = torch.cat([values.unsqueeze(-1), torch.full((len(values), 1), 448.0)], -1)
    codes, scales = quantise(rows)
    assert (scales == 1).all()
    return codes[:, 0].view(torch.uint8)


def test_every_code_is_its_own_and_ties_go_to_the_even_one() -> None:
    """Codes of one sign are in the order of their numbers: 0x00 is 0, 0x7e is 448, and every other one is even."""
    values, low = FINITE.float(), torch.arange(0x7E, dtype=torch.uint8)
    assert torch.equal(coded(values), FINITE.view(torch.uint8))
    a, b = low.view(CODE).float(), (low + 1).view(CODE).float()
    middle, even = (a + b) / 2, low + low % 2
    assert (a < b).all()
    below, above = middle.nextafter(a), middle.nextafter(b)
    for sign, bit in ((1, 0), (-1, 0x80)):
        assert torch.equal(coded(sign * middle), even | bit)
        assert torch.equal(coded(sign * below), low | bit)
        assert torch.equal(coded(sign * above), (low + 1) | bit)


def test_no_finite_number_passes_the_largest_code() -> None:
    """Whatever the largest number of a block, its code is above 224, up to 448: no bit of range is given away."""
    top = torch.cat([torch.rand(500) + 1, torch.tensor([1.75]).nextafter(torch.tensor([0.0, 2.0, 1.75]))])
    top = top.unsqueeze(-1) * 2.0 ** torch.arange(-100, 100, 7)
    codes, scales = quantise(top.flatten().unsqueeze(-1))
    largest = codes.float()
    assert ((largest >= 224) & (largest <= 448)).all()
    assert (top.flatten() <= 448 * scales.float().flatten()).all()
    assert ((largest * scales.float()).flatten() / top.flatten() - 1).abs().max() <= 1 / 16


def test_zero_and_what_is_not_finite() -> None:
    w = torch.zeros(3, 2 * BLOCK)
    w[1, 3], w[2, BLOCK] = torch.inf, torch.nan
    back = dequantise(*quantise(w), torch.float32, "torch")
    assert (back[0] == 0).all()
    assert back[1, :BLOCK].isnan().any()
    assert back[2, BLOCK].isnan()
    assert (back[1, BLOCK:] == 0).all()
    assert (back[2, :BLOCK] == 0).all()


def weights(outliers: float) -> Tensor:
    w = torch.randn(256, 2688) * 0.02
    w[:, torch.randperm(2688)[:8]] *= outliers
    return w


@pytest.mark.parametrize("outliers", [1.0, 20.0, 2000.0])
def test_the_error_of_weights(outliers: float) -> None:
    """Normal weights, some input channels much larger.  Each number that the block's range reaches has 4 bits."""
    w = weights(outliers)
    codes, scales = quantise(w)
    back = dequantise(codes, scales, torch.float64, "torch")
    assert relative_error(back, w) < 0.028
    smallest = scales.double().repeat_interleave(BLOCK, -1) * 2.0**-6  # the smallest normal number
    assert ((back - w).abs() <= torch.maximum(w.abs().double(), smallest) / 16).all()
    assert torch.equal(dequantise(codes, scales, torch.bfloat16, "torch").double(), back)
    assert torch.equal(dequantise(*quantise(back), torch.float64, "torch"), back)


def test_a_cut_at_a_multiple_of_the_block_changes_nothing() -> None:
    w = weights(20.0)
    whole = quantise(w)
    left, right = quantise(w[:, : 8 * BLOCK]), quantise(w[:, 8 * BLOCK :])
    for a, b, both in zip(left, right, whole, strict=True):
        assert torch.equal(torch.cat([a.float(), b.float()], -1), both.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_is_the_formula_on_all_codes(dtype: torch.dtype, device: str, poisoned_empty: None) -> None:
    codes = BYTES.view(CODE).view(1, 256).repeat(6, 1).to(device)
    scales = (2.0 ** torch.tensor([[0, 1], [-1, -9], [7, 20], [-30, 3], [-60, 60], [5, 5]])).to(torch.bfloat16)
    scales = scales.to(device)
    ours, truth = (f(codes, scales, dtype) for f in (dequantise, dequantise_reference))
    assert torch.equal(ours.isnan(), truth.isnan())
    assert truth.isnan().sum() == 12
    assert torch.equal(ours.nan_to_num(), truth.nan_to_num())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], device: str, poisoned_empty: None) -> None:
    codes, scales = quantise(torch.randn(shape, device=device))
    assert codes.shape == shape
    assert scales.shape == scale_shape(torch.Size(shape))
    ours = dequantise(codes, scales, torch.float32, "triton")
    assert torch.equal(ours, dequantise_reference(codes, scales, torch.float32))


def test_a_product_keeps_codes_only_and_has_the_gradient_of_the_expanded_one() -> None:
    codes, scales = quantise(torch.randn(24, 200))
    x, dy = torch.randn(3, 5, 200, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, 24, dtype=torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = linear(x, codes, scales)
    assert [t.data_ptr() for t in kept] == [codes.data_ptr(), scales.data_ptr()]
    w = dequantise_reference(codes, scales, torch.float64)
    assert relative_error(y, x @ w.T) < 1e-14
    assert relative_error(torch.autograd.grad(y, x, dy)[0], dy @ w) < 1e-14


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 1856, 2688), (10304, 2688), (2688, 3712)], ids=str)
def test_on_the_gpu(shape: tuple[int, ...], poisoned_empty: None) -> None:
    """The same codes as on a CPU, and the same numbers from them."""
    w = torch.randn(shape)
    here, there = quantise(w), quantise(w.cuda())
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.float(), b.float().cpu())
    assert torch.equal(dequantise(*there, torch.bfloat16), dequantise_reference(*there, torch.bfloat16))

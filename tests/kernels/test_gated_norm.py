"""The gated, grouped RMSNorm against float64, forward and every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.gated_norm
from kernels._bandwidth import Launch
from kernels.gated_norm import gated_rms_norm, gated_rms_norm_reference
from tests.kernels.conftest import assert_as_accurate, relative_error

# fp32: gate, norm and their derivatives are some twenty roundings of 6e-8 per element around one short sum, and exp is
# good to a few units in the last place; 1e-5 leaves room for that and none for a wrong formula.
FP32 = 1e-5
EPS = 1e-5


def strided(rows: int, width: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, width) random numbers as a slice of a wider tensor, as z is one of the input projection's output."""
    return torch.randn(rows, width + 24, device=device, dtype=dtype)[:, 8 : 8 + width]


def run(f: Callable, inputs: list[Tensor], groups: int, dout: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = f(*leaves, groups, EPS)
    grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    return {"out": out} | dict(zip(("dy", "dz", "dweight"), grads, strict=True))


# Tiles of many tokens, of a token, of part of one; group widths that are no powers of two; 6 groups in tiles of 8 rows.
SHAPES = [(1, 16, 1), (7, 40, 1), (33, 96, 8), (5, 6 * 300, 6), (3, 4096, 8), (3, 4096, 1), (2, 12 * 512, 12)]


@pytest.mark.parametrize(("T", "d", "groups"), SHAPES)
def test_fp32(T: int, d: int, groups: int, device: str, poisoned_empty: None) -> None:
    inputs = [torch.randn(T, d, device=device), strided(T, d, device), torch.rand(d, device=device) + 0.5]
    dout = strided(T, d, device)
    ours = run(gated_rms_norm, inputs, groups, dout, torch.float32)
    truth = run(gated_rms_norm_reference, inputs, groups, dout, torch.float64)
    for name in truth:
        assert relative_error(ours[name], truth[name]) < FP32, name


@pytest.mark.parametrize("launch", [Launch(64, 4, programs_per_sm=3, stages=2), Launch(64, 1)], ids=["walk", "tiles"])
def test_every_way_to_launch(
    launch: Launch, device: str, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.gated_norm, "FORWARD", launch)
    monkeypatch.setattr(kernels.gated_norm, "BACKWARD", launch)
    y, z, weight = torch.randn(13, 72, device=device), torch.randn(13, 72, device=device), torch.rand(72, device=device)
    ours = run(gated_rms_norm, [y, z, weight], 3, z, torch.float32)  # 3 groups in tiles of 2 rows
    truth = run(gated_rms_norm_reference, [y, z, weight], 3, z, torch.float64)
    for name in truth:
        assert relative_error(ours[name], truth[name]) < FP32, name


def test_leading_dimensions_and_large_gates(device: str, poisoned_empty: None) -> None:
    y, z = torch.randn(2, 3, 24, device=device), torch.randn(2, 3, 24, device=device) * 200  # exp(-z) overflows
    weight = torch.ones(24, device=device)
    ours = run(gated_rms_norm, [y, z, weight], 2, y, torch.float32)
    truth = run(gated_rms_norm_reference, [y, z, weight], 2, y, torch.float64)
    for name in truth:
        assert relative_error(ours[name], truth[name]) < FP32, name


def test_no_tokens_and_zero_eps(device: str, poisoned_empty: None) -> None:
    weight = torch.ones(16, device=device, requires_grad=True)
    assert gated_rms_norm(
        torch.empty(0, 16, device=device), torch.empty(0, 16, device=device), weight, 2, EPS
    ).shape == (
        0,
        16,
    )
    y = torch.randn(3, 16, device=device)
    gated_rms_norm(y, y, weight, 2, 0.0).square().sum().backward()  # the empty rows of the tile must not be NaN
    assert torch.isfinite(weight.grad).all()


def test_refuses_what_does_not_fit() -> None:
    y = torch.randn(3, 8)
    with pytest.raises(ValueError, match="multiple"):
        gated_rms_norm(y, y, torch.ones(8), 3, EPS)
    with pytest.raises(ValueError, match="do not fit"):
        gated_rms_norm(y, y[:2], torch.ones(8), 2, EPS)


GPU_SHAPES = [(T, 4096, 8) for T in (1, 63, 127, 129, 4097, 8192)]
GPU_SHAPES += [(129, 4096, 1), (4097, 1024, 2), (63, 6 * 300, 6), (127, 8192, 1), (3, 20000, 2), (65, 64, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("T", "d", "groups"), GPU_SHAPES)
def test_compiled(T: int, d: int, groups: int, dtype: torch.dtype, poisoned_empty: None) -> None:
    y, dout = (torch.randn(T, d, device="cuda", dtype=dtype) for _ in range(2))
    inputs = [y, strided(T, d, "cuda", dtype), (torch.rand(d, device="cuda") + 0.5).to(dtype)]
    got = run(gated_rms_norm, inputs, groups, dout, dtype)
    again = run(gated_rms_norm, inputs, groups, dout, dtype)
    eager = run(gated_rms_norm_reference, inputs, groups, dout, dtype)
    truth = run(gated_rms_norm_reference, inputs, groups, dout, torch.float64)
    for name in truth:
        assert torch.equal(got[name], again[name]), f"{name} differs between two runs"
        if dtype == torch.float32:
            assert relative_error(got[name], truth[name]) < FP32, name
        else:
            assert_as_accurate(got[name], eager[name], truth[name], what=name)

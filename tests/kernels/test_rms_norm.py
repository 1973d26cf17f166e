"""RMSNorm, alone and where the stream is summed, against float64, forward and every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.rms_norm
from kernels._bandwidth import Launch
from kernels.rms_norm import join_rms_norm, join_rms_norm_reference, rms_norm, rms_norm_reference
from tests.kernels.conftest import assert_as_accurate, relative_error

# fp32: an element goes through about ten roundings of 6e-8 and a sum of up to a few thousand terms, whose error the
# tree order of a reduction keeps below 1e-6; 1e-5 leaves room for rsqrt's approximation and none for a wrong formula.
FP32 = 1e-5
EPS = 1e-5


def strided(rows: int, width: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, width) random numbers as a slice of a wider tensor, like a slice of a fused projection's output."""
    return torch.randn(rows, width + 24, device=device, dtype=dtype)[:, 8 : 8 + width]


def run(f: Callable, inputs: list[Tensor], grads: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of f(*inputs, EPS) and the gradients of all inputs, computed in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]  # strides stay as given where dtypes agree
    out = f(*leaves, EPS)
    out = out if isinstance(out, tuple) else (out,)
    got = torch.autograd.grad(out, leaves, [g.to(dtype) for g in grads])
    return {f"output {i}": t for i, t in enumerate(out)} | {f"gradient {i}": t for i, t in enumerate(got)}


def join(readers: int, f: Callable = join_rms_norm) -> Callable:
    """join_rms_norm as a function of the stream, its summands and the weight."""
    return lambda x, *rest: f(x, rest[:-2], rest[-2], rest[-1], readers)


def reference(readers: int) -> Callable:
    return join(readers, join_rms_norm_reference)


JOINS = [(0, 1), (1, 1), (2, 1), (0, 2), (1, 3), (2, 3)]  # summands, readers
SHAPES = [(1, 16), (7, 40), (33, 129), (5, 2048), (3, 2688)]  # several rows a tile, ragged tiles, one row a tile


@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_rms_norm_fp32(T: int, D: int, device: str, poisoned_empty: None) -> None:
    inputs = [strided(T, D, device), torch.rand(D, device=device) + 0.5]
    dy = [strided(T, D, device)]
    ours = run(rms_norm, inputs, dy, torch.float32)
    truth = run(rms_norm_reference, inputs, dy, torch.float64)
    for name in truth:
        assert relative_error(ours[name], truth[name]) < FP32, name


@pytest.mark.parametrize(("summands", "readers"), JOINS)
@pytest.mark.parametrize(("T", "D"), [(7, 40), (3, 2688)])
def test_join_fp32(T: int, D: int, summands: int, readers: int, device: str, poisoned_empty: None) -> None:
    inputs = [*(strided(T, D, device) for _ in range(1 + summands)), torch.rand(D, device=device) + 0.5]
    grads = [strided(T, D, device) for _ in range(1 + readers)]
    ours = run(join(readers), inputs, grads, torch.float32)
    truth = run(reference(readers), inputs, grads, torch.float64)
    for name in truth:
        assert relative_error(ours[name], truth[name]) < FP32, name


@pytest.mark.parametrize("launch", [Launch(64, 4, programs_per_sm=3, stages=2), Launch(64, 1)], ids=["walk", "tiles"])
def test_every_way_to_launch(
    launch: Launch, device: str, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.rms_norm, "FORWARD", launch)
    monkeypatch.setattr(kernels.rms_norm, "BACKWARD", launch)
    inputs = [torch.randn(13, 24, device=device), torch.randn(13, 24, device=device), torch.rand(24, device=device)]
    ours = run(join(1), inputs, inputs[:2], torch.float32)
    truth = run(reference(1), inputs, inputs[:2], torch.float64)
    for name in truth:
        assert relative_error(ours[name], truth[name]) < FP32, name


@pytest.mark.parametrize("used", [(0,), (1,), (3,), (0, 2), (1, 3)], ids=str)
def test_outputs_may_go_unused(used: tuple[int, ...], device: str, poisoned_empty: None) -> None:
    x, a, b, dy = (torch.randn(3, 24, device=device) for _ in range(4))
    weight = torch.rand(24, device=device) + 0.5

    def gradients(f: Callable, dtype: torch.dtype) -> list[Tensor | None]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, a, b, weight)]
        outputs = f(*leaves, EPS)
        return torch.autograd.grad([outputs[i] for i in used], leaves, [dy.to(dtype)] * len(used), allow_unused=True)

    for ours, truth in zip(gradients(join(3), torch.float32), gradients(reference(3), torch.float64), strict=True):
        assert (ours is None and truth is None) or relative_error(ours, truth) < FP32


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "stream", "norm"])
@pytest.mark.parametrize("summands", [0, 1])
def test_one_summand_and_one_reader_are_additions_to_the_bit(
    summands: int, used: tuple[int, ...], dtype: torch.dtype, device: str, poisoned_empty: None
) -> None:
    inputs = [torch.randn(2, 5, 72, device=device).transpose(0, 1).to(dtype) for _ in range(1 + summands)]
    weight = (torch.rand(72, device=device) + 0.5).to(dtype)
    grads = [torch.randn(5, 2, 72, device=device).to(dtype) for _ in range(2)]

    def apart(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        total = x + rest[0] if summands else x.view_as(x)
        return total, rms_norm(total, weight=rest[-2], eps=EPS)

    def gradients(f: Callable) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_() for t in (*inputs, weight)]
        outputs = f(*leaves, EPS)
        chosen = [outputs[i] for i in used], leaves, [grads[i] for i in used]
        return [*outputs, *torch.autograd.grad(*chosen, allow_unused=True)]

    for i, (a, b) in enumerate(zip(gradients(join(1)), gradients(apart), strict=True)):
        if len(used) == 2 and 2 <= i < 3 + summands:  # the sum of two gradients, rounded once instead of twice
            if dtype == torch.float32:  # where the compiler fuses a multiplication into the addition
                assert relative_error(a, b) < 2 * torch.finfo(dtype).eps
            continue  # in 16 bit: the next test
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("readers", [1, 3])
def test_the_streams_gradient_is_rounded_once(readers: int, dtype: torch.dtype, device: str) -> None:
    inputs = [torch.randn(9, 72, device=device).to(dtype), (torch.rand(72, device=device) + 0.5).to(dtype)]
    grads = [torch.randn(9, 72, device=device).to(dtype) for _ in range(1 + readers)]
    got = run(join(readers), inputs, grads, dtype)["gradient 0"]
    truth = run(reference(readers), inputs, grads, torch.float64)["gradient 0"]
    # What fp32 leaves is 1e-7 beside the rounding's 2e-4 (fp16) or 2e-3; it tips a few ties.  Two roundings: 1.2 times.
    assert relative_error(got, truth) < 1.01 * relative_error(truth.to(dtype), truth)


def test_leading_dimensions_and_expanded_gradients(device: str) -> None:
    x = torch.randn(2, 3, 4, 16, device=device).transpose(1, 2).requires_grad_()
    weight = torch.ones(16, device=device)
    rms_norm(x, weight, EPS).sum().backward()  # dy is an expanded scalar: stride 0 in every dimension
    truth = x.detach().double().requires_grad_()
    rms_norm_reference(truth, weight.double(), EPS).sum().backward()
    assert relative_error(x.grad, truth.grad) < FP32


def test_zero_rows_and_zero_eps(device: str, poisoned_empty: None) -> None:
    assert rms_norm(torch.empty(0, 8, device=device), torch.ones(8, device=device), EPS).shape == (0, 8)
    x = torch.randn(3, 16, device=device, requires_grad=True)  # 3 rows of a larger tile: its empty rows must not be NaN
    weight = torch.ones(16, device=device, requires_grad=True)
    rms_norm(x, weight, 0.0).square().sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_float64_runs_the_reference() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.randn(3, 8), torch.ones(7), EPS)
    with pytest.raises(ValueError, match="differ"):
        join_rms_norm(torch.randn(3, 8), [torch.randn(2, 8)], torch.ones(8), EPS)
    with pytest.raises(ValueError, match="3 summands and 1 readers"):
        join_rms_norm(torch.randn(3, 8), [torch.randn(3, 8)] * 3, torch.ones(8), EPS)


GPU_SHAPES = [(T, 2688) for T in (1, 63, 127, 129, 4097, 8192)] + [(129, 64), (127, 1000), (63, 16384), (3, 40000)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("summands", "readers"), [(0, 0), (1, 1), (2, 3)], ids=["norm", "join", "join_all"])
@pytest.mark.parametrize(("T", "D"), GPU_SHAPES)
def test_compiled(T: int, D: int, summands: int, readers: int, dtype: torch.dtype, poisoned_empty: None) -> None:
    ours, plain = (join(readers), reference(readers)) if readers else (rms_norm, rms_norm_reference)
    inputs = [strided(T, D, "cuda", dtype) for _ in range(1 + summands)]
    inputs.append((torch.rand(D, device="cuda") + 0.5).to(dtype))
    grads = [strided(T, D, "cuda", dtype) for _ in range(1 + readers)]
    got = run(ours, inputs, grads, dtype)
    eager = run(plain, inputs, grads, dtype)
    truth = run(plain, inputs, grads, torch.float64)
    again = run(ours, inputs, grads, dtype)
    for name in truth:
        assert torch.equal(got[name], again[name]), f"{name} differs between two runs"
        if dtype == torch.float32:
            assert relative_error(got[name], truth[name]) < FP32, name
        else:
            assert_as_accurate(got[name], eager[name], truth[name], what=name)

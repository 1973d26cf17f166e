"""The causal depthwise convolution with SiLU against float64, forward and every gradient; and its decoding step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.conv1d import causal_conv1d, causal_conv1d_reference
from kernels.conv1d_step import causal_conv1d_step, causal_conv1d_step_reference
from tests.kernels.conftest import assert_as_accurate, relative_error

# fp32: four products, a sigmoid good to a few units in the last place, and sums over at most a few thousand rows whose
# error grows as the root of their number: under 2e-6.  A wrong tap, mask or row shows at 1e-3 and more.
FP32 = 1e-5


def strided(B: int, S: int, C: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, S, C) random numbers as a slice of a wider tensor, as x is one of the input projection's output."""
    return torch.randn(B, S, C + 24, device=device, dtype=dtype)[..., 8 : 8 + C]


def documents(kind: str | None, B: int, S: int, device: str) -> Tensor | None:
    """seq_idx of a packed batch: None, "each" token its own document, or "some" random boundaries."""
    if kind is None:
        return None
    if kind == "each":
        return torch.arange(S, device=device).expand(B, S)
    return (torch.rand(B, S, device=device) < 0.2).cumsum(1).to(torch.int32)


def run(
    f: Callable, tensors: dict[str, Tensor | None], seq_idx: Tensor | None, dy: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    leaves = {k: t if t is None else t.detach().to(dtype).requires_grad_() for k, t in tensors.items()}
    y = f(**leaves, seq_idx=seq_idx)
    given = {k: t for k, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(y, list(given.values()), dy.to(dtype))
    return {"y": y} | {f"d{k}": g for k, g in zip(given, grads, strict=True)}


def example(
    B: int, S: int, C: int, W: int, bias: bool, initial: bool, device: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    return {
        "x": strided(B, S, C, device, dtype),
        "weight": torch.randn(C, W, device=device).to(dtype),
        "bias": torch.randn(C, device=device).to(dtype) if bias else None,
        "initial": torch.randn(B, W - 1, C, device=device).to(dtype) if initial else None,
    }


CASES = [  # B, S, C, W, bias, initial, documents: lengths around a step of 4 rows and a run of 16, widths, blocks
    (1, 1, 5, 4, True, False, None),
    (2, 3, 24, 4, False, True, None),
    (1, 16, 300, 4, True, True, None),
    (2, 37, 24, 4, True, True, "some"),
    (1, 67, 24, 4, True, False, "some"),
    (1, 21, 24, 4, True, True, "each"),
    (2, 18, 24, 3, True, True, "some"),
    (1, 35, 24, 2, False, True, "some"),
    (1, 33, 24, 2, True, False, None),
    (1, 20, 24, 3, False, False, None),
]


@pytest.mark.parametrize(("B", "S", "C", "W", "bias", "initial", "kind"), CASES)
def test_fp32(
    B: int, S: int, C: int, W: int, bias: bool, initial: bool, kind: str | None, device: str, poisoned_empty: None
) -> None:
    tensors, seq_idx = example(B, S, C, W, bias, initial, device), documents(kind, B, S, device)
    dy = strided(B, S, C, device)
    ours = run(causal_conv1d, tensors, seq_idx, dy, torch.float32)
    truth = run(causal_conv1d_reference, tensors, seq_idx, dy, torch.float64)
    for name in truth:
        assert relative_error(ours[name], truth[name]) < FP32, name


def test_two_halves_are_the_whole(device: str, poisoned_empty: None) -> None:
    """The columns before the cut, given as `initial`, continue a row as if it had not been cut."""
    tensors = example(2, 30, 24, 4, True, False, device)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    whole = causal_conv1d(x, weight, bias)
    second = causal_conv1d(x[:, 13:], weight, bias, None, x[:, 10:13])
    assert torch.equal(second, whole[:, 13:])


def test_mixed_dtypes_and_no_rows(device: str, poisoned_empty: None) -> None:
    x = torch.randn(1, 9, 8, device=device, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(8, 4, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, dtype=torch.float16, requires_grad=True)
    y = causal_conv1d(x, weight, bias)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (x.dtype, x.dtype, weight.dtype, bias.dtype)
    assert causal_conv1d(x[:, :0], weight, bias).shape == (1, 0, 8)


@pytest.mark.parametrize(("K", "W", "bias"), [(4, 4, True), (3, 3, False), (5, 2, True), (6, 4, True)])
def test_step_fp32(K: int, W: int, bias: bool, device: str, poisoned_empty: None) -> None:
    B, C = 2, 300
    x, window = strided(1, B, C, device)[0], strided(B, K + 1, C, device)[:, 1:]
    weight, b = torch.randn(C, W, device=device), torch.randn(C, device=device) if bias else None
    y, new = causal_conv1d_step(x, window, weight, b)
    truth, expected = causal_conv1d_step_reference(*(t if t is None else t.double() for t in (x, window, weight, b)))
    assert relative_error(y, truth) < FP32
    assert torch.equal(new, expected.to(new.dtype))
    assert not torch.equal(new, window)


def test_steps_continue_a_sequence(device: str) -> None:
    """Decoding token by token gives what one convolution over the whole row gives."""
    tensors = example(1, 7, 24, 4, True, False, device)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    window, out = x.new_zeros(1, 4, 24), []
    for t in range(7):
        y, window = causal_conv1d_step(x[:, t], window, weight, bias)
        out.append(y)
    assert (
        relative_error(torch.stack(out, 1), causal_conv1d_reference(x.double(), weight.double(), bias.double())) < FP32
    )


def test_step_is_differentiable_where_asked(device: str) -> None:
    x = torch.randn(1, 8, device=device, requires_grad=True)
    y, _ = causal_conv1d_step(x, torch.zeros(1, 4, 8, device=device), torch.ones(8, 4, device=device), None)
    y.sum().backward()
    assert x.grad is not None


def test_refuses_what_does_not_fit() -> None:
    x, weight = torch.randn(1, 5, 8), torch.randn(8, 4)
    with pytest.raises(ValueError, match="do not fit"):
        causal_conv1d(x, torch.randn(8, 5), None)
    with pytest.raises(ValueError, match="initial"):
        causal_conv1d(x, weight, None, None, torch.randn(1, 2, 8))
    with pytest.raises(ValueError, match="seq_idx"):
        causal_conv1d(x, weight, None, torch.zeros(5, dtype=torch.int32))
    with pytest.raises(ValueError, match="window"):
        causal_conv1d_step(x[:, 0], torch.zeros(1, 3, 8), weight, None)


GPU_CASES = [(1, S, 6144, 4, True, False, None) for S in (1, 63, 127, 129, 4097, 8192)]
GPU_CASES += [(1, 4097, 6144, 4, True, True, "some"), (3, 129, 6144, 4, True, True, "each")]
GPU_CASES += [
    (2, 1000, 1000, 3, False, True, "some"),
    (5, 127, 67, 2, True, True, None),
    (2, 8192, 96, 4, True, True, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("B", "S", "C", "W", "bias", "initial", "kind"), GPU_CASES)
def test_compiled(
    B: int,
    S: int,
    C: int,
    W: int,
    bias: bool,
    initial: bool,
    kind: str | None,
    dtype: torch.dtype,
    poisoned_empty: None,
) -> None:
    tensors, seq_idx = example(B, S, C, W, bias, initial, "cuda", dtype), documents(kind, B, S, "cuda")
    dy = torch.randn(B, S, C, device="cuda", dtype=dtype)
    got = run(causal_conv1d, tensors, seq_idx, dy, dtype)
    again = run(causal_conv1d, tensors, seq_idx, dy, dtype)
    eager = run(causal_conv1d_reference, tensors, seq_idx, dy, dtype)
    truth = run(causal_conv1d_reference, tensors, seq_idx, dy, torch.float64)
    for name in truth:
        assert torch.equal(got[name], again[name]), f"{name} differs between two runs"
        if dtype == torch.float32:
            assert relative_error(got[name], truth[name]) < FP32, name
        else:
            assert_as_accurate(got[name], eager[name], truth[name], what=name)


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 64])
def test_compiled_step(B: int, poisoned_empty: None) -> None:
    C, dtype = 6144, torch.bfloat16
    x, window = strided(1, B, C, "cuda", dtype)[0], torch.randn(B, 4, C, device="cuda", dtype=dtype)
    weight, bias = torch.randn(C, 4, device="cuda", dtype=dtype), torch.randn(C, device="cuda", dtype=dtype)
    y, new = causal_conv1d_step(x, window, weight, bias)
    eager, expected = causal_conv1d_step_reference(x, window, weight, bias)
    truth, _ = causal_conv1d_step_reference(*(t.double() for t in (x, window, weight, bias)))
    assert torch.equal(new, expected)
    assert_as_accurate(y, eager, truth)

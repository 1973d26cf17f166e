"""What the operators share at the edges of what they accept: slices, NaN, no tokens, second derivatives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import fp8
from kernels.attention import attention
from kernels.conv1d import causal_conv1d
from kernels.conv1d_step import causal_conv1d_step
from kernels.cross_entropy import combine_statistics, linear_cross_entropy, vocabulary_gradient, vocabulary_statistics
from kernels.gated_norm import gated_rms_norm
from kernels.grouped_gemm import experts
from kernels.mamba_mixer import Sizes, mamba_mixer
from kernels.relu2 import relu2
from kernels.rms_norm import join_rms_norm, rms_norm
from kernels.routing import route
from kernels.ssd import ssd, ssd_step

H, P, G, N = 4, 16, 2, 16
SIZES = Sizes(H, P, G, N)


def every_other(n: int, device: str) -> Tensor:
    return (torch.rand(2 * n, device=device) + 0.5)[::2]


def scan_inputs(S: int, device: str) -> list[Tensor]:
    return [torch.randn(1, S, *rest, device=device) for rest in ((H, P), (H,), (G, N), (G, N))]


def scan(device: str) -> tuple[Callable, list[Tensor]]:
    x, dt, B, C = scan_inputs(5, device)
    parameters = [every_other(H, device) for _ in range(3)]
    return lambda A, D, bias: ssd(x, dt, -A, B, C, D, bias, 4, backend="triton"), parameters


def scan_step(device: str) -> tuple[Callable, list[Tensor]]:
    x, dt, B, C = (t[:, 0] for t in scan_inputs(1, device))
    state = torch.randn(1, H, P, N, device=device)
    parameters = [every_other(H, device) for _ in range(3)]
    return lambda A, D, bias: ssd_step(state, x, dt, -A, B, C, D, bias, backend="triton"), parameters


def norm(device: str) -> tuple[Callable, list[Tensor]]:
    x = torch.randn(3, 24, device=device)
    return lambda w: rms_norm(x, w, 1e-5, "triton"), [every_other(24, device)]


def joined_norm(device: str) -> tuple[Callable, list[Tensor]]:
    x = torch.randn(3, 24, device=device)
    return lambda w: join_rms_norm(x, (x,), w, 1e-5, 1, "triton"), [every_other(24, device)]


def gated(device: str) -> tuple[Callable, list[Tensor]]:
    y = torch.randn(3, 24, device=device)
    return lambda w: gated_rms_norm(y, y, w, 2, 1e-5, "triton"), [every_other(24, device)]


def convolution_step(device: str) -> tuple[Callable, list[Tensor]]:
    x, window, weight = (torch.randn(s, device=device) for s in ((2, 8), (2, 4, 8), (8, 4)))
    return lambda bias: causal_conv1d_step(x, window, weight, bias, "triton"), [every_other(8, device)]


def convolution(device: str) -> tuple[Callable, list[Tensor]]:
    x, weight = torch.randn(1, 5, 8, device=device), torch.randn(8, 4, device=device)
    return lambda bias: causal_conv1d(x, weight, bias, backend="triton"), [every_other(8, device)]


def selection(device: str) -> tuple[Callable, list[Tensor]]:
    x, weight = torch.randn(6, 16, device=device), torch.randn(8, 16, device=device)
    return lambda bias: route(x, weight, bias, 2, 1, 1, True, 1.0, "triton"), [every_other(8, device)]


def mixer(device: str) -> tuple[Callable, list[Tensor]]:
    inner, channels = H * P, H * P + 2 * G * N
    projected, weight = torch.randn(1, 5, inner + channels + H, device=device), torch.randn(channels, 4, device=device)
    parameters = [every_other(n, device) for n in (channels, H, H, H, inner)]
    return lambda b, A, D, dt, w: mamba_mixer(
        projected, weight, b, A, D, dt, w, SIZES, (0.0, torch.inf), 1e-5
    ), parameters


def slice_of_logits(device: str) -> tuple[Callable, list[Tensor]]:
    logits, labels = torch.randn(5, 32, device=device), torch.randint(0, 32, (10,), device=device)[::2]
    lse = logits.logsumexp(-1)

    def f(weight: Tensor) -> list[Tensor]:
        whole = torch.full((5, 48), 7.0, device=device)
        whole[:, :32] = logits
        gradient = vocabulary_gradient(whole[:, :32], lse, labels, weight, 0, "triton")
        return [gradient, whole, *combine_statistics(vocabulary_statistics(logits, labels, 0, "triton").unsqueeze(0))]

    return f, [every_other(5, device)]


SLICED = [
    scan, scan_step, norm, joined_norm, gated, convolution, convolution_step, selection, mixer, slice_of_logits
]  # fmt: skip


@pytest.mark.parametrize("make", SLICED, ids=lambda f: f.__name__)
def test_parameters_may_be_slices(make: Callable, device: str) -> None:
    f, parameters = make(device)
    outputs = [f(*parameters), f(*(p.contiguous() for p in parameters))]
    a, b = ([o] if isinstance(o, Tensor) else [t for t in o if t is not None] for o in outputs)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_tokens_give_a_weight_no_gradient(backend: str, device: str, poisoned_empty: None) -> None:
    x, weight = torch.empty(0, 8, device=device).zero_(), torch.randn(16, 8, device=device, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long, device=device)
    linear_cross_entropy(x, weight, none, torch.zeros(0, device=device), backend=backend)[0].backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_nan_is_not_lost(device: str) -> None:
    """The maximum of NaN and 0 is 0 to the hardware."""
    x = torch.tensor([float("nan"), -1.0, 2.0], device=device)
    assert torch.equal(relu2(x, "triton").isnan(), x.isnan())
    rows, up, down = torch.randn(4, 16, device=device), torch.randn(2, 16, 16, device=device), torch.randn(2, 16, 16)
    up[1, 3, 5] = float("nan")
    ids = torch.tensor([[0], [1], [0], [1]], device=device)
    y = experts(rows, torch.ones(4, 1, device=device), ids, torch.tensor([2, 2]), up, down.to(device), backend="triton")
    assert torch.equal(y.isnan().any(1), ids[:, 0] == 1)


def test_a_label_outside_the_vocabulary_shows(device: str) -> None:
    x, weight = torch.randn(3, 8, device=device), torch.randn(16, 8, device=device, requires_grad=True)
    labels = torch.tensor([1, -1, 2], device=device)
    _, losses = linear_cross_entropy(x, weight, labels, torch.ones(3, device=device), backend="triton")
    assert losses.isnan().tolist() == [False, True, False]


def attend(q: Tensor) -> Tensor:
    return attention(q, q.detach(), q.detach(), backend="triton")


def lose(x: Tensor) -> Tensor:
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    weight = torch.eye(16, device=x.device)
    return linear_cross_entropy(x, weight, labels, torch.ones(len(x), device=x.device), backend="triton")[0]


def choose(x: Tensor) -> Tensor:
    weight = torch.eye(16, device=x.device)
    return route(x, weight, torch.zeros(16, device=x.device), 2, 1, 1, True, 1.0, "triton")[1]


def mix(x: Tensor) -> Tensor:
    ids, ones = torch.zeros(len(x), 1, dtype=torch.long, device=x.device), torch.ones(len(x), 1, device=x.device)
    up = torch.randn(2, 16, 16, device=x.device)
    return experts(x, ones, ids, torch.tensor([len(x), 0]), up, up, backend="triton")


@pytest.mark.parametrize("f", [attend, lose, choose, mix], ids=lambda f: f.__name__)
def test_second_derivatives_are_refused(f: Callable, device: str) -> None:
    """Their kernels have none, and a gradient that looks like a constant would drop a term without a word."""
    x = torch.randn((1, 4, 1, 16) if f is attend else (4, 16), device=device, requires_grad=True)
    (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (g.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("B", [0, 1])
def test_no_rows_or_no_heads(B: int, device: str) -> None:
    """A rank may hold none of the heads; the results are empty, and the gradients of what is shared are zero."""
    heads = H if B == 0 else 0
    x, dt = torch.randn(B, 5, heads, P, device=device), torch.randn(B, 5, heads, device=device)
    keys = [torch.randn(B, 5, G, N, device=device, requires_grad=True) for _ in "BC"]
    y, state = ssd(x, dt, *(torch.ones(heads, device=device), *keys), *torch.ones(2, heads, device=device), 4)
    assert (y.shape, state.shape) == ((B, 5, heads, P), (B, heads, P, N))
    (y.sum() + state.sum()).backward()
    assert not any(k.grad.any() for k in keys)
    q, k = torch.randn(B, 5, heads, P, device=device), torch.randn(B, 5, 1, P, device=device, requires_grad=True)
    y = attention(q, k, k, backend="triton")
    assert y.shape == q.shape
    y.sum().backward()
    assert not k.grad.any()
    assert attention(q[:, :1].detach(), k.detach(), k.detach(), backend="triton").shape == (B, 1, heads, P)


def test_fp8_codes_may_be_slices(device: str) -> None:
    codes, scales = (t.to(device) for t in fp8.quantise(torch.randn(6, 256)))
    want = fp8.dequantise(codes, scales, torch.float32, "torch")
    wide = torch.cat([codes.view(torch.uint8)] * 2, 1)[:, :256].view(fp8.CODE)
    for given in ((wide, scales), (codes, torch.cat([scales, scales], 1)[:, :2])):
        assert torch.equal(fp8.dequantise(*given, torch.float32, "triton"), want)

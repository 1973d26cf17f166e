"""Of a frozen parameter no gradient is summed, and what is trained gets the same bits as beside trained ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import conv1d, gated_norm, rms_norm, ssd, ssd_steps
from kernels.mamba_mixer import Sizes, mamba_mixer

SIZES = Sizes(H=4, P=16, G=2, N=16)
INNER, CHANNELS = SIZES.H * SIZES.P, SIZES.H * SIZES.P + 2 * SIZES.G * SIZES.N
B, S, D = 2, 19, 24


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm.rms_norm(x, weight, 1e-5)


def join(x: Tensor, summand: Tensor, weight: Tensor) -> Tensor:
    return sum(rms_norm.join_rms_norm(x, [summand], weight, 1e-5, 3))


def gated(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return gated_norm.gated_rms_norm(y, z, weight, 3, 1e-5)


def scan(x: Tensor, dt: Tensor, keys: Tensor, A_log: Tensor, skip: Tensor, bias: Tensor) -> Tensor:
    return ssd.ssd(x, dt, -A_log.exp(), keys, keys.flip(-1), skip, bias, 16)[0]


def mixer(projected: Tensor, *parameters: Tensor) -> Tensor:
    return mamba_mixer(projected, *parameters, SIZES, (0.0, torch.inf), 1e-5)


CASES = {  # the operator, shapes of what flows, shapes of parameters
    "rms_norm": (norm, [(B, S, D)], [(D,)]),
    "join_rms_norm": (join, [(B, S, D)] * 2, [(D,)]),
    "gated_rms_norm": (gated, [(B, S, D)] * 2, [(D,)]),
    "causal_conv1d": (conv1d.causal_conv1d, [(B, S, D)], [(D, 4), (D,)]),
    "ssd": (scan, [(B, S, 4, 16), (B, S, 4), (B, S, 2, 16)], [(4,)] * 3),
    "mamba_mixer": (
        mixer,
        [(B, S, INNER + CHANNELS + SIZES.H)],
        [(CHANNELS, 4), (CHANNELS,), *[(SIZES.H,)] * 3, (INNER,)],
    ),
}


class NotSummed(Tensor):
    """A partial result that may be passed on, but not added up."""

    def sum(self, *_: object) -> Tensor:
        raise AssertionError("a frozen parameter's gradient is summed")


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_parameter_gets_no_gradient(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f, flowing, fixed = CASES[name]
    values = [torch.randn(shape, device=device) for shape in flowing + fixed]
    draw = torch.randn_like(f(*values))

    def gradients(trained: int) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_(i < trained) for i, t in enumerate(values)]
        f(*leaves).backward(draw)
        return [t.grad for t in leaves]

    everything = gradients(len(values))

    def refuse(*_: object) -> Callable:
        raise AssertionError("a frozen parameter's gradient is summed")

    for module in (rms_norm, gated_norm, conv1d):
        monkeypatch.setattr(module, "sum_partials", refuse)
    parts = ssd_steps.ddt_and_parameters
    monkeypatch.setattr(ssd_steps, "ddt_and_parameters", lambda *a: parts(*a).as_subclass(NotSummed))
    found = gradients(len(flowing))
    for i, (a, b) in enumerate(zip(found, everything, strict=True)):
        if i < len(flowing):
            assert torch.equal(a, b)
        else:
            assert a is None
            assert b is not None

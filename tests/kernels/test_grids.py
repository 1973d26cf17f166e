"""CUDA starts 2^31 - 1 programs along the first axis of a grid, and 65,535 along the others: no input may need more.

Nothing runs here: kernels are replaced by what notes the grid that they are asked for, and tensors have no memory.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels._common import INTERPRET, triton
from tests.kernels.conftest import needs_triton

if triton is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernels import (
    _bandwidth,
    adamw,
    attention_backward,
    attention_forward,
    balance,
    conv1d,
    conv1d_step,
    cross_entropy_softmax,
    dispatch,
    embedding,
    fp8,
    gated_norm,
    permute,
    relu2,
    rms_norm,
    routing_kernels,
    ssd_backward,
    ssd_backward_keys,
    ssd_forward,
    ssd_states,
    ssd_steps,
)
from kernels.attention import attention
from kernels.balance import balance_sums
from kernels.conv1d import causal_conv1d
from kernels.conv1d_step import causal_conv1d_step
from kernels.cross_entropy import vocabulary_gradient, vocabulary_statistics
from kernels.dispatch import collect, departures, spread
from kernels.embedding import embedding_gradient_
from kernels.gated_norm import gated_rms_norm
from kernels.mamba_mixer import Sizes, mamba_mixer
from kernels.rms_norm import join_rms_norm
from kernels.routing import expert_counts, route
from kernels.ssd import ssd, ssd_step

MODULES: list[ModuleType] = [
    _bandwidth, adamw, attention_backward, attention_forward, balance, conv1d, conv1d_step, cross_entropy_softmax,
    dispatch, embedding, fp8, gated_norm, permute, relu2, rms_norm, routing_kernels, ssd_backward, ssd_backward_keys,
    ssd_forward, ssd_states, ssd_steps,
]  # fmt: skip
pytestmark = [needs_triton, pytest.mark.skipif(not INTERPRET, reason="a GPU is asked for where nothing is interpreted")]


class Noted:
    """In a kernel's place."""

    def __init__(self, name: str, grids: list[tuple[str, tuple[int, ...]]]) -> None:
        self.name, self.grids = name, grids

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return lambda *_, **__: self.grids.append((self.name, grid))


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = []
    for module in MODULES:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Noted(f"{module.__name__}.{name}", found))
    monkeypatch.setattr(ssd_backward, "_reads_by_descriptor", lambda *_: False)  # an address is what they lack
    monkeypatch.setattr(attention_forward, "describe", lambda *_: None)
    monkeypatch.setattr(attention_backward, "describe", lambda *_: None)
    return found


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(dtype == torch.float32)


def backward(*outputs: Tensor) -> None:
    outputs = [t for t in outputs if t.requires_grad]
    torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])


def scan(B: int, S: int) -> None:
    x, dt, key, head = empty(B, S, 4, 16), empty(B, S, 4), empty(B, S, 2, 16), empty(4)
    backward(*ssd(x, dt, head, key, key.detach().requires_grad_(), head, head, 128))


def scan_step(B: int, S: int) -> None:
    key, head = empty(B * S, 2, 16).detach(), empty(4).detach()
    state, x, dt = empty(B * S, 4, 16, 16), empty(B * S, 4, 16), empty(B * S, 4)
    with torch.no_grad():
        ssd_step(state, x, dt, head, key, key, head, head)
        causal_conv1d_step(empty(B * S, 8), empty(B * S, 4, 8), empty(8, 4), None)


def convolve(B: int, S: int) -> None:
    backward(causal_conv1d(empty(B, S, 8), empty(8, 4), empty(8), initial=empty(B, 3, 8)))


def mix(B: int, S: int) -> None:
    heads, channels = [empty(4) for _ in range(3)], 4 * 16 + 2 * 2 * 16
    projected, limit = empty(B, S, 64 + channels + 4), (0.0, torch.inf)
    sizes = Sizes(4, 16, 2, 16)
    backward(mamba_mixer(projected, empty(channels, 4), None, *heads, empty(64), sizes, limit, 1e-5))


def norms(B: int, S: int) -> None:
    x = empty(B, S, 24)
    backward(*join_rms_norm(x, (x,), empty(24), 1e-5), gated_rms_norm(x, x, empty(24), 2, 1e-5), relu2.relu2(x))


def router(B: int, S: int) -> None:
    routes = route(empty(B * S, 16), empty(8, 16), empty(8).detach(), 2)
    backward(*routes[:2])
    expert_counts(routes.experts_TK, 8)
    backward(balance_sums(empty(B, S, 8), 2)[1])


def travel(B: int, S: int) -> None:
    ids = empty(B * S, 2, dtype=torch.int64)
    place, _ = departures(ids, 4, 2)
    backward(collect(spread(empty(B * S, 16), place, B * S), place))


def head(B: int, S: int) -> None:
    logits, labels = empty(B * S, 32).detach(), empty(B * S, dtype=torch.int64)
    vocabulary_statistics(logits, labels)
    vocabulary_gradient(logits, empty(B * S).detach(), labels, empty(B * S).detach())
    embedding_gradient_(empty(32, 16).detach(), labels, empty(B * S, 16).detach())


def attend(B: int, S: int) -> None:
    q, k, v = empty(B, S, 2, 16), empty(B, S, 1, 16), empty(B, S, 1, 16)
    backward(attention(q, k, v))
    with torch.no_grad():
        attention(q[:, :1], k, v)


@pytest.mark.parametrize(("B", "S"), [(1, 5_000_000), (200_000, 10)], ids=["long", "many"])
@pytest.mark.parametrize(
    "f",
    [scan, scan_step, convolve, mix, norms, router, travel, head, attend],
    ids=lambda f: f.__name__,
)
def test_no_axis_is_too_long(f: Callable, B: int, S: int, grids: list) -> None:
    f(B, S)
    assert grids
    wrong = [g for g in grids if g[1][0] >= 2**31 or any(n > 65535 for n in g[1][1:])]
    assert wrong == []

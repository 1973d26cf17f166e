"""The PyTorch paths of the operators, in float64: fast forms against formulas, forward and every gradient.

1e-11: both sides are exact up to the order of summation, about 1e-16 a step over at most a few hundred steps.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention, attention_reference
from kernels.conv1d import causal_conv1d
from kernels.conv1d_step import causal_conv1d_step
from kernels.cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_reference
from kernels.gated_norm import gated_rms_norm
from kernels.grouped_gemm import experts, experts_reference
from kernels.rms_norm import rms_norm
from kernels.routing import expert_counts, route
from kernels.ssd import ssd, ssd_recurrence, ssd_step
from tests.oracles import relative

BOUND = 1e-11


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


def assert_same(fast, formula, inputs: list[Tensor]) -> None:
    """Equal outputs, and equal gradients of a random projection of them, for every input."""
    got, truth = fast(*inputs), formula(*inputs)
    got, truth = ([t] if isinstance(t, Tensor) else [*t] for t in (got, truth))
    upstream = [torch.randn_like(t) for t in truth]
    for a, b in zip(got, truth, strict=True):
        assert relative(a, b) <= BOUND
    kept = [(a, b, u) for a, b, u in zip(got, truth, upstream, strict=True) if b.requires_grad]
    mine = torch.autograd.grad([k[0] for k in kept], inputs, [k[2] for k in kept])
    theirs = torch.autograd.grad([k[1] for k in kept], inputs, [k[2] for k in kept])
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if b.any():
            assert relative(a, b) <= BOUND, f"gradient of input {i}"
        else:  # exactly zero (one query and one key, say): the other numbers are of order one
            assert a.norm() <= BOUND, f"gradient of input {i}"


def ssd_inputs(B: int, S: int, H: int, P: int, G: int, N: int) -> list[Tensor]:
    x, dt, Bm, Cm = torch.randn(B, S, H, P), torch.randn(B, S, H), torch.randn(B, S, G, N), torch.randn(B, S, G, N)
    return leaves(x, dt, -torch.rand(H) * 4 - 0.1, Bm, Cm, torch.randn(H), torch.randn(H), torch.randn(B, H, P, N))


@pytest.mark.parametrize(
    ("S", "G", "chunk"), [(1, 1, 8), (7, 2, 8), (8, 4, 8), (9, 1, 8), (29, 2, 8), (33, 4, 16), (40, 2, 64), (24, 2, 1)]
)
@pytest.mark.parametrize("documents", [None, 5, 1], ids=["one", "fives", "singles"])
def test_chunked_scan_is_the_recurrence(S: int, G: int, chunk: int, documents: int | None) -> None:
    seq_idx = None if documents is None else (torch.arange(S) // documents).expand(2, S)

    def fast(x, dt, A, B, C, D, dt_bias, state):
        return ssd(x, dt, A, B, C, D, dt_bias, chunk, seq_idx=seq_idx, initial_state=state)

    def formula(x, dt, A, B, C, D, dt_bias, state):
        return ssd_recurrence(x, dt, A, B, C, D, dt_bias, seq_idx=seq_idx, initial_state=state)

    assert_same(fast, formula, ssd_inputs(2, S, 4, 3, G, 5))


def test_scan_with_a_clamped_step_and_without_a_state() -> None:
    inputs = ssd_inputs(1, 21, 2, 3, 1, 4)[:-1]
    limit = (0.3, 0.9)
    assert_same(lambda *a: ssd(*a, 8, limit), lambda *a: ssd_recurrence(*a, limit), inputs)
    assert relative(ssd(*inputs, 8, limit)[0], ssd(*inputs, 8)[0]) > 1e-2


def test_scan_in_two_parts_and_by_steps_is_the_scan_in_one() -> None:
    x, dt, A, B, C, D, dt_bias, state = ssd_inputs(2, 13, 4, 3, 2, 5)
    y, last = ssd(x, dt, A, B, C, D, dt_bias, 4, initial_state=state)
    y1, middle = ssd(x[:, :6], dt[:, :6], A, B[:, :6], C[:, :6], D, dt_bias, 4, initial_state=state)
    y2, end = ssd(x[:, 6:], dt[:, 6:], A, B[:, 6:], C[:, 6:], D, dt_bias, 4, initial_state=middle)
    assert relative(torch.cat([y1, y2], 1), y) <= BOUND
    assert relative(end, last) <= BOUND
    for t in range(13):
        step, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, dt_bias)
        assert relative(step, y[:, t]) <= BOUND
    assert relative(state, last) <= BOUND


def test_strong_decay_stays_exact_in_fp32() -> None:
    """Decay sums that reach thousands inside a chunk: what is left of a state must not drown in their rounding."""
    x, dt, _, B, C, D, dt_bias, _ = ssd_inputs(1, 256, 2, 4, 1, 8)
    A = torch.tensor([-16.0, -1.0], dtype=torch.float64)
    args = (x, dt + 2, A, B, C, D, dt_bias)
    truth, _ = ssd_recurrence(*args)
    got, _ = ssd(*(t.float() for t in args), 128)
    assert relative(got, truth) <= 1e-5


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("S", [1, 2, 9])
def test_convolution_is_pytorchs(width: int, S: int) -> None:
    inputs = leaves(torch.randn(2, S, 6), torch.randn(6, width), torch.randn(6), torch.randn(2, width - 1, 6))

    def formula(x, w, b, before):
        row = torch.cat([before, x], 1).transpose(1, 2)
        return F.silu(F.conv1d(row, w[:, None], b, groups=6)).transpose(1, 2)

    assert_same(lambda x, w, b, before: causal_conv1d(x, w, b, None, before), formula, inputs)
    x, w, b, before = inputs
    window = torch.cat([torch.zeros(2, 1, 6), before], 1)
    for t in range(S):
        y, window = causal_conv1d_step(x[:, t], window, w, b)
        assert relative(y, formula(x, w, b, before)[:, t]) <= BOUND


def test_norms_are_pytorchs() -> None:
    x, z, w = leaves(torch.randn(3, 5, 24), torch.randn(3, 5, 24), torch.randn(24))
    assert_same(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (24,), w, 1e-5), [x, w])

    def formula(x, z, w):
        return (F.rms_norm((x * F.silu(z)).unflatten(-1, (4, 6)), (6,), None, 1e-5)).flatten(-2) * w

    assert_same(lambda x, z, w: gated_rms_norm(x, z, w, 4, 1e-5), formula, [x, z, w])


@pytest.mark.parametrize(
    ("Sq", "Skv", "packed"), [(7, 7, False), (7, 7, True), (1, 1, False), (1, 9, False), (4, 9, False)]
)
def test_attention_is_its_formula(Sq: int, Skv: int, packed: bool) -> None:
    seq_idx = (torch.arange(Sq) // 3).expand(2, Sq) if packed else None
    inputs = leaves(torch.randn(2, Sq, 6, 8), torch.randn(2, Skv, 2, 8), torch.randn(2, Skv, 2, 8))
    assert_same(lambda *a: attention(*a, seq_idx), lambda *a: attention_reference(*a, seq_idx), inputs)


@pytest.mark.parametrize(("E", "K"), [(4, 1), (8, 3), (16, 16), (64, 2)])  # 64 experts, 40 choices: some get no row
def test_experts_are_their_formula(E: int, K: int) -> None:
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(20)])
    inputs = leaves(torch.randn(20, 6), torch.rand(20, K), torch.randn(E, 5, 6), torch.randn(E, 6, 5))
    counts = expert_counts(ids, E)
    assert int(counts.sum()) == 20 * K
    assert_same(
        lambda x, w, up, down: experts(x, w, ids, counts, up, down),
        lambda x, w, up, down: experts_reference(x, w, ids, up, down),
        inputs,
    )


def test_router_selects_with_the_bias_and_weighs_without_it() -> None:
    x, w = torch.randn(50, 8), torch.randn(6, 8)
    bias = torch.tensor([5.0, 0, 0, 0, 0, -5.0])
    routes = route(x, w, bias, 2, scale=2.5)
    assert (routes.experts_TK == 0).any(1).all()
    assert not (routes.experts_TK == 5).any()
    scores = (x @ w.T).sigmoid()
    chosen = scores.gather(1, routes.experts_TK)
    assert relative(routes.weights_TK, 2.5 * chosen / chosen.sum(1, keepdim=True)) <= 1e-6
    raw = route(x, w, bias, 2, norm_topk_prob=False)
    assert relative(raw.weights_TK, chosen) <= 1e-6


def test_router_obeys_group_limits() -> None:
    x, w, bias = torch.randn(200, 8), torch.randn(12, 8), torch.randn(12) * 0.1
    routes = route(x, w, bias, 3, n_group=4, topk_group=2)
    groups = routes.experts_TK // 3
    assert all(len(set(row.tolist())) <= 2 for row in groups)
    select = (routes.scores_TE + bias).unflatten(1, (4, 3))
    best = select.topk(2, -1).values.sum(-1).topk(2, -1).indices
    for t in range(200):
        allowed = [3 * g + i for g in best[t].tolist() for i in range(3)]
        top = sorted(allowed, key=lambda e: -(routes.scores_TE + bias)[t, e])[:3]
        assert sorted(routes.experts_TK[t].tolist()) == sorted(top)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_linear_cross_entropy_is_its_formula(chunk: int) -> None:
    labels = torch.randint(11, (17,))
    labels[[0, 5, 16]] = IGNORE
    weight = torch.rand(17).double()
    inputs = leaves(torch.randn(17, 6), torch.randn(11, 6))
    truth = F.cross_entropy(inputs[0] @ inputs[1].T, labels, reduction="none")
    total, losses = linear_cross_entropy(*inputs, labels, weight, chunk)
    assert relative(losses, truth) <= BOUND
    assert relative(total, (truth * weight).sum()) <= BOUND
    assert_same(
        lambda *a: linear_cross_entropy(*a, labels, weight, chunk),
        lambda *a: linear_cross_entropy_reference(*a, labels, weight),
        inputs,
    )


def test_operators_refuse_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        gated_rms_norm(torch.randn(2, 10), torch.randn(2, 10), torch.randn(10), 3, 1e-5)
    with pytest.raises(ValueError, match="causal_conv1d"):
        causal_conv1d(torch.randn(1, 3, 4), torch.randn(5, 4), None)
    with pytest.raises(ValueError, match="query heads"):
        attention(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4))
    with pytest.raises(ValueError, match="empty"):
        ssd(*[t[:, :0] if t.ndim > 1 else t for t in ssd_inputs(1, 4, 2, 3, 1, 2)[:7]], 8)

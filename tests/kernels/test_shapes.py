"""Arguments that do not fit are refused by name, whatever the backend: a kernel would read beside them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import fp8, gradient_sink
from kernels.adamw import Moment, Place, Step, adamw
from kernels.adapted_experts import adapted_experts
from kernels.adapted_linear import adapted_linear
from kernels.attention import attention
from kernels.balance import balance_sums
from kernels.conv1d_step import causal_conv1d_step
from kernels.cross_entropy import linear_cross_entropy, vocabulary_gradient, vocabulary_statistics
from kernels.embedding import embedding, embedding_gradient_
from kernels.gradient_sink import Buffer
from kernels.grouped_gemm import experts, grouped_mlp
from kernels.mamba_mixer import Sizes, mamba_mixer
from kernels.routing import expert_counts, route
from kernels.ssd import ssd, ssd_step

H, P, G, N = 4, 16, 2, 16
MIXER = Sizes(H, P, G, N)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def attend(q=(1, 4, 2, 16), k=(1, 6, 1, 16), v=(1, 6, 1, 16), idx=None) -> None:
    attention(ones(*q), ones(*k), ones(*v), None if idx is None else zeros(*idx))


def scan(dt=(1, 5, H), B=(1, 5, G, N), C=(1, 5, G, N), A=(H,), idx=(1, 5), state=(1, H, P, N)) -> None:
    ssd(
        ones(1, 5, H, P),
        ones(*dt),
        -ones(*A),
        ones(*B),
        ones(*C),
        ones(H),
        ones(H),
        4,
        (0.0, 1.0),
        zeros(*idx),
        ones(*state),
    )


def scan_step(dt=(2, H), B=(2, G, N), C=(2, G, N), A=(H,), state=(2, H, P, N)) -> None:
    ssd_step(ones(*state), ones(2, H, P), ones(*dt), -ones(*A), ones(*B), ones(*C), ones(H), ones(H))


def mix(lead=(1, 5), bias=None, idx=None, weight=None, A=(H,), norm=(H * P,)) -> None:
    channels = H * P + 2 * G * N
    mamba_mixer(
        ones(*lead, H * P + channels + H), ones(*(weight or (channels, 4))), None if bias is None else ones(*bias),
        ones(*A), ones(H), ones(H), ones(*norm), MIXER, (0.0, torch.inf), 1e-5, None if idx is None else zeros(*idx),
    )  # fmt: skip


def balance(top_k=2, scores=(1, 5, 8), real=(1, 5)) -> None:
    balance_sums(ones(*scores), top_k, ones(*real).bool())


def choose(x=(5, 16), weight=(8, 16), bias=(8,), top_k=2, **groups: int) -> None:
    route(ones(*x), ones(*weight), ones(*bias), top_k, **groups)


CODES = Moment(zeros(2, 32).to(torch.int8), ones(2, 2)), Moment(zeros(2, 32).to(torch.uint8), ones(2, 2))
WIDE = Moment(ones(2, 32)), Moment(ones(2, 32))


def update(first: Moment, second: Moment, weight=(2, 32), gradient=(2, 32), clip=(), block: int = 16) -> None:
    step = Step(0.1, 0.9, 0.99, 1e-8, 0.0, 1)
    adamw(ones(*weight), ones(*gradient), first, second, ones(*clip), step, (0, 0), Place(32), block)


def all_of_the_first(shape: tuple[int], rows: int) -> Tensor:
    return rows * (torch.arange(*shape) == 0)


def mlp(weights=(5, 2), ids=(5, 2), counts=(3,), x=(5, 16), f: Callable = experts, **options: object) -> None:
    up, down = ones(3, 8, 16), ones(3, 16, 8)
    adapters = () if f is experts else ((ones(3, 2, 16), ones(3, 8, 2)), None, 1.0)
    f(ones(*x), ones(*weights), zeros(*ids), all_of_the_first(counts, 10), up, down, *adapters, **options)


def ordered(weights=(5,), counts=(3,)) -> None:
    grouped_mlp(ones(5, 16), ones(*weights), all_of_the_first(counts, 5), ones(3, 8, 16), ones(3, 16, 8))


def lose(x=(5, 8), weight=(16, 8), labels=(5,), token_weight=(5,)) -> None:
    linear_cross_entropy(ones(*x), ones(*weight), zeros(*labels), ones(*token_weight))


def convolve_step(x=(2, 8), window=(2, 4, 8), weight=(8, 4), bias=(8,)) -> None:
    causal_conv1d_step(ones(*x), ones(*window), ones(*weight), ones(*bias))


MISTAKES: list[tuple[Callable, dict, str]] = [
    (attend, {"v": (1, 6, 2, 16)}, r"v \(1, 6, 2, 16\)"),
    (attend, {"v": (1, 5, 1, 16)}, r"v \(1, 5, 1, 16\)"),
    (attend, {"q": (1, 4, 2, 32)}, r"q is \(1, 4, 2, 32\)"),
    (attend, {"q": (2, 4, 2, 16)}, r"q is \(2, 4, 2, 16\)"),
    (attend, {"q": (4, 2, 16)}, r"q is \(4, 2, 16\)"),
    (attend, {"q": (1, 4, 3, 16), "k": (1, 6, 2, 16), "v": (1, 6, 2, 16)}, "3 query heads"),
    (attend, {"k": (1, 6, 0, 16), "v": (1, 6, 0, 16)}, "0 key-value heads"),
    (attend, {"q": (1, 7, 2, 16)}, "7 queries"),
    (attend, {"q": (1, 6, 2, 16), "idx": (1, 5)}, r"seq_idx is \(1, 5\)"),
    (scan, {"dt": (1, 5, 2)}, r"dt \(1, 5, 2\)"),
    (scan, {"B": (1, 4, G, N), "C": (1, 4, G, N)}, r"B \(1, 4, 2, 16\)"),
    (scan, {"C": (1, 5, G, 2 * N)}, r"C \(1, 5, 2, 32\)"),
    (scan, {"B": (1, 5, 3, N), "C": (1, 5, 3, N)}, "3 groups"),
    (scan, {"B": (1, 5, 0, N), "C": (1, 5, 0, N)}, "0 groups"),
    (scan, {"A": (1,)}, "each of 4 heads"),
    (scan, {"idx": (1, 4)}, r"seq_idx is \(1, 4\)"),
    (scan, {"state": (1, H, N, P + 1)}, r"state is \(1, 4, 16, 17\)"),
    (scan_step, {"dt": (2, 1)}, r"ssd_step: .*dt \(2, 1\)"),
    (scan_step, {"B": (1, G, N), "C": (1, G, N)}, r"B \(1, 2, 16\)"),
    (scan_step, {"A": (1,)}, "each of 4 heads"),
    (scan_step, {"state": (1, H, P, N)}, r"state is \(1, 4, 16, 16\)"),
    (mix, {"lead": (5,)}, r"projected \(5, "),
    (mix, {"bias": (1,)}, r"conv_bias is \(1,\)"),
    (mix, {"idx": (5,)}, r"seq_idx is \(5,\)"),
    (mix, {"idx": (1, 4)}, r"seq_idx is \(1, 4\)"),
    (mix, {"weight": (8, 4)}, r"conv_weight is \(8, 4\)"),
    (mix, {"A": (1,)}, r"A_log is \(1,\)"),
    (mix, {"norm": (1,)}, r"norm_weight is \(1,\)"),
    (balance, {"top_k": 9}, "top_k=9 does not fit 8"),
    (balance, {"top_k": 0}, "top_k=0"),
    (balance, {"real": (5,)}, r"real \(5,\)"),
    (balance, {"scores": (5, 8)}, r"scores \(5, 8\)"),
    (choose, {"top_k": 5, "n_group": 4, "topk_group": 2}, "top_k=5.*hold 4 of 8"),
    (choose, {"n_group": 0}, "n_group=0"),
    (choose, {"weight": (8, 12)}, r"weight \(8, 12\)"),
    (choose, {"bias": (1,)}, r"bias \(1,\)"),
    (choose, {"x": (1, 5, 16)}, r"x \(1, 5, 16\)"),
    (update, {"first": CODES[0], "second": WIDE[1]}, "with a scale"),
    (update, {"first": WIDE[0], "second": CODES[1]}, "with a scale"),
    (update, {"first": CODES[1], "second": CODES[0]}, "torch.uint8 and torch.int8"),
    (update, {"first": Moment(CODES[0].data), "second": Moment(CODES[1].data)}, "torch.int8 and torch.uint8"),
    (update, {"first": WIDE[0], "second": WIDE[1], "gradient": (2, 31)}, r"gradient \(2, 31\)"),
    (update, {"first": WIDE[0], "second": WIDE[1], "weight": (2, 4, 8)}, r"weight \(2, 4, 8\)"),
    (update, {"first": WIDE[0], "second": WIDE[1], "clip": (2,)}, r"clip \(2,\)"),
    (update, {"first": CODES[0], "second": CODES[1], "block": 32}, r"first.scale \(2, 2\)"),
    (mlp, {"weights": (5, 1)}, r"weights \(5, 1\)"),
    (mlp, {"ids": (4, 2), "weights": (4, 2)}, r"experts_TK \(4, 2\)"),
    (mlp, {"counts": (4,)}, r"counts \(4,\)"),
    (mlp, {"weights": (5, 1), "f": adapted_experts}, r"weights \(5, 1\)"),
    (mlp, {"x": (5, 8), "f": adapted_experts}, r"x \(5, 8\)"),
    (mlp, {"rows": 11, "f": adapted_experts}, "rows=11"),
    (ordered, {"weights": (4,)}, r"row_weights \(4,\)"),
    (ordered, {"counts": (2,)}, r"counts \(2,\)"),
    (lose, {"x": (5, 2, 8)}, r"x \(5, 2, 8\)"),
    (lose, {"labels": (5, 1), "token_weight": (5, 1)}, r"labels \(5, 1\)"),
    (convolve_step, {"bias": (1,)}, "bias"),
    (convolve_step, {"window": (1, 4, 8)}, r"window \(1, 4, 8\)"),
]


@pytest.mark.parametrize(("f", "given", "match"), MISTAKES, ids=[f"{f.__name__}-{m}" for f, _, m in MISTAKES])
def test_what_does_not_fit_is_refused(f: Callable, given: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        f(**given)


def test_what_fits_is_not_refused() -> None:
    """The calls that the mistakes above are changes of."""
    for f in (attend, scan, scan_step, balance, choose, mlp, ordered, lose, convolve_step):
        f()
    for moments in (CODES, WIDE):
        update(*(Moment(*(None if t is None else t.clone() for t in m)) for m in moments))
    mlp(f=adapted_experts)


def test_vectors_beside_logits_are_checked() -> None:
    with pytest.raises(ValueError, match=r"vocabulary_statistics: .*labels \(4,\)"):
        vocabulary_statistics(ones(5, 8), zeros(4))
    for name in ("lse", "labels", "token_weight"):
        vectors = {"lse": ones(5), "labels": zeros(5), "token_weight": ones(5)}
        vectors[name] = vectors[name][:4]
        with pytest.raises(ValueError, match=rf"vocabulary_gradient: .*{name} \(4,\)"):
            vocabulary_gradient(ones(5, 8), *vectors.values())
    with pytest.raises(ValueError, match=r"ids \(4,\)"):
        embedding_gradient_(ones(9, 8), zeros(4), ones(5, 8))
    codes, scales = fp8.quantise(ones(4, 200))
    with pytest.raises(ValueError, match=r"scales \(4, 1\)"):
        fp8.dequantise(codes, scales[:, :1], torch.float32)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_ids_of_no_expert_are_counted_nowhere(backend: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.tensor([[0, 8], [-1, 2], [9, 2], [1 << 20, -7], [7, 15]], device=device)
    assert expert_counts(ids, 8, backend).tolist() == [1, 0, 2, 0, 0, 0, 0, 1]
    assert expert_counts(ids[:0], 8, backend).tolist() == [0] * 8


def test_a_single_token_needs_no_axis() -> None:
    """x (in,) instead of (1, in), forward and backward, with and without a sink."""
    x, weight = torch.randn(8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    dy, sums = torch.randn(4), torch.zeros(4, 8)
    y = gradient_sink.linear(x, weight, Buffer(sums))
    y.backward(dy)
    torch.testing.assert_close(y, weight @ x)
    torch.testing.assert_close(sums, torch.outer(dy, x).detach())
    torch.testing.assert_close(x.grad, (dy @ weight).detach())

    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    y = adapted_linear(x, weight.detach(), A, B, 0.5)
    torch.testing.assert_close(y, (weight + 0.5 * B @ A) @ x)
    y.backward(dy)
    torch.testing.assert_close(B.grad, 0.5 * torch.outer(dy, A @ x).detach())

    table, sums = torch.randn(9, 8, requires_grad=True), torch.zeros(9, 8)
    embedding(torch.tensor(3), table, Buffer(sums)).sum().backward()
    assert sums.sum(1).tolist() == [0, 0, 0, 8, 0, 0, 0, 0, 0]

"""linear_cross_entropy: losses and both gradients against float64, whole and with the vocabulary split over ranks."""

import itertools

import pytest
import torch
from torch import Tensor

import kernels.cross_entropy as module
from kernels._common import INTERPRET, triton
from kernels.cross_entropy import (
    IGNORE,
    combine_statistics,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    vocabulary_gradient,
    vocabulary_statistics,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            triton is None or not (INTERPRET or torch.cuda.is_available()), reason="needs CUDA or TRITON_INTERPRET=1"
        ),
    ),
]


def relative_error(got: Tensor, truth: Tensor) -> float:
    assert torch.isfinite(got).all()
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and empty_like hand out NaN, so that an element nobody writes shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


def problem(T: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(T + 31 * D + V)
    x, weight = torch.randn(T, D, device=DEVICE), torch.randn(V, D, device=DEVICE) * D**-0.5
    labels = torch.randint(V, (T,), device=DEVICE)
    labels[::5] = IGNORE
    labels[-1] = V - 1
    token_weight = torch.rand(T, device=DEVICE) + 0.1
    return x.to(dtype), weight.to(dtype), labels, token_weight


def gradients(f, x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, dtype: torch.dtype, **kwargs):
    """Losses, total, dx and dweight for an upstream gradient of 0.75."""
    x, weight = (t.to(dtype, copy=True).requires_grad_() for t in (x, weight))
    total, losses = f(x, weight, labels, token_weight.double() if dtype == torch.float64 else token_weight, **kwargs)
    return [losses, total, *torch.autograd.grad(total * 0.75, (x, weight))]


# fp32 sums of at most a few hundred terms against float64: about 1e-7 each, 1e-6 after the sums.
FP32 = 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("T", "D", "V", "chunk"), [(1, 16, 5, 4), (7, 24, 130, 3), (19, 48, 257, 8), (6, 16, 1024, 64), (3, 8, 33000, 2)]
)
def test_losses_and_gradients_match_float64(poisoned_empty, backend: str, T: int, D: int, V: int, chunk: int) -> None:
    args = problem(T, D, V)
    truth = gradients(linear_cross_entropy_reference, *args, torch.float64)
    got = gradients(linear_cross_entropy, *args, torch.float32, chunk=chunk, backend=backend)
    for name, a, b in zip(("losses", "total", "dx", "dweight"), got, truth, strict=True):
        assert relative_error(a, b) < FP32, name
    assert (got[0][args[2] == IGNORE] == 0).all()
    assert (got[2][args[2] == IGNORE] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_and_ignored_rows_stay_finite(backend: str) -> None:
    x, weight, labels, token_weight = problem(6, 16, 300)
    token_weight[labels == IGNORE] = torch.nan  # the weight of a token without a loss may be anything
    args = (x * 300, weight, labels, token_weight)
    truth = gradients(linear_cross_entropy_reference, *args, torch.float64)
    got = gradients(linear_cross_entropy, *args, torch.float32, backend=backend)
    for a, b in zip(got, truth, strict=True):
        assert relative_error(a, b) < 1e-4  # logits near 1000 carry an absolute error of 6e-5 in fp32


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_ignored(backend: str) -> None:
    x, weight, labels, token_weight = problem(3, 16, 40)
    labels.fill_(IGNORE)
    for t in gradients(linear_cross_entropy, x, weight, labels, token_weight, torch.float32, backend=backend):
        assert (t == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_gives_the_same_losses_without_gradients(backend: str) -> None:
    x, weight, labels, token_weight = problem(7, 16, 90)
    expected = linear_cross_entropy_reference(x.double(), weight.double(), labels, token_weight.double())
    with torch.no_grad():
        total, losses = linear_cross_entropy(x, weight.requires_grad_(), labels, token_weight, backend=backend)
    assert not total.requires_grad
    assert relative_error(total, expected[0]) < FP32
    assert relative_error(losses, expected[1]) < FP32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_wanted_gradient(backend: str, frozen: str) -> None:
    x, weight, labels, token_weight = problem(7, 16, 90)
    truth = dict(
        zip(
            ("weight", "x"),
            gradients(linear_cross_entropy_reference, x, weight, labels, token_weight, torch.float64)[:1:-1],
            strict=True,
        )
    )
    free = {"x": weight, "weight": x}[frozen].requires_grad_()
    linear_cross_entropy(x, weight, labels, token_weight, backend=backend)[0].mul(0.75).backward()
    assert relative_error(free.grad, truth["weight" if frozen == "x" else "x"]) < FP32


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradient_is_added_into_a_given_buffer(backend: str) -> None:
    x, weight, labels, token_weight = problem(11, 16, 70)
    truth = gradients(linear_cross_entropy_reference, x, weight, labels, token_weight, torch.float64)
    buffer = torch.full_like(weight, 0.5)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    total, _ = linear_cross_entropy(x, weight, labels, token_weight, chunk=4, weight_grad=buffer, backend=backend)
    total.backward()
    assert weight.grad is None
    assert relative_error(buffer - 0.5, truth[3] / 0.75) < FP32
    assert relative_error(x.grad, truth[2] / 0.75) < FP32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(0, 60, 130), (0, 1, 40, 41, 130)])
def test_vocabulary_split_over_ranks(backend: str, cuts: tuple[int, ...]) -> None:
    """Each slice gives its statistics; combined, they give the loss and each slice's gradient of the whole."""
    x, weight, labels, token_weight = problem(9, 16, 130)
    truth = gradients(linear_cross_entropy_reference, x, weight, labels, token_weight, torch.float64)
    slices = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    parts = torch.stack([vocabulary_statistics(x @ weight[s].T, labels, s.start, backend) for s in slices])
    lse, at_label = combine_statistics(parts)
    assert relative_error((lse - at_label).where(labels != IGNORE, 0), truth[0]) < FP32
    dx, dw = torch.zeros_like(x), []
    for s in slices:
        dlogits = vocabulary_gradient((x @ weight[s].T), lse, labels, token_weight, s.start, backend)
        dx += dlogits @ weight[s]
        dw.append(dlogits.T @ x)
    assert relative_error(dx * 0.75, truth[2]) < FP32
    assert relative_error(torch.cat(dw) * 0.75, truth[3]) < FP32

    # The operator itself, with a gather that stands for the other ranks: it sees the same statistics of every chunk.
    total_dx = torch.zeros_like(x)
    for s in slices:

        def gather(mine: Tensor, s: slice = s) -> Tensor:
            assert torch.equal(mine, parts[slices.index(s)])
            return parts

        leaves = [x.clone().requires_grad_(), weight[s].clone().requires_grad_()]
        total, losses = linear_cross_entropy(
            *leaves, labels, token_weight, vocab_offset=s.start, gather=gather, backend=backend
        )
        dx, dw = torch.autograd.grad(total, leaves)
        total_dx += dx
        assert relative_error(losses, truth[0]) < FP32
        assert relative_error(total, truth[1]) < FP32
        assert relative_error(dw * 0.75, truth[3][s]) < FP32
    assert relative_error(total_dx * 0.75, truth[2]) < FP32


@pytest.mark.skipif(
    triton is None or not INTERPRET, reason="needs TRITON_INTERPRET=1; the GPU case below runs it in bf16"
)
@pytest.mark.parametrize("programs", [3, 4, 64])
@pytest.mark.parametrize(("a_t", "b_t", "add"), [(False, True, False), (False, False, False), (True, False, True)])
def test_products(monkeypatch, programs: int, a_t: bool, b_t: bool, add: bool) -> None:
    """The three layouts; 4 tiles on 3 programs leave one over, which is then cut along K."""
    from kernels import cross_entropy_product as product

    monkeypatch.setattr(product, "SHORTEST", 1)
    torch.manual_seed(0)
    M, N, K = 132, 260, 200
    a, b, c = torch.randn(M, K), torch.randn(K, N), torch.randn(M, N)
    truth = a.double() @ b.double() + (c.double() if add else 0)
    a, b = a.T.contiguous() if a_t else a, b.T.contiguous() if b_t else b
    assert relative_error(product.multiply_(c, a, b, a_t, b_t, add, programs), truth) < FP32


def test_mistakes_are_named() -> None:
    x, weight, labels, token_weight = problem(4, 8, 16)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(x, weight, labels[:3], token_weight)
    with pytest.raises(ValueError, match="weight_grad"):
        linear_cross_entropy(x, weight, labels, token_weight, weight_grad=x)
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(x, weight, labels, token_weight, chunk=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_pass(backend: str) -> None:
    """PyTorch's path scales a copy every time; the kernels give their only one away, and say so when asked again."""
    x, weight, labels, token_weight = problem(4, 8, 16)
    total, _ = linear_cross_entropy(x.requires_grad_(), weight, labels, token_weight, backend=backend)
    total.backward(retain_graph=True)
    first = x.grad.clone()
    if backend == "torch":
        total.backward()
        assert torch.equal(x.grad, 2 * first)
    else:
        with pytest.raises(RuntimeError, match="without a copy"):
            total.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("own", [set(), {"logits", "dx", "dw"}], ids=["cuBLAS", "own products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("T", "V"), [(1, 131072), (63, 131072), (127, 1000), (129, 50257), (4097, 32768)])
def test_on_the_gpu(poisoned_empty, monkeypatch, own: set[str], dtype: torch.dtype, T: int, V: int) -> None:
    """fp32 within 1e-5 of float64; bf16 at most twice as far as PyTorch in bf16; two runs alike to the bit."""
    monkeypatch.setattr(module, "OWN_PRODUCTS", frozenset(own))
    args = problem(T, 512, V, dtype)
    truth = gradients(linear_cross_entropy_reference, *args, torch.float64)
    eager = gradients(linear_cross_entropy_reference, *args, dtype)
    got = gradients(linear_cross_entropy, *args, dtype, backend="triton")
    again = gradients(linear_cross_entropy, *args, dtype, backend="triton")
    for name, a, b, e, t in zip(("losses", "total", "dx", "dweight"), got, again, eager, truth, strict=True):
        assert torch.equal(a, b), name
        bound = FP32 if dtype == torch.float32 else 2 * relative_error(e, t) + 1e-6
        assert relative_error(a, t) <= bound, name

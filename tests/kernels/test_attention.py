"""attention: the output and every gradient against float64, causal, packed, after a cache and decoding."""

import pytest
import torch
from torch import Tensor

import kernels.attention as module
from kernels._common import INTERPRET, triton
from kernels.attention import attention, attention_reference

if triton is not None:
    from kernels import attention_backward as backward
    from kernels import attention_forward as forward

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

# fp32 dot products of at most 256 terms and a softmax, against float64: 1e-6 after the backward's products of products.
FP32 = 1e-5


def relative_error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    assert torch.isfinite(got).all()
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


def errors(got: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Relative errors of output, dq, dk, dv.  Zero gradients (each query sees itself alone): on dv's scale."""
    scale = truth[3].double().norm()
    pairs = zip(("y", "dq", "dk", "dv"), got, truth, strict=True)
    return {n: relative_error(a, b) if b.any() else (a.double().norm() / scale).item() for n, a, b in pairs}


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and empty_like hand out NaN, so that an element nobody writes shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


def problem(Sq: int, Skv: int, Hq: int, Hkv: int, D: int, B: int = 1, dtype: torch.dtype = torch.float32):
    """q, k, v as slices of one row of projections, as the model has them, and the gradient of the output."""
    torch.manual_seed(Sq + 7 * Skv + 100 * Hq + D)
    q = torch.randn(B, Sq, (Hq + 3) * D, device=DEVICE)[..., D : (Hq + 1) * D].unflatten(-1, (Hq, D))
    k, v = torch.randn(B, Skv, 2 * Hkv * D, device=DEVICE).unflatten(-1, (2 * Hkv, D)).chunk(2, dim=2)
    return [t.to(dtype) for t in (q, k, v, torch.randn(B, Sq, Hq, D, device=DEVICE))]


def documents(*rows: list[int]) -> Tensor:
    """Document ids from lengths: [2, 3] -> 0 0 1 1 1."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in rows]).to(DEVICE)


def run(f, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dtype: torch.dtype, **kwargs) -> list[Tensor]:
    """Output and the three gradients.  The views keep their strides."""
    leaves = [t.detach() if t.dtype == dtype else t.to(dtype) for t in (q, k, v)]
    leaves = [t.requires_grad_() for t in leaves]
    y = f(*leaves, **kwargs)
    return [y, *torch.autograd.grad(y, leaves, do.to(dtype))]


def check(backend: str, args: list[Tensor], **kwargs) -> None:
    truth = run(attention_reference, *args, torch.float64, **kwargs)
    got = run(attention, *args, torch.float32, backend=backend, **kwargs)
    found = errors(got, truth)
    assert all(e < FP32 for e in found.values()), found  # NaN fails too


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("S", "Hq", "Hkv", "D"),
    [(1, 2, 1, 16), (33, 4, 2, 16), (63, 2, 2, 32), (129, 2, 1, 16), (40, 3, 1, 24), (17, 6, 2, 64), (20, 2, 1, 80)],
)
def test_causal(poisoned_empty, backend: str, S: int, Hq: int, Hkv: int, D: int) -> None:
    check(backend, problem(S, S, Hq, Hkv, D, B=2 if S < 40 else 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("Sq", "Skv"), [(1, 5), (3, 70), (34, 35), (31, 100), (65, 131)])
def test_queries_after_a_cache(poisoned_empty, backend: str, Sq: int, Skv: int) -> None:
    check(backend, problem(Sq, Skv, 4, 2, 16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows",
    [
        [[20, 30]],
        [[1, 1, 1, 62], [65]],
        [[64, 33, 32]],
        [[1] * 40],
        [[5, 100, 3, 22]],
        [[31, 1, 32, 96, 7]],
    ],
    ids=lambda rows: "+".join(map(str, rows[0][:5])),
)
def test_packed_documents_do_not_see_each_other(poisoned_empty, backend: str, rows: list[list[int]]) -> None:
    S = sum(rows[0])
    seq_idx = documents(*rows) * 3 + 5  # ids need not begin at 0 or be neighbours
    check(backend, problem(S, S, 4, 2, 16, B=len(rows)), seq_idx=seq_idx)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_packing_equals_separate_documents(backend: str, ids: torch.dtype) -> None:
    q, k, v, _ = problem(50, 50, 2, 1, 16)
    packed = attention(q, k, v, documents([18, 32]).to(ids), backend=backend)
    alone = [attention(*(t[:, part] for t in (q, k, v)), backend=backend) for part in (slice(0, 18), slice(18, 50))]
    assert relative_error(packed, torch.cat(alone, 1)) < FP32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("Skv", "Hq", "Hkv", "D", "B"), [(1, 2, 1, 16, 1), (37, 4, 2, 24, 3), (700, 32, 2, 16, 1)])
def test_decoding_step(poisoned_empty, backend: str, Skv: int, Hq: int, Hkv: int, D: int, B: int) -> None:
    q, k, v, _ = problem(1, Skv + 9, Hq, Hkv, D, B=B)
    k, v = (t[:, :Skv] for t in (k, v))  # a cache that is not full
    truth = attention_reference(q.double(), k.double(), v.double())
    assert relative_error(attention(q, k, v, backend=backend), truth) < FP32


@pytest.mark.skipif(
    triton is None or not INTERPRET, reason="needs TRITON_INTERPRET=1; on a GPU the benchmark checks tiles"
)
@pytest.mark.parametrize(
    ("M", "N", "defer"), [(32, 16, False), (16, 32, False), (32, 16, True), (16, 64, True), (64, 16, True)]
)
@pytest.mark.parametrize("lengths", [None, [3, 40, 1, 38, 15]], ids=["whole", "packed"])
def test_tiles_of_other_shapes(
    poisoned_empty, monkeypatch, M: int, N: int, defer: bool, lengths: list[int] | None
) -> None:
    """bf16 runs with other tiles than fp32; their runs of masked and unmasked blocks are cut elsewhere."""
    for file, name in ((forward, "FORWARD_TILE"), (backward, "QUERY_TILE"), (backward, "KEY_TILE")):
        monkeypatch.setitem(getattr(file, name), "fp32", forward.Tile(M, N, 4, 1, defer))
    check("triton", problem(97, 97, 2, 1, 16), seq_idx=None if lengths is None else documents(lengths))
    if lengths is None:
        check("triton", problem(35, 97, 2, 1, 16))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_finite(backend: str, sign: int) -> None:
    """Scores near 2000, or -2000, of which 1e-4 is lost in fp32.  What differs between them is as usual, so that no
    gradient is nothing but what rounding leaves of it; but for the feature that all share, where it is."""
    q, k, v, do = problem(40, 40, 2, 1, 16)
    q, k = q.clone(), k.clone()
    q[..., 0], k[..., 0] = 80, 100 * sign
    truth = run(attention_reference, q, k, v, do, torch.float64)
    got = run(attention, q, k, v, do, torch.float32, backend=backend)
    assert all(t.isfinite().all() for t in got)
    for i in (1, 2):
        got[i], truth[i] = got[i][..., 1:], truth[i][..., 1:]
    for e in errors(got, truth).values():
        assert e < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_strange_layout(backend: str) -> None:
    """The output's gradient may be an expanded view, which no descriptor can read."""
    q, k, v, do = problem(20, 20, 2, 1, 16)
    check(backend, [q, k, v, do[:, :1, :1, :1].expand_as(do)])


def test_a_head_of_odd_width_falls_back() -> None:
    check("auto", problem(9, 9, 2, 1, 5))


def test_heads_are_dealt_to_programs() -> None:
    if triton is None:
        pytest.skip("needs triton")
    parts_of = backward.parts_of
    assert [parts_of(16, n) for n in (128, 512, 40, 1)] == [4, 1, 16, 16]
    assert parts_of(6, 256) == 2
    assert parts_of(1, 1) == 1


def test_mistakes_are_named() -> None:
    q, k, v, _ = problem(4, 6, 3, 1, 16)
    with pytest.raises(ValueError, match="multiple"):
        attention(q, k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1))
    with pytest.raises(ValueError, match="as many queries"):
        attention(q, k, v, torch.zeros(1, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="backend"):
        attention(q, k, v, backend="cudnn")


GPU_CASES = {
    **{f"S{S}": ((S, S, 32, 2, 128), None) for S in (1, 63, 127, 129, 4097)},
    "d64": ((257, 257, 8, 2, 64), None),
    "d80": ((129, 129, 4, 4, 80), None),
    "prefill": ((129, 1000, 32, 2, 128), None),
    "packed": ((1000, 1000, 32, 2, 128), [1, 63, 127, 129, 500, 180]),
    "alone": ((300, 300, 8, 2, 128), [1] * 300),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_on_the_gpu(poisoned_empty, case: str, dtype: torch.dtype) -> None:
    """fp32 within 1e-5 of float64; bf16 at most twice as far as PyTorch in bf16; two runs alike to the bit."""
    (Sq, Skv, Hq, Hkv, D), lengths = GPU_CASES[case]
    if Sq > 4000:
        Hq = 4  # the float64 reference holds every score
    args = problem(Sq, Skv, Hq, Hkv, D, dtype=dtype)
    kwargs = {} if lengths is None else {"seq_idx": documents(lengths)}
    truth = run(attention_reference, *args, torch.float64, **kwargs)
    eager = run(attention, *args, dtype, backend="torch", **kwargs)
    got, again = (run(attention, *args, dtype, backend="triton", **kwargs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    budget = errors(eager, truth)
    for name, e in errors(got, truth).items():
        assert e <= (FP32 if dtype == torch.float32 else 2 * budget[name] + 1e-6), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_is_the_constant_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = problem(64, 64, 4, 2, 64, dtype=torch.bfloat16)
    for name in ("torch", "triton"):
        monkeypatch.setattr(module, "AUTO_ON_CUDA", name)
        assert torch.equal(attention(q, k, v), attention(q, k, v, backend=name))

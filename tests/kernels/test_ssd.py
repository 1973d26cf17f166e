"""The SSD kernels against the float64 formula: forward, final state and every gradient; the decode step."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from kernels.ssd import ssd, ssd_recurrence, ssd_reference, ssd_step
from tests.kernels.conftest import relative_error

NAMES = ("y", "final state", "dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias", "dinitial_state")


@dataclass(frozen=True)
class Shape:
    Bt: int = 1
    S: int = 70
    H: int = 4
    P: int = 16
    G: int = 2
    N: int = 16
    documents: tuple[int, ...] | None = None  # lengths, the same in every row; the last one takes what is left
    initial: bool = True
    limit: tuple[float, float] = (0.0, torch.inf)
    decay: tuple[float, float] = (0.1, 2.0)  # range of -A
    views: bool = False  # x, B and C as parts of one tensor, dt of another, as in the model

    def __str__(self) -> str:
        shown = [f"{k}{v}" for k, v in vars(self).items() if v != Shape.__dataclass_fields__[k].default]
        return "-".join(shown) or "default"


@dataclass
class Inputs:
    """Leaves of one dtype; `views` are what the operator is called with."""

    leaves: list[Tensor]
    arguments: list[Tensor]
    initial: Tensor | None
    seq_idx: Tensor | None
    shape: Shape = field(repr=False)

    def run(self, f, dy: Tensor | None, dlast: Tensor | None) -> list[Tensor]:
        y, last = f(*self.arguments, 32, self.shape.limit, self.seq_idx, self.initial)
        wanted = [*self.arguments, *([] if self.initial is None else [self.initial])]
        outputs, grads = zip(*((o, g) for o, g in ((y, dy), (last, dlast)) if g is not None), strict=True)
        grads = [g.to(o.dtype) for o, g in zip(outputs, grads, strict=True)]
        gradients = torch.autograd.grad(outputs, wanted, grads, materialize_grads=True)
        return [y.detach(), last.detach(), *gradients]


def draw(s: Shape, device: str) -> dict[str, Tensor | None]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    low, high = s.decay
    lengths = [] if s.documents is None else [*s.documents, s.S - sum(s.documents)]
    idx = [i for i, length in enumerate(lengths) for _ in range(length)]
    return {
        "xBC": normal(s.Bt, s.S, s.H * s.P + 2 * s.G * s.N),
        "dt": normal(s.Bt, s.S, s.H),
        "A": -(torch.rand(s.H, device=device) * (high - low) + low),
        "D": normal(s.H),
        "bias": normal(s.H),
        "initial": normal(s.Bt, s.H, s.P, s.N) if s.initial else None,
        "idx": torch.tensor(idx, device=device).expand(s.Bt, -1) if idx else None,
        "dy": normal(s.Bt, s.S, s.H, s.P),
        "dlast": normal(s.Bt, s.H, s.P, s.N),
    }


def inputs(s: Shape, drawn: dict[str, Tensor | None], dtype: torch.dtype, via: torch.dtype) -> Inputs:
    """What `drawn` is in `dtype`, rounded to `via` before: the float64 truth sees the numbers that the kernel sees."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(via).to(dtype)

    xBC, dt, A, D, bias = (cast(drawn[k]) for k in ("xBC", "dt", "A", "D", "bias"))
    initial = None if drawn["initial"] is None else drawn["initial"].to(torch.promote_types(dtype, torch.float32))
    if s.views:
        dt = torch.cat([torch.zeros_like(xBC[..., : 16 + s.H]), dt], dim=-1)[..., -s.H :]
    x, B, C = xBC.split([s.H * s.P, s.G * s.N, s.G * s.N], dim=-1)
    x, B, C = x.unflatten(-1, (s.H, s.P)), B.unflatten(-1, (s.G, s.N)), C.unflatten(-1, (s.G, s.N))
    if not s.views:
        x, B, C = x.contiguous(), B.contiguous(), C.contiguous()
    arguments = [t.detach().requires_grad_() for t in (x, dt, A, B, C, D, bias)]
    return Inputs(arguments, arguments, None if initial is None else initial.requires_grad_(), drawn["idx"], s)


def kernel(*arguments):
    return ssd(*arguments, backend="triton")


def one_rounding(dtype: torch.dtype) -> float:
    """The relative error of rounding many numbers to dtype: 1.7e-3 for bf16."""
    many = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return relative_error(many.to(dtype), many)


def check(s: Shape, device: str, dtype: torch.dtype, y_grad: bool = True, last_grad: bool = True) -> None:
    drawn = draw(s, device)
    dy = drawn["dy"].to(dtype) if y_grad else None
    dlast = drawn["dlast"] if last_grad else None
    ours = inputs(s, drawn, dtype, dtype).run(kernel, dy, dlast)
    eager = inputs(s, drawn, dtype, dtype).run(ssd_reference, dy, dlast)
    truth = inputs(s, drawn, torch.float64, dtype).run(ssd_reference, dy, dlast)
    for name, a, b, t in zip(NAMES, ours, eager, truth, strict=False):
        assert a.dtype == b.dtype, name
        error = relative_error(a, t)
        if dtype == torch.float32:
            # Sums of a few hundred fp32 terms and of decays up to about 100: 1e-6, and room for luck.  Where decays are
            # in the thousands, or a sum over the row cancels (dA), fp32 has fewer digits left: no further than eager.
            limit = max(1e-5, relative_error(b, t))
        else:
            # Eager computes in fp32 and rounds its result once.  The kernel rounds operands of its products too, as
            # every bf16 product does, and the states between chunks.  Twice one rounding bounds fp32 results as well,
            # and gradients of a few numbers (dA), of which eager's may by luck be rounded twice as well as on average.
            limit = 2 * max(relative_error(b, t), one_rounding(dtype))
        assert error <= limit, f"{name}: relative error {error:.1e} > {limit:.1e}"


CASES = [
    Shape(),
    Shape(S=1, initial=False),
    Shape(S=1),
    Shape(S=32, H=2, G=1),
    Shape(S=33, H=3, G=3),
    Shape(Bt=2, S=47, documents=(5, 1, 20)),
    Shape(S=40, H=2, documents=(1,) * 39),
    Shape(S=40, H=2, documents=(15, 1, 16), initial=False),
    Shape(S=50, H=2, documents=(32,)),
    Shape(S=37, P=24, N=20, G=1),
    Shape(S=34, P=5, N=3, H=2, G=1),
    Shape(S=40, limit=(0.5, 1.0)),
    Shape(S=66, decay=(20.0, 40.0), H=2, G=1),
    Shape(S=66, decay=(1e-4, 1e-3), H=2, G=1),
    Shape(Bt=2, S=40, views=True),
    Shape(S=20, H=20, G=4, views=True),
]


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_fp32_kernel_agrees_with_float64(shape: Shape, device: str) -> None:
    check(shape, device, torch.float32)


@pytest.mark.parametrize(("y_grad", "last_grad"), [(True, False), (False, True)])
@pytest.mark.usefixtures("poisoned_empty")
def test_gradient_of_one_output_alone(y_grad: bool, last_grad: bool, device: str) -> None:
    check(Shape(S=40, H=2), device, torch.float32, y_grad, last_grad)


@pytest.mark.parametrize("S", [1, 40])
def test_what_decays_over_a_chunk_is_not_rounded(S: int, device: str) -> None:
    """With x = 0 and the last state alone in the loss, dA is the inner product of a state and its gradient, of chunk
    after chunk.  Either of them rounded to bf16 would give an error of 1e-3; two pieces of bf16 hold 16 bits."""
    shape = Shape(S=S, decay=(0.01, 0.1))
    drawn = draw(shape, device)
    drawn["xBC"].zero_()
    narrow, truth = (inputs(shape, drawn, dtype, torch.bfloat16) for dtype in (torch.bfloat16, torch.float64))
    arguments = [*narrow.arguments]
    for i in (1, 2, 6):  # dt, A and its bias: what comes back is not to be rounded either
        arguments[i] = arguments[i].detach().float().requires_grad_()
    last = kernel(*arguments, 32, shape.limit, None, narrow.initial)[1]
    ours = torch.autograd.grad(last, arguments[2], drawn["dlast"].to(last.dtype))[0]
    exact = truth.run(ssd_reference, None, drawn["dlast"])[NAMES.index("dA")]
    assert relative_error(ours, exact) < 2e-5


def test_chunked_reference_is_the_recurrence() -> None:
    s = Shape(Bt=2, S=21, documents=(4, 9))
    drawn = draw(s, "cpu")
    x, dt, A, B, C, D, bias = inputs(s, drawn, torch.float64, torch.float64).arguments
    initial = drawn["initial"].double()
    chunked = ssd_reference(x, dt, A, B, C, D, bias, 8, s.limit, drawn["idx"], initial)
    stepwise = ssd_recurrence(x, dt, A, B, C, D, bias, s.limit, drawn["idx"], initial)
    for a, b in zip(chunked, stepwise, strict=True):
        assert relative_error(a, b) < 1e-12


def test_result_does_not_depend_on_chunk(device: str) -> None:
    s = Shape(S=20, H=2)
    arguments = inputs(s, draw(s, device), torch.float32, torch.float32).arguments
    runs = [ssd(*arguments, chunk, backend="triton") for chunk in (4, 128)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("limit", [(0.0, torch.inf), (0.3, 0.9)])
@pytest.mark.parametrize(("Bt", "H", "P", "G", "N"), [(2, 4, 16, 2, 16), (1, 3, 10, 1, 7)])
@pytest.mark.usefixtures("poisoned_empty")
def test_step_agrees_with_recurrence(Bt: int, H: int, P: int, G: int, N: int, limit: tuple, device: str) -> None:
    s = Shape(Bt, 1, H, P, G, N, limit=limit)
    drawn = draw(s, device)
    with torch.no_grad():

        def run(dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
            x, dt, A, B, C, D, bias = inputs(s, drawn, dtype, torch.float32).arguments
            state = drawn["initial"].to(dtype)
            return ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, bias, limit, backend)

        for ours, truth in zip(run(torch.float32, "triton"), run(torch.float64, "torch"), strict=True):
            assert relative_error(ours, truth) < 1e-6  # one token: a handful of roundings


def test_step_is_differentiable(device: str) -> None:
    s = Shape(S=1)
    drawn = draw(s, device)
    x, dt, A, B, C, D, bias = inputs(s, drawn, torch.float32, torch.float32).arguments
    y, state = ssd_step(drawn["initial"], x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, bias)
    assert torch.isfinite(torch.autograd.grad(y.sum() + state.sum(), x)[0]).all()


def test_what_the_kernel_does_not_cover_runs_in_pytorch(device: str) -> None:
    s = Shape(S=5, H=2, G=1)
    x, dt, A, B, C, D, bias = inputs(s, draw(s, device), torch.float32, torch.float32).arguments
    wide = torch.randn(1, 5, 1, 300, device=device)
    y, state = ssd(x, dt, A, wide, wide, D, bias, 4)
    assert (y.shape, state.shape) == ((1, 5, 2, 16), (1, 2, 16, 300))
    y, _ = ssd(x, dt, A, B.double(), C, D, bias, 4)
    assert y.dtype == torch.float32


def test_wrong_arguments_are_refused() -> None:
    s = Shape(S=5, H=2, G=1)
    x, dt, A, B, C, D, bias = inputs(s, draw(s, "cpu"), torch.float32, torch.float32).arguments
    with pytest.raises(ValueError, match="backend"):
        ssd(x, dt, A, B, C, D, bias, 4, backend="cuda")
    with pytest.raises(ValueError, match="groups"):
        ssd(x, dt, A, B.expand(-1, -1, 3, -1), C.expand(-1, -1, 3, -1), D, bias, 4)
    with pytest.raises(ValueError, match="empty"):
        ssd(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0], D, bias, 4)


NANO = {"H": 64, "P": 64, "G": 8, "N": 128, "views": True}
GPU_CASES = [
    *(Shape(S=S, **NANO) for S in (1, 63, 127, 128, 129, 1000)),
    Shape(Bt=2, S=300, documents=(100, 28, 1, 3, 130), **NANO),
    Shape(S=257, documents=(1,) * 256, **NANO),
    Shape(S=4097, H=16, P=64, G=1, N=128, views=True),
    Shape(S=4097, H=16, P=64, G=8, N=128, documents=(4000,), initial=False, views=True),
    Shape(S=500, H=8, P=80, G=1, N=128, views=True),
    Shape(S=500, H=8, P=64, G=2, N=48),
    Shape(S=500, H=4, P=128, G=1, N=256),
    Shape(S=300, H=4, P=16, G=2, N=16),
    Shape(S=500, H=16, P=64, G=2, N=128, decay=(10.0, 20.0), initial=False),
    Shape(S=500, H=64, P=64, G=2, N=128, decay=(1e-4, 1e-3)),
    Shape(S=500, H=16, P=64, G=2, N=128, limit=(0.1, 1.0)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", GPU_CASES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_compiled_kernel(shape: Shape, dtype: torch.dtype) -> None:
    check(shape, "cuda", dtype)


@pytest.mark.gpu
def test_two_runs_are_bit_identical() -> None:
    s = Shape(Bt=2, S=1500, documents=(700,), **NANO)
    drawn = draw(s, "cuda")
    runs = [
        inputs(s, drawn, torch.bfloat16, torch.bfloat16).run(kernel, drawn["dy"].bfloat16(), drawn["dlast"])
        for _ in range(2)
    ]
    for name, a, b in zip(NAMES, *runs, strict=True):
        assert torch.equal(a, b), name

"""Router: scores, choice, weights, their gradients, and the tables that put rows in expert order."""

import pytest
import torch
from torch import Tensor

from kernels._common import triton
from kernels.routing import Routes, expert_counts, route, route_reference
from tests.kernels.conftest import assert_as_accurate, needs_triton, relative_error

if triton is not None:
    from kernels.permute import plan_reference, plan_rows, tiles_from_counts
    from kernels.routing_kernels import route_backward

# Sums of at most a few thousand fp32 products, rounded once each, err by a few 1e-7; 1e-5 is what issue 3 asks for.
FP32 = 1e-5
NAMES = ("scores", "weights", "dx", "dw")


def make(T: int, D: int, E: int, K: int, device: str) -> list[Tensor]:
    """x, w, bias, and gradients of scores and weights."""
    shapes = [(T, D), (E, D), (E,), (T, E), (T, K)]
    x, w, bias, dscores, dweights = (torch.randn(shape) for shape in shapes)
    return [t.to(device) for t in (x, w * D**-0.5, 0.1 * bias, 0.1 * dscores, dweights)]


def run(x: Tensor, w: Tensor, dscores: Tensor | None, dweights: Tensor | None, f) -> tuple[list[Tensor], Routes]:
    """Scores, weights, dx, dw of f; a gradient that is None does not enter the loss."""
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    r = f(*leaves)
    terms = [(r.scores_TE, dscores), (r.weights_TK, dweights)]
    loss = sum((y * dy.to(y.dtype)).sum() for y, dy in terms if dy is not None)
    return [r.scores_TE, r.weights_TK, *torch.autograd.grad(loss, leaves)], r


def given_choice(x: Tensor, w: Tensor, experts_TK: Tensor, norm: bool, scale: float) -> Routes:
    """The formula with the choice made already: experts that tie in fp32 need not tie in float64."""
    scores = torch.nn.functional.linear(x, w).sigmoid()
    weights = scores.gather(-1, experts_TK)
    return Routes(scores, scale * (weights / (weights.sum(-1, keepdim=True) + 1e-20) if norm else weights), experts_TK)


def check_choice(experts_TK: Tensor, select_TE: Tensor, slack: float = 1e-5) -> None:
    """K different experts, none more than rounding below the K best of select (float64, after group limits)."""
    K = experts_TK.shape[1]
    assert (experts_TK.sort(-1).values.diff(dim=-1) > 0).all()
    chosen = select_TE.gather(-1, experts_TK).sort(-1, descending=True).values
    assert ((select_TE.topk(K, dim=-1).values - chosen).abs() < slack).all()


def limited(select_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    if n_group == 1:
        return select_TE
    groups = select_TE.unflatten(-1, (n_group, -1))
    best = groups.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
    kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
    return groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("T", "D", "E", "K", "groups", "norm"),
    [
        (37, 40, 5, 3, (1, 1), True),
        (1, 16, 8, 1, (1, 1), True),
        (33, 75, 24, 6, (4, 2), True),
        (18, 33, 20, 5, (5, 3), False),
        (3, 16, 40, 22, (1, 1), True),
        (7, 20, 32, 5, (8, 4), True),
    ],
)
def test_route_is_the_formula(T: int, D: int, E: int, K: int, groups: tuple[int, int], norm: bool, device: str) -> None:
    x, w, bias, dscores, dweights = make(T, D, E, K, device)
    got, r = run(x, w, dscores, dweights, lambda x, w: route(x, w, bias, K, *groups, norm, 2.5, backend="triton"))
    double = [t.double() for t in (x, w, dscores, dweights)]
    truth, _ = run(*double, lambda x, w: given_choice(x, w, r.experts_TK, norm, 2.5))
    check_choice(r.experts_TK, limited(truth[0] + bias.double(), *groups))
    assert r.experts_TK.dtype == torch.int64
    for name, ours, true in zip(NAMES, got, truth, strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, true) < FP32, name


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("which", ["scores", "weights"])
def test_route_with_one_gradient_only(which: str, device: str) -> None:
    x, w, bias, dscores, dweights = make(20, 24, 12, 4, device)
    dscores, dweights = (dscores, None) if which == "scores" else (None, dweights)
    got, r = run(x, w, dscores, dweights, lambda x, w: route(x, w, bias, 4, scale=2.5, backend="triton"))
    double = [t if t is None else t.double() for t in (x, w, dscores, dweights)]
    truth, _ = run(*double, lambda x, w: given_choice(x, w, r.experts_TK, True, 2.5))
    for name, ours, true in zip(NAMES, got, truth, strict=True):
        assert relative_error(ours, true) < FP32, name


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_dx_of_bf16_is_rounded_once(device: str) -> None:
    """The gradient of the logits goes through bf16 in two pieces, which hold 16 bits of it; one would double the error
    of rounding dx itself (1.1: what is left of the second piece's rounding, and the luck of 2,000 numbers)."""
    x, w, bias, dscores, dweights = make(50, 40, 12, 4, device)
    double = [t.bfloat16().double() for t in (x, w)] + [dscores.double(), dweights.double()]
    chosen = route_reference(*double[:2], bias, 4).experts_TK
    (scores, _, truth, _), _ = run(*double, lambda x, w: given_choice(x, w, chosen, True, 2.5))
    saved = x.bfloat16(), w.bfloat16(), scores.detach().float(), chosen
    dx, _ = route_backward(dscores, dweights, *saved, True, 2.5, need_dx=True, need_dw=False)
    assert relative_error(dx, truth) < 1.1 * relative_error(truth.bfloat16(), truth)


@needs_triton
def test_route_reads_a_slice_in_place_and_breaks_ties_downwards(device: str) -> None:
    wide = torch.randn(9, 50, device=device)
    x, w = wide[:, 8:32], torch.randn(6, 24, device=device)
    bias = torch.zeros(6, device=device)
    assert (
        relative_error(route(x, w, bias, 2, backend="triton").scores_TE, route_reference(x, w, bias, 2).scores_TE)
        < FP32
    )
    same = route(x, torch.zeros_like(w), bias, 4, backend="triton").experts_TK
    assert same.tolist() == [[0, 1, 2, 3]] * 9


@needs_triton
def test_route_survives_nan(device: str) -> None:
    """Ids stay in range, whatever the scores are: a diverged run must end with a loss of NaN, not a wild address."""
    x = torch.full((5, 16), torch.nan, device=device)
    experts_TK = route(
        x, torch.ones(8, 16, device=device), torch.zeros(8, device=device), 3, backend="triton"
    ).experts_TK
    assert ((experts_TK >= 0) & (experts_TK < 8)).all()


def test_float64_takes_the_formula_and_bad_options_are_refused() -> None:
    x, w, bias = torch.randn(4, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64), torch.zeros(6)
    assert route(x, w, bias, 2).scores_TE.dtype == torch.float64
    with pytest.raises(ValueError, match="top_k=7"):
        route(x, w, bias, 7)
    with pytest.raises(ValueError, match="groups of 6"):
        route(x, w, bias, 2, n_group=4, topk_group=2)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("T", "K", "E"), [(1, 1, 1), (50, 3, 5), (130, 1, 7), (11, 22, 40), (64, 2, 3)])
def test_plan_is_a_stable_sort(T: int, K: int, E: int, device: str) -> None:
    experts_TK = torch.randint(E, (T, K)).to(device)
    experts_TK[experts_TK == 1] = 0  # an expert without rows
    counts = torch.bincount(experts_TK.flatten(), minlength=E)
    order, place = plan_reference(experts_TK)
    plan = plan_rows(experts_TK, E, 16)
    assert torch.equal(plan.order_R.long(), order)
    assert torch.equal(plan.place_TK.long(), place)
    assert torch.equal(expert_counts(experts_TK, E, backend="triton"), counts)
    ends = counts.cumsum(0).tolist()
    tiles = -(-counts // 16)
    for table in (plan.tiles, tiles_from_counts(counts, T * K, 16)):
        assert table.offsets_E1.tolist() == [0, *ends]
        assert table.tile_start_E1.tolist() == [0, *tiles.cumsum(0).tolist()]
        used = table.tile_expert[: int(tiles.sum())]
        assert torch.equal(used.long(), torch.arange(E, device=device).repeat_interleave(tiles))


@needs_triton
@pytest.mark.parametrize("expert", [0, 4])
def test_plan_with_all_rows_at_one_expert(expert: int, device: str) -> None:
    plan = plan_rows(torch.full((70, 2), expert, device=device), 5, 16)
    assert plan.order_R.tolist() == list(range(140))
    assert plan.tiles.offsets_E1.tolist() == [0] * (expert + 1) + [140] * (5 - expert)


@pytest.mark.gpu
@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("T", "D", "E", "K", "groups"),
    [
        (1, 2688, 128, 6, (1, 1)),
        (63, 2688, 128, 1, (1, 1)),
        (129, 1000, 72, 5, (1, 1)),
        (4097, 2688, 128, 22, (8, 4)),
        (8192, 2688, 128, 6, (1, 1)),
        (127, 4096, 512, 22, (1, 1)),
    ],
)
def test_route_on_the_gpu(
    T: int, D: int, E: int, K: int, groups: tuple[int, int], x_dtype: torch.dtype, w_dtype: torch.dtype
) -> None:
    x, w, bias, dscores, dweights = make(T, D, E, K, "cuda")
    x, w = x.to(x_dtype), w.to(w_dtype)
    (got, r), (again, r2) = (
        run(x, w, dscores, dweights, lambda x, w: route(x, w, bias, K, *groups, True, 2.5)) for _ in range(2)
    )
    for a, b in zip([*got, r.experts_TK], [*again, r2.experts_TK], strict=True):
        assert torch.equal(a, b)

    def formula(dtype: torch.dtype):
        def f(x: Tensor, w: Tensor) -> Routes:
            scores = torch.nn.functional.linear(x.to(dtype), w.to(dtype)).sigmoid()
            weights = scores.gather(-1, r.experts_TK)
            return Routes(scores, 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), r.experts_TK)

        return f

    eager, _ = run(x, w, dscores, dweights, formula(torch.float32))
    truth, _ = run(x.double(), w.double(), dscores.double(), dweights.double(), formula(torch.float64))
    check_choice(r.experts_TK, limited(truth[0] + bias.double(), *groups))
    for name, ours, theirs, true in zip(NAMES, got, eager, truth, strict=True):
        if ours.dtype == torch.float32:
            assert relative_error(ours, true) < FP32, name
        else:
            assert_as_accurate(ours, theirs, true, what=name)
    assert torch.equal(expert_counts(r.experts_TK, E), torch.bincount(r.experts_TK.flatten(), minlength=E))
    plan = plan_rows(r.experts_TK, E, 128)
    order, place = plan_reference(r.experts_TK)
    assert torch.equal(plan.order_R.long(), order)
    assert torch.equal(plan.place_TK.long(), place)

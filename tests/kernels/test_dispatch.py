"""Which token goes to which rank: the kernels against plain PyTorch, and both against the definition."""

import pytest
import torch
from torch import Tensor

from kernels.dispatch import collect, departures, papers, spread

# tokens, choices, ranks, experts of a rank
SIZES = [(1, 1, 2, 1), (37, 3, 2, 5), (130, 6, 8, 16), (65, 22, 4, 8)]


def choices(T: int, K: int, ranks: int, local: int, device: str = "cpu") -> Tensor:
    """K different experts for each token, the first ranks more often than the last."""
    scores = torch.rand(T, ranks * local) * torch.linspace(1.0, 0.3, ranks * local)
    return scores.topk(K).indices.to(device)


def by_definition(experts_TK: Tensor, local: int, ranks: int) -> list[tuple[int, int]]:
    """(rank, token) of each row."""
    homes = [{e // local for e in row} for row in experts_TK.tolist()]
    return [(r, t) for r in range(ranks) for t, wanted in enumerate(homes) if r in wanted]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_everything_follows_from_the_places(size: tuple[int, ...], backend: str, request, poisoned_empty: None) -> None:
    device = request.getfixturevalue("device") if backend == "triton" else "cpu"
    T, K, ranks, local = size
    experts_TK = choices(*size, device)
    rows = by_definition(experts_TK, local, ranks)
    place, sent = departures(experts_TK, local, ranks, backend)
    assert sent.tolist() == [sum(r == rank for rank, _ in rows) for r in range(ranks)]
    assert place.sum() == sum(range(len(rows))) - (T * ranks - len(rows))
    assert all(place[t, r] == i for i, (r, t) in enumerate(rows))

    x, dy = (torch.randn(n, 20, device=device) for n in (T, len(rows)))
    token = torch.tensor([t for _, t in rows], device=device)
    leaf = x.clone().requires_grad_()
    y = spread(leaf, place, len(rows), backend)
    assert torch.equal(y, x[token])
    (dx,) = torch.autograd.grad(y, leaf, dy)
    sums = torch.zeros(T, 20, dtype=torch.float64, device=device).index_add_(0, token, dy.double())
    torch.testing.assert_close(dx.double(), sums, atol=1e-6, rtol=0)  # at most 8 summands of size 1
    leaf = dy.clone().requires_grad_()
    y = collect(leaf, place, backend)
    assert torch.equal(y, dx)
    (drows,) = torch.autograd.grad(y, leaf, x)
    assert torch.equal(drows, x[token])

    weights = torch.rand(T, K, device=device)
    leaf = weights.clone().requires_grad_()
    slips = papers(leaf, experts_TK, place, len(rows), local, backend)
    d = torch.randn(slips.shape, device=device)
    (dweights,) = torch.autograd.grad(slips, leaf, d)
    seen = torch.zeros(T, K, dtype=torch.bool)
    for i, (r, t) in enumerate(rows):
        for k, e in enumerate(experts_TK[t].tolist()):
            here = e // local == r
            assert slips[i, k] == (e - r * local if here else local)
            assert slips[i, K + k] == (weights[t, k] if here else 0)
            if here:
                assert dweights[t, k] == d[i, K + k]
                seen[t, k] = True
    assert seen.all()


def test_a_rank_without_tokens_of_its_own() -> None:
    experts_TK = torch.empty(0, 2, dtype=torch.long)
    place, sent = departures(experts_TK, 4, 3)
    assert place.shape == (0, 3)
    assert sent.tolist() == [0, 0, 0]
    assert spread(torch.randn(0, 5), place, 0).shape == collect(torch.randn(0, 5), place).shape == (0, 5)
    assert papers(torch.rand(0, 2), experts_TK, place, 0, 4).shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 8])
def test_on_the_gpu(ranks: int, poisoned_empty: None) -> None:
    local = 128 // ranks
    experts_TK = choices(8192, 6, ranks, local, "cuda")
    place, sent = departures(experts_TK, local, ranks)
    expected, counts = departures(experts_TK, local, ranks, "torch")
    assert torch.equal(place.long(), expected)
    assert torch.equal(sent, counts)
    n = int(sent.sum())
    x, back = torch.randn(8192, 2688, device="cuda").bfloat16(), torch.randn(n, 2688, device="cuda").bfloat16()
    assert torch.equal(spread(x, place, n), spread(x, expected, n, "torch"))
    torch.testing.assert_close(collect(back, place), collect(back, expected, "torch"), atol=0, rtol=0)
    weights = torch.rand(8192, 6, device="cuda")
    assert torch.equal(
        papers(weights, experts_TK, place, n, local), papers(weights, experts_TK, expected, n, local, "torch")
    )

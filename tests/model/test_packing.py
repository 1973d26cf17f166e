"""A packed row of documents equals its documents run alone: losses and every gradient, in float64.

Boundaries fall off the chunk grid, documents are as short as one token, and no state may cross: not in the convolution,
not in the scan, not in attention.
"""

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE, linear_cross_entropy
from nano3.config import ModelConfig
from nano3.model.model import Nano3
from tests.oracles import GOLDEN, fill_by_hash, our_model, relative

LENGTHS = [[1, 5, 16, 1, 1, 23, 7], [17, 1, 15, 16, 4, 1], [1] * 20, [54], [3, 51]]


def next_tokens(document: Tensor) -> Tensor:
    return torch.cat([document[1:], torch.tensor([IGNORE])])


def loss_of(model: Nano3, tokens: Tensor, labels: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    hidden = model(tokens, seq_idx).hidden.flatten(0, 1)
    weight = torch.full(labels.shape, 0.1, dtype=torch.promote_types(hidden.dtype, torch.float32), device=labels.device)
    return linear_cross_entropy(hidden, model.lm_head.weight, labels.flatten(), weight, chunk=7)


def gradients(model: Nano3) -> dict[str, Tensor]:
    out = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda v: "-".join(map(str, v)))
@pytest.mark.parametrize(
    "recompute", [frozenset(), frozenset({"mamba", "moe", "attention", "mlp"})], ids=["keep", "recompute"]
)
def test_packed_row_equals_its_documents(lengths: list[int], recompute: frozenset[str]) -> None:
    config = ModelConfig(**{**vars(GOLDEN), "hybrid_override_pattern": "MEM*-E"})
    model = fill_by_hash(our_model(config, torch.float64, recompute)).train()
    documents = [torch.randint(128, (n,)) for n in lengths]
    labels = torch.cat([next_tokens(d) for d in documents])
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    total, losses = loss_of(model, torch.cat(documents)[None], labels, seq_idx[None])
    total.backward()
    packed = gradients(model)

    alone = []
    for d in documents:
        loss, each = loss_of(model, d[None], next_tokens(d), None)
        loss.backward()
        alone.append(each)
    assert (losses - torch.cat(alone)).abs().max().item() <= 1e-10
    truth = gradients(model)
    assert set(packed) == set(truth)
    largest = max(t.norm() for t in truth.values())
    for name in truth:
        if truth[name].norm() < 1e-12 * largest:  # one-token documents: q and k have no gradient at all
            assert packed[name].norm() <= 1e-12 * largest, name
        else:
            assert relative(packed[name], truth[name]) <= 1e-10, name


@pytest.mark.gpu
def test_packed_row_equals_its_documents_on_the_gpu() -> None:
    """fp32: to 1e-5.  bf16: as near to fp32 as the documents alone are, for a token near a tie between two experts may
    go either way, and so may the gradients of both."""
    config = ModelConfig(**{**vars(GOLDEN), "hybrid_override_pattern": "MEM*-E"})
    lengths = [1, 700, 129, 64, 1, 1, 300, 852]
    documents = [torch.randint(128, (n,)) for n in lengths]
    rows = [(d, next_tokens(d), None) for d in documents]
    joined = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].cuda()
    whole = [(torch.cat(documents), torch.cat([labels for _, labels, _ in rows]), joined)]

    def run(dtype: torch.dtype, rows: list) -> dict[str, Tensor]:
        model = fill_by_hash(our_model(config, dtype)).cuda().train()
        losses = []
        for tokens, labels, seq_idx in rows:
            loss, each = loss_of(model, tokens[None].cuda(), labels.cuda(), seq_idx)
            loss.backward()
            losses.append(each.double())
        return {"losses": torch.cat(losses)} | gradients(model)

    truth, packed = run(torch.float32, rows), run(torch.float32, whole)
    for name, true in truth.items():
        assert relative(packed[name], true) <= 1e-5, name
    everything = [torch.cat([t.double().flatten() for t in run(torch.bfloat16, r).values()]) for r in (whole, rows)]
    true = torch.cat([t.double().flatten() for t in truth.values()])
    assert relative(everything[0], true) <= 1.5 * relative(everything[1], true)


def test_two_packed_rows_with_different_boundaries() -> None:
    model = fill_by_hash(our_model(GOLDEN, torch.float64)).eval()
    tokens = torch.randint(128, (2, 40))
    seq_idx = torch.stack([torch.arange(40) // 13, torch.arange(40) // 21])
    both = model(tokens, seq_idx).hidden
    for row in range(2):
        assert relative(both[row : row + 1], model(tokens[row : row + 1], seq_idx[row : row + 1]).hidden) <= 1e-12


def test_a_boundary_matters() -> None:
    model = fill_by_hash(our_model(GOLDEN, torch.float64)).eval()
    tokens = torch.randint(128, (1, 20))
    with_boundary = model(tokens, (torch.arange(20) >= 9).long()[None]).hidden
    without = model(tokens).hidden
    assert relative(with_boundary[:, :9], without[:, :9]) <= 1e-12
    assert relative(with_boundary[:, 9:], without[:, 9:]) > 1e-2


def test_padding_changes_nothing() -> None:
    """Two rows of 13 and 9 tokens, padded to 20: losses, gradients, expert counts and balance losses are their own."""

    def run(rows: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]) -> tuple[list[Tensor], list[list], dict]:
        losses, reports = [], []
        for tokens, labels, seq_idx, real in rows:
            out = model(tokens, seq_idx, real=real)
            weight = torch.full(labels.flatten().shape, 0.1, dtype=torch.float64)
            total, each = linear_cross_entropy(out.hidden.flatten(0, 1), model.lm_head.weight, labels.flatten(), weight)
            (total + 0.3 * sum(b.aux_B.sum() for b in out.balance)).backward()
            losses.append(each[labels.flatten() != IGNORE])
            reports.append(out.balance)
        return losses, reports, gradients(model)

    model = fill_by_hash(our_model(GOLDEN, torch.float64)).train()
    documents = [torch.randint(128, (n,)) for n in (13, 9)]
    truth = run([(d[None], next_tokens(d)[None], None, None) for d in documents])
    place = torch.arange(20)
    length = torch.tensor([[13], [9]])
    real = place < length
    tokens, labels = torch.full((2, 20), 5), torch.full((2, 20), IGNORE)
    for row, d in enumerate(documents):
        tokens[row, : len(d)], labels[row, : len(d)] = d, next_tokens(d)
    padded = run([(tokens, labels, (~real).long(), real)])
    assert torch.allclose(padded[0][0], torch.cat(truth[0]), rtol=1e-12, atol=0)
    for layer, report in enumerate(padded[1][0]):
        assert torch.equal(report.counts_E, sum(r[layer].counts_E for r in truth[1]))
        assert torch.allclose(report.aux_B, torch.cat([r[layer].aux_B for r in truth[1]]), rtol=1e-12, atol=0)
    for name, gradient in truth[2].items():
        assert relative(padded[2][name], gradient) <= 1e-10, name

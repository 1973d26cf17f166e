"""The gradient of an embedding against float64: which rows it touches, and what it adds to them."""

import pytest
import torch
from torch import Tensor

from kernels import embedding as module
from kernels.embedding import CELL, CELLS_AT_ONCE, embedding, embedding_gradient_, embedding_gradient_reference_
from kernels.gradient_sink import Buffer
from tests.kernels.conftest import relative_error

V = 11
LONG = CELL * CELLS_AT_ONCE  # a run of as many cells as the second kernel takes at once
IDS = {
    "one": [4],
    "distinct": [3, 0, 10, 5],
    "some": [7, 7, 2, 7, 10, 2, 7, 0, 7],
    "a run to the end of a cell": [0] * CELL + [1] * CELL,
    "a run from within a cell": [0] + [1] * (2 * CELL) + [9] * (CELL - 2),
    "all the same": [6] * (2 * CELL + 1),
    "a long one": [2] * 3 + [5] * (LONG + CELL + 1) + [8, 8],
}


def truth(sums: Tensor, ids: Tensor, dy: Tensor) -> Tensor:
    return sums.double().index_add(0, ids, dy.double())


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_rows_are_added_to_the_sums(
    ids: list[int], backend: str, device: str, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of ids that do not occur stay as they are, to the bit."""
    monkeypatch.setattr(module, "BLOCK", 4)  # 9 columns in three blocks
    ids = torch.tensor(ids, device=device)[torch.randperm(len(ids), device=device)]
    dy, sums = torch.randn(len(ids), 9, device=device), torch.randn(V, 9, device=device)
    before, expected = sums.clone(), truth(sums, ids, dy)
    embedding_gradient_(sums, ids, dy, backend=backend)
    assert relative_error(sums, expected) < 1e-6  # fp32 sums of at most a hundred terms
    absent = torch.ones(V, dtype=torch.bool, device=device).index_fill(0, ids, False)
    assert torch.equal(sums[absent], before[absent])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_first_gradient_overwrites(backend: str, device: str, poisoned_empty: None) -> None:
    ids, dy = torch.tensor([2, 9, 2], device=device), torch.randn(3, 5, device=device)
    sums = torch.full((V, 5), float("nan"), device=device)
    embedding_gradient_(sums, ids, dy, holds=False, backend=backend)
    assert relative_error(sums, truth(torch.zeros_like(sums), ids, dy)) < 1e-6
    embedding_gradient_(sums[:, :0], ids, dy[:, :0], backend=backend)
    embedding_gradient_(sums, ids[:0], dy[:0], holds=False, backend=backend)
    assert not sums.any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_narrow_sums_are_rounded_once(backend: str, device: str) -> None:
    """256 + 8 x 1: in bf16 each 1 would be lost beside 256."""
    sums = torch.full((2, 3), 256.0, device=device, dtype=torch.bfloat16)
    ids, dy = torch.ones(8, dtype=torch.int64, device=device), torch.ones(8, 3, device=device, dtype=torch.bfloat16)
    embedding_gradient_(sums, ids, dy, backend=backend)
    assert sums.tolist() == [[256.0] * 3, [264.0] * 3]


def test_float64_on_any_device() -> None:
    ids, dy, sums = torch.randint(V, (40,)), torch.randn(40, 6).double(), torch.randn(V, 6).double()
    expected = truth(sums, ids, dy)
    embedding_gradient_(sums, ids, dy)
    assert relative_error(sums, expected) < 1e-14


def test_the_operator_leaves_its_gradient_in_the_sink(device: str) -> None:
    ids = torch.randint(V, (2, 7), device=device)
    weight, dy = torch.randn(V, 6, device=device, requires_grad=True), torch.randn(6, 2, 7, device=device).movedim(0, 2)
    sums = torch.zeros(V, 6, device=device)
    y = embedding(ids, weight, Buffer(sums))
    assert torch.equal(y, weight[ids])
    y.backward(dy)
    assert weight.grad is None
    embedding(ids, weight).backward(dy)
    assert relative_error(sums, weight.grad) < 1e-6
    with torch.no_grad():
        assert not embedding(ids, weight, Buffer(sums)).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("ids", ["text", "padding", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu(ids: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    """At Nano's width, and the same bits twice."""
    T, D, V = 8192, 2688, 4096
    ids = {
        "text": (torch.rand(T, device="cuda").pow(4) * V).long(),  # a few ids are frequent
        "padding": torch.full((T,), 17, device="cuda"),
        "alone": torch.randperm(V, device="cuda"),
    }[ids]
    dy, sums = torch.randn(len(ids), D, device="cuda").bfloat16(), torch.randn(V, D, device="cuda").to(dtype)
    again, eager, expected = sums.clone(), sums.clone(), truth(sums, ids, dy)
    embedding_gradient_(sums, ids, dy)
    embedding_gradient_(again, ids, dy)
    embedding_gradient_reference_(eager, ids, dy)
    assert torch.equal(sums, again)
    assert relative_error(sums, expected) <= 2 * relative_error(eager, expected) + 1e-6

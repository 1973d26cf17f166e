"""Buckets: every element of every gradient is summed once and owned once; sizes and order."""

import pytest
import torch
from torch import nn

from nano3.parallel.data import make_buckets
from nano3.parallel.mesh import Axis


def parameters() -> dict[str, nn.Parameter]:
    shapes = {"a": (7, 3), "b": (5,), "big": (16, 8), "c": (1, 4), "d": (6, 2, 2)}
    return {n: nn.Parameter(torch.randn(s, dtype=torch.float64)) for n, s in shapes.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_rows_are_owned_once_and_keep_their_gradients(ranks: int) -> None:
    weights = parameters()
    gradients = {n: torch.randn_like(p) for n, p in weights.items()}
    axis = Axis(ranks, 0)
    buckets = make_buckets(weights, lambda name: axis, None, size=100)
    assert [m.name for b in buckets for m in b.members] == ["d", "c", "big", "b", "a"]  # as a backward pass comes by
    assert [m.name for b in buckets if len(b.members) == 1 for m in b.members] == ["big"]
    for bucket in buckets:
        for _ in range(2):
            for m in bucket.members:
                bucket.accumulate(m, gradients[m.name])
        for m in bucket.members:
            rows = [m.shard(bucket.total[r], r) for r in range(ranks)]
            assert torch.equal(torch.cat(rows), 2 * gradients[m.name])
            assert [r.shape[0] for r in rows] == [len(range(m.parameter.shape[0])[m.owned(r)]) for r in range(ranks)]


def test_a_large_tensors_bucket_lies_like_the_tensor() -> None:
    """So that a kernel may add a weight gradient straight into it."""
    p = nn.Parameter(torch.randn(8, 4, dtype=torch.float64))
    (bucket,) = make_buckets({"w": p}, lambda name: Axis(4, 0), None, size=16)
    bucket.accumulate(bucket.members[0], p.detach())
    assert torch.equal(bucket.total.view(8, 4), p)


def test_narrow_parameters_are_summed_in_fp32_and_travel_as_asked() -> None:
    weights = {"w": nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16)), "A_log": nn.Parameter(torch.zeros(4))}
    for wire, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        a_log, w = make_buckets(weights, lambda name: Axis(), wire)
        assert (w.dtype, w.wire) == (torch.float32, expected)
        assert (a_log.dtype, a_log.wire) == (torch.float32, torch.float32)

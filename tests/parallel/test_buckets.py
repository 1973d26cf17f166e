"""Buckets: every element of every gradient is summed once and owned once; sizes and order."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from nano3.model.init import allocate, initialise
from nano3.parallel.data import Bucket, make_buckets
from nano3.parallel.mesh import ALONE, Axis
from nano3.train import gradients
from nano3.train.checkpoint import build
from tests.parallel.layouts import config_for


def parameters() -> dict[str, nn.Parameter]:
    shapes = {"a": (7, 3), "b": (5,), "big": (16, 8), "c": (1, 4), "d": (6, 2, 2)}
    return {n: nn.Parameter(torch.randn(s, dtype=torch.float64)) for n, s in shapes.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_rows_are_owned_once_and_keep_their_gradients(ranks: int) -> None:
    weights = parameters()
    gradients = {n: torch.randn_like(p) for n, p in weights.items()}
    axis = Axis(ranks, 0)
    buckets = make_buckets(weights, lambda name: axis, None, size=100)
    # Large tensors alone, the others together; each bucket where a backward pass completes it.
    assert [[m.name for m in b.members] for b in buckets] == [["big"], ["d", "c", "b", "a"]]
    for bucket in buckets:
        for _ in range(2):
            for m in bucket.members:
                bucket.accumulate(m, gradients[m.name])
        for m in bucket.members:
            rows = [m.shard(bucket.total[r], r) for r in range(ranks)]
            assert torch.equal(torch.cat(rows), 2 * gradients[m.name])
            assert [r.shape[0] for r in rows] == [len(range(m.parameter.shape[0])[m.owned(r)]) for r in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_experts_weights_have_buckets_that_are_added_to_directly(ranks: int) -> None:
    """Each alone, shaped like the tensor, meaning nothing before the first gradient; rows that no rank owns stay 0."""
    shapes = {"0.experts.up_proj": (4, 3, 2), "0.gate.weight": (4, 2), "0.experts.down_proj": (4, 2, 3)}
    weights = {n: nn.Parameter(torch.randn(s, dtype=torch.float64)) for n, s in shapes.items()}
    buckets = make_buckets(weights, lambda name: Axis(ranks, 0), None)
    assert [[m.name for m in b.members] for b in buckets] == [[n] for n in reversed(shapes)]
    for bucket in buckets:
        (member,) = bucket.members
        sums, holds = bucket.open(member)
        assert not holds
        sums.copy_(member.parameter.detach())
        sums, holds = bucket.open(member)
        assert holds
        sums += member.parameter.detach()
        bucket.close(member)
        rows = [member.shard(bucket.total[r], r) for r in range(ranks)]
        assert torch.equal(torch.cat(rows), 2 * member.parameter)
        assert not bucket.total.view(-1)[member.parameter.numel() :].any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_tensors_that_share_a_bucket_are_opened_like_those_that_do_not(ranks: int) -> None:
    """A buffer shaped like the tensor, overwritten at first, then added to, also by two at a time.  What lies beside it
    stays as it is; what no gradient came for reads as zero, in the next step too."""
    weights = parameters()
    (_, bucket) = make_buckets(weights, lambda name: Axis(ranks, 0), None, size=100)
    member = {m.name: m for m in bucket.members}

    def fill(name: str, close: bool = True) -> bool:
        sums, holds = bucket.open(member[name])
        assert sums.shape == weights[name].shape
        assert sums.is_contiguous()
        sums.add_(weights[name].detach()) if holds else sums.copy_(weights[name].detach())
        if close:
            bucket.close(member[name])
        return sums.untyped_storage().data_ptr() == bucket.total.untyped_storage().data_ptr()

    for untouched in ("c", "d"):
        first, second = "da" if untouched == "c" else "ca"
        bucket.accumulate(member["b"], weights["b"].detach())
        in_place = [fill(first), fill(second, close=False), fill(second), fill(first)]
        assert in_place == [ranks == 1] * 4
        total = bucket.total
        bucket.reduce()
        for name, times in ((first, 2), (second, 2), ("b", 1), (untouched, 0)):
            rows = torch.cat([member[name].shard(total[r], r) for r in range(ranks)])
            assert torch.equal(rows, times * weights[name]), name
        assert total.count_nonzero() == sum(weights[n].numel() for n in (first, second, "b"))  # padding is zero
        bucket.finish_reduce()


def test_narrow_parameters_are_summed_in_fp32_and_travel_as_asked() -> None:
    weights = {"w": nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16)), "A_log": nn.Parameter(torch.zeros(4))}
    for wire, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        a_log, w = make_buckets(weights, lambda name: Axis(2, 0), wire)
        assert (w.dtype, w.wire) == (torch.float32, expected)
        assert (a_log.dtype, a_log.wire) == (torch.float32, torch.float32)
        assert all(b.wire == torch.float32 for b in make_buckets(weights, lambda name: Axis(), wire))  # none travels


def test_routed_experts_do_not_wait_for_the_shared_one() -> None:
    """The order is that in which a backward pass completes the gradients."""
    config = config_for(("model.hybrid_override_pattern=E",))
    model = allocate(build(config.model), torch.device("cpu"), torch.float32)
    initialise(model, config.model, seed=0)
    tokens, complete = torch.randint(0, config.model.vocab_size, (1, 32)), []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: complete.append(name))
    out = model.train()(tokens)
    model.logits(out.hidden).square().mean().backward()
    matrices = [n for n in complete if "expert" in n]
    buckets = make_buckets(dict(model.named_parameters()), lambda name: Axis(), None, size=1)
    assert [m.name for b in buckets for m in b.members if "expert" in m.name] == matrices
    assert len(matrices) == 4


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_forward_pass_waits_for_every_parameter(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks' rows are on their way when it begins; here every tensor has a message of its own."""
    config = config_for(("model.hybrid_override_pattern=ME*-", f"train.recompute={recompute}"))
    model = allocate(build(config.model, config.recompute), torch.device("cpu"), torch.float32)
    initialise(model, config.model, seed=0)
    model.mesh = replace(ALONE, world=2)
    waited: set[Bucket] = set()
    monkeypatch.setattr(gradients, "make_buckets", partial(make_buckets, size=1))
    monkeypatch.setattr(Bucket, "finish_gather", lambda bucket: waited.add(bucket))
    buckets = gradients.Gradients(model).buckets
    assert all(len(b.members) == 1 for b in buckets)
    model.train()(torch.randint(0, config.model.vocab_size, (1, 8)))
    assert [b.members[0].name for b in buckets if b not in waited] == []

"""The grid as arithmetic: groups, refusals, the nearest legal layout; and the cuts of single tensors."""

import re
from math import prod

import pytest
import torch

from nano3.config import UserError
from nano3.model.layout import split_of, whole_shapes
from nano3.parallel.layout import AXES, Layout, check_layout, nearest_layout, objections
from nano3.parallel.mesh import Axis
from nano3.parallel.tensor import Split
from tests.parallel.layouts import config_for


def test_the_example_of_the_design() -> None:
    """tp=4, ep=8 on 8 ranks: two tp groups form one ep group."""
    grid = Layout(world=8, tp=4, ep=8)
    assert grid.groups("tp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert grid.groups("ep") == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert grid.groups("dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.groups("edp") == [[r] for r in range(8)]


def test_pipeline_stages_are_the_slowest_axis() -> None:
    grid = Layout(world=8, tp=2, ep=2, pp=2)
    assert grid.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.groups("block") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert grid.groups("ep") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.groups("edp") == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4, 1), (4, 2, 2), (2, 8, 2), (1, 2, 4)])
def test_every_axis_partitions_the_world(sizes: tuple[int, int, int]) -> None:
    tp, ep, pp = sizes
    grid = Layout(world=32, tp=tp, ep=ep, pp=pp)
    for axis in AXES:
        groups = grid.groups(axis)
        assert sorted(r for g in groups for r in g) == list(range(32))
        assert len({len(g) for g in groups}) == 1
    assert tp * grid.dp * pp == ep * grid.edp * pp == 32
    for axis in ("tp", "ep"):  # consecutive: they share a node
        assert all(g == list(range(g[0], g[0] + len(g))) for g in grid.groups(axis))


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (6, ["parallel.tp=4"], "parallel.tp=4 x parallel.pp=1 ranks do not divide 6"),
        (4, ["parallel.ep=8"], "parallel.ep=8 x parallel.pp=1 ranks do not divide 4"),
        (8, ["parallel.tp=8"], "parallel.tp=8 needs model.n_groups=4 to be a multiple of 8"),
        (16, ["parallel.ep=16"], "parallel.ep=16 needs model.n_routed_experts=8 to be a multiple of 16"),
        (4, ["parallel.tp=4", "dataset.seq_length=18"], "needs dataset.seq_length=18 to be a multiple of 4"),
        (3, ["parallel.tp=3", "model.n_groups=3", "model.mamba_num_heads=9"], "model.num_key_value_heads=2 to divide"),
        (2, ["parallel.ep=2", "model.hybrid_override_pattern=M*"], "the pattern M* holds no E"),
        (8, ["parallel.pp=8", "parallel.virtual_pp=2", "train.micro_batch_size=1"], "16 pipeline parts are more than"),
        (4, ["parallel.pp=4", "parallel.virtual_pp=2", "train.micro_batch_size=4"], "the 2 micro-batches of a step"),
        (4, ["train.global_batch_size=6", "train.micro_batch_size=1"], "use train.global_batch_size=8"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_arithmetic(world: int, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_layout(config_for(tuple(overrides)), world)


def test_the_nearest_legal_layout_is_offered_and_legal() -> None:
    config = config_for(("parallel.tp=8", "parallel.ep=2", "train.micro_batch_size=1"))
    with pytest.raises(UserError, match=re.escape("that does: parallel.tp=4 parallel.ep=2 parallel.pp=1")):
        check_layout(config, 8)
    near = nearest_layout(config, Layout(world=8, tp=8, ep=2))
    assert objections(config, near) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("parallel.cp=2",), "parallel.cp=2: context parallelism is not available"),
        (("parallel.virtual_pp=2",), "parallel.pp=1 has none"),
    ],
)
def test_what_no_number_of_ranks_can_do_is_refused_by_name(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_layout(config_for(overrides), 8)


def test_stages_must_add_up() -> None:
    from nano3.train.plan import stage_spans

    with pytest.raises(UserError, match="8 layers"):
        stage_spans(config_for(("parallel.pp=2", "parallel.stages=[3,4]")))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 8])
def test_parts_of_every_tensor_make_the_whole(tp: int, ep: int) -> None:
    config = config_for(())
    for name, shape in whole_shapes(config.model).items():
        split = split_of(name, config.model, tp)
        if split is None:
            continue
        whole = torch.arange(prod(shape)).view(shape)
        size = tp if split.axis == "tp" else ep
        parts = [split.take(whole, Axis(size, r)) for r in range(size)]
        assert torch.equal(split.join(parts), whole), name
        assert {p.shape for p in parts} == {split.shape(shape, Axis(size))}, name
        for r in range(0, size, split.copies):  # ranks that share a KV head have the same
            assert all(torch.equal(parts[r], p) for p in parts[r : r + split.copies])


def test_in_proj_is_cut_component_by_component() -> None:
    whole = torch.arange(16)  # z z z z | x x x x | B B | C C | dt dt dt dt
    split = Split("tp", 0, (4, 4, 2, 2, 4))
    assert split.take(whole, Axis(2, 1)).tolist() == [2, 3, 6, 7, 9, 11, 14, 15]

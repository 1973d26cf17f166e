"""Pipeline schedules run without a process: lists against first-in first-out channels; cuts against brute force."""

import random
from collections import defaultdict, deque
from itertools import combinations, pairwise

import pytest
import torch

from nano3.config import UserError
from nano3.parallel.mesh import Mesh
from nano3.parallel.pipeline import Wire, run
from nano3.parallel.pipeline_schedule import (
    Link,
    Op,
    bubble,
    cut,
    forward_only,
    interleaved,
    one_f_one_b,
    peak_in_flight,
    schedule,
    spans_of,
    timeline,
    transfers,
)

PLAIN = [(p, 1, m) for p in (1, 2, 3, 4, 5, 8) for m in (1, 2, 3, 4, 7, 8, 16)]
VIRTUAL = [(p, v, p * rounds) for p in (2, 3, 4, 8) for v in (2, 3, 4) for rounds in (1, 2, 3, 5)]
STEPS = PLAIN + VIRTUAL  # (stages, chunks, micro-batches)


def lists(stages: int, chunks: int, micro_batches: int) -> list[list[Op]]:
    return [schedule(stage, stages, chunks, micro_batches) for stage in range(stages)]


def run_together(orders: list[list[Op]], chunks: int) -> set[tuple[int, int, str]]:
    """All ranks work down their lists to the end; returns the channels (from, to, direction) that they used.

    A send appends to its channel and goes on; a receive takes the channel's oldest message and waits while there is
    none.  What a rank does next depends on nothing but its own list and channels that it alone reads, so whether all
    lists end does not depend on which rank is quick: trying the ranks in turn is enough to find a deadlock.

    A message is named by what it must be: (direction, boundary, micro-batch), where boundary b is the one between the
    virtual stages b and b + 1.
    """
    stages = len(orders)
    boundaries = range(stages * chunks - 1)
    channels: dict[tuple[int, int, str], deque] = defaultdict(deque)
    todo = [deque(order) for order in orders]
    while any(todo):
        moved = False
        for rank in range(stages):
            if not todo[rank]:
                continue
            op = todo[rank][0]
            virtual = op.chunk * stages + rank
            below, above = virtual - 1, virtual  # the boundaries of this virtual stage
            enters, leaves = (below, above) if op.kind == "F" else (above, below)
            receive, send = transfers(op, rank, stages, chunks)
            assert (receive is not None) == (enters in boundaries)
            assert (send is not None) == (leaves in boundaries)
            if receive:
                channel = channels[receive.peer, rank, receive.direction]
                if not channel:
                    continue  # this rank waits, the others go on
                assert channel.popleft() == (op.kind, enters, op.micro)
            if send:
                channels[rank, send.peer, send.direction].append((op.kind, leaves, op.micro))
            todo[rank].popleft()
            moved = True
        assert moved, f"deadlock: each rank waits before {[order[0] if order else None for order in todo]}"
    assert not any(channels.values()), "a message that nobody received"
    return set(channels)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), STEPS)
def test_every_pass_happens_once_and_its_gradient_after_it(stages: int, chunks: int, micro_batches: int) -> None:
    passes = {(c, m) for c in range(chunks) for m in range(micro_batches)}
    for order in lists(stages, chunks, micro_batches):
        assert len(order) == 2 * len(passes)
        place = {op: i for i, op in enumerate(order)}
        assert set(place) == {Op(kind, *which) for kind in "FB" for which in passes}
        assert all(place[Op("F", *which)] < place[Op("B", *which)] for which in passes)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), STEPS)
def test_the_ranks_finish_together_and_every_message_is_the_one_expected(
    stages: int, chunks: int, micro_batches: int
) -> None:
    used = run_together(lists(stages, chunks, micro_batches), chunks)
    up = {(rank, rank + 1) for rank in range(stages - 1)}  # ways that activations take; gradients go back on them
    if chunks > 1:
        up.add((stages - 1, 0))  # from the last rank's chunk to the first rank's next one
    assert used == {(a, b, "F") for a, b in up} | {(b, a, "B") for a, b in up}


@pytest.mark.parametrize(("stages", "chunks"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (4, 3)])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 5, 8])
def test_evaluation_runs_any_number_of_micro_batches(stages: int, chunks: int, micro_batches: int) -> None:
    order = forward_only(stages, chunks, micro_batches)
    assert sorted(order) == sorted(Op("F", c, m) for c in range(chunks) for m in range(micro_batches))
    run_together([order] * stages, chunks)


def test_one_stage_is_gradient_accumulation() -> None:
    assert schedule(0, 1, 1, 3) == [Op(kind, 0, m) for m in range(3) for kind in "FB"]
    assert transfers(Op("F", 0, 0), 0, 1, 1) == transfers(Op("B", 0, 0), 0, 1, 1) == (None, None)


def test_small_schedules_by_hand() -> None:
    def read(text: str) -> list[Op]:  # F1.0: forward, chunk 1, micro-batch 0
        return [Op(word[0], int(word[1]), int(word[3])) for word in text.split()]

    assert one_f_one_b(0, 3, 4) == read("F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3")
    assert one_f_one_b(2, 3, 4) == read("F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3")
    assert interleaved(0, 2, 2, 2) == read("F0.0 F0.1 F1.0 F1.1 B1.0 B1.1 B0.0 B0.1")
    assert interleaved(1, 2, 2, 2) == read("F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 B0.0 B0.1")


def test_links_of_two_ranks_with_two_chunks() -> None:
    first, last = (lambda kind, chunk, rank=rank: transfers(Op(kind, chunk, 0), rank, 2, 2) for rank in (0, 1))
    assert first("F", 0) == (None, Link(1, "F"))  # the embedding
    assert last("F", 0) == (Link(0, "F"), Link(0, "F"))  # on to chunk 1 of the first rank
    assert first("F", 1) == (Link(1, "F"), Link(1, "F"))
    assert last("F", 1) == (Link(0, "F"), None)  # the head
    assert last("B", 1) == (None, Link(0, "B"))
    assert first("B", 0) == (Link(1, "B"), None)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), STEPS)
def test_activations_in_flight(stages: int, chunks: int, micro_batches: int) -> None:
    for stage in range(stages):
        held: set[tuple[int, int]] = set()
        sizes = []
        for op in schedule(stage, stages, chunks, micro_batches):
            (held.add if op.kind == "F" else held.remove)((op.chunk, op.micro))
            sizes.append(len(held))
        later = stages - stage - 1  # ranks after this one
        most = later + 1 if chunks == 1 else (chunks - 1) * stages + 2 * later + 1
        assert max(sizes) == min(most, chunks * micro_batches)
        assert peak_in_flight(stage, stages, chunks, micro_batches) == max(sizes)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), STEPS)
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_idle_share_is_the_formula(stages: int, chunks: int, micro_batches: int, backward: float) -> None:
    expected = (stages - 1) / (chunks * micro_batches + stages - 1)
    assert bubble(stages, chunks, micro_batches, 1.0, backward) == pytest.approx(expected, abs=1e-12)


def test_idle_share_with_uneven_stages() -> None:
    # One micro-batch: the ranks work one after the other, 3 + 6 time units of 2 ranks x 9.
    assert bubble(2, 1, 1, costs=[1.0, 2.0]) == pytest.approx(0.5)
    # Many: the slow rank never waits, the fast one works half of the time.
    assert bubble(2, 1, 1000, costs=[1.0, 2.0]) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(1, 1, 4), (4, 1, 6), (3, 2, 6), (2, 3, 4)])
def test_timeline_is_possible(stages: int, chunks: int, micro_batches: int) -> None:
    ranks = timeline(stages, chunks, micro_batches, 1.0, 2.0, message=0.25)
    ends = {}
    for stage, ops in enumerate(ranks):
        assert [op for op, _, _ in ops] == schedule(stage, stages, chunks, micro_batches)
        assert all(end - start == pytest.approx((1 if op.kind == "F" else 2) / chunks) for op, start, end in ops)
        assert all(end <= start for (_, _, end), (_, start, _) in pairwise(ops))
        ends |= {(op.kind, op.chunk * stages + stage, op.micro): end for op, _, end in ops}
    for stage, ops in enumerate(ranks):
        for op, start, _ in ops:
            virtual = op.chunk * stages + stage
            if op.kind == "B":
                assert start >= ends["F", virtual, op.micro]
            source = (op.kind, virtual + (-1 if op.kind == "F" else 1), op.micro)
            assert source not in ends or start >= ends[source] + 0.25


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (4, 2), (4, 4), (8, 2)])
def test_messages_travel_behind_the_interleaved_schedules_compute(stages: int, chunks: int) -> None:
    def seconds(rounds: int) -> float:
        ranks = timeline(stages, chunks, stages * rounds, message=0.3 / chunks)
        return max(ops[-1][2] for ops in ranks)

    more = 10 * stages * 3.0  # what ten more rounds of micro-batches take to compute, and not a message longer
    assert seconds(14) - seconds(4) == pytest.approx(more)


def every_cut(layers: int, parts: int) -> list[tuple[int, ...]]:
    """Sizes of all ways to cut."""
    return [
        tuple(b - a for a, b in pairwise([0, *inner, layers])) for inner in combinations(range(1, layers), parts - 1)
    ]


@pytest.mark.parametrize("kind", ["equal", "few values", "with zeros", "any"])
def test_cut_against_brute_force(kind: str) -> None:
    draw = random.Random(0)
    value = {
        "equal": lambda: 1.0,
        "few values": lambda: float(draw.choice([2, 5])),  # many ties
        "with zeros": lambda: float(draw.choice([0, 1, 3])),
        "any": lambda: draw.randrange(1, 1 << 30) / (1 << 20),  # sums are exact
    }[kind]
    for _ in range(150):
        layers = draw.randint(1, 9)
        parts = draw.randint(1, layers)
        costs = [value() for _ in range(layers)]
        extra = [draw.choice([0.0, 1.0, 4.0]), draw.choice([0.0, 2.0, 7.0])]

        def largest(sizes: tuple[int, ...], costs=costs, extra=extra) -> float:
            stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            loads = [sum(costs[stop - size : stop]) for stop, size in zip(stops, sizes, strict=True)]
            loads[0] += extra[0]
            loads[-1] += extra[1]
            return max(loads)

        best = min(every_cut(layers, parts), key=lambda sizes: (largest(sizes), sum(n * n for n in sizes), sizes))
        spans = cut(costs, parts, *extra)
        assert [stop - start for start, stop in spans] == list(best), (costs, parts, extra)
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == layers


def test_cut_weighs_the_ends_in() -> None:
    assert cut([1.0] * 52, 4, 0.0, 0.0) == [(0, 13), (13, 26), (26, 39), (39, 52)]
    assert cut([1.0] * 12, 4, 0.0, 3.0) == [(0, 3), (3, 7), (7, 11), (11, 12)]
    assert cut([1.0] * 12, 4, 3.0, 0.0) == [(0, 1), (1, 4), (4, 8), (8, 12)]


def test_more_parts_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"= 8 virtual stages, but the model has 7 layers.*lower parallel\.pp"):
        cut([1.0] * 7, 8, 0.0, 0.0)


def test_explicit_stages() -> None:
    assert spans_of([14, 12, 13, 13], 52) == [(0, 14), (14, 26), (26, 39), (39, 52)]
    assert spans_of([7], 7, parts=1) == [(0, 7)]


@pytest.mark.parametrize(
    ("sizes", "parts", "text"),
    [
        ([14, 12, 13, 12], 4, r"\[14, 12, 13, 12\]: 14 \+ 12 \+ 13 \+ 12 = 51, .* 52 layers; give out 1 more"),
        ([14, 14, 13, 13], None, r"= 54, but the model has 52 layers; take away 2"),
        ([26, 26], 4, r"names 2 stages, but parallel\.pp x parallel\.virtual_pp = 4"),
        ([52, 0], 2, r"at least one layer"),
        ([53, -1], None, r"at least one layer"),
        ([], None, r"parallel\.stages=\[\]"),
    ],
)
def test_explicit_stages_that_do_not_fit_are_refused(sizes: list[int], parts: int | None, text: str) -> None:
    with pytest.raises(UserError, match=text):
        spans_of(sizes, 52, parts)


@pytest.mark.parametrize(("micro_batches", "remedy"), [(6, "4 or 8"), (3, "make them 4 ")])
def test_rounds_that_are_not_full_are_refused(micro_batches: int, remedy: str) -> None:
    with pytest.raises(UserError, match=r"parallel\.virtual_pp=2.*parallel\.pp=4") as refused:
        schedule(1, 4, 2, micro_batches)
    assert remedy in str(refused.value)
    assert "parallel.virtual_pp=1" in str(refused.value)


def test_virtual_stages_need_a_pipeline() -> None:
    calls = [
        lambda: schedule(0, 1, 2, 4),
        lambda: forward_only(1, 2, 4),
        lambda: transfers(Op("F", 1, 0), 0, 1, 2),
        lambda: bubble(1, 2, 4),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"virtual stages need parallel\.pp above 1"):
            call()


def test_receives_are_posted_ahead_once_a_kind_is_familiar() -> None:
    """And never what answers the operation at hand, which has to be sent first."""

    class Recorder(Wire):
        def post(self, op: Op) -> None:
            posted.append(op)

        def receive(self, op: Op) -> None:
            posted.append(None)  # the operation begins

        def send(self, op: Op, x: torch.Tensor) -> None:
            pass

    def go(*kinds: str) -> list[Op | None]:
        posted.clear()
        with torch.no_grad():
            wire = Recorder(mesh, 2, (1, 2, 3), torch.float32, [(kind,) for kind in kinds])
            run(ops, wire, lambda *_: (torch.zeros(1), None))
        return [*posted]

    posted: list[Op | None] = []
    mesh, ops = Mesh(), [Op("F", 0, 0), Op("F", 1, 0), Op("F", 1, 1)]
    first, second, third = ops
    careful = [first, None, second, None, third, None]
    assert go("packed") == careful
    assert go("packed") == [first, None, second, third, None, third, None]
    assert go("packed", "plain") == careful
    assert go("plain") == [first, None, second, third, None, third, None]

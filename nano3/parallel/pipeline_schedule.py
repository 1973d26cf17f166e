"""Pipeline schedules as plain data, and the cut of the layers into stages.  Nothing here computes or communicates.

A pipeline is `stages` ranks.  The layers are cut into stages * chunks spans, the virtual stages, which are dealt to the
ranks in turn: chunk c of rank `stage` is virtual stage c * stages + stage.  A micro-batch climbs the virtual stages one
by one and its gradient comes down again, so with two chunks each passes every rank twice.

A schedule is the list of what one rank does, in order.  Before an op the rank waits for what `transfers` says that the
op receives; after it the rank sends and does not wait.  Messages travel on one first-in first-out channel for each
(from, to, direction), which is enough for every receive to meet its own message; the tests run all ranks' lists against
such channels.  Fewer channels are not enough where an endpoint queues its sends and receives in one line, as a NCCL
communicator does: a send of rank 0 would stand before the receive that rank 1's matching send waits for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from nano3.config import UserError


class Op(NamedTuple):
    """One micro-batch through one of the rank's own chunks of layers."""

    kind: Literal["F", "B"]  # forward or backward
    chunk: int
    micro: int


class Link(NamedTuple):
    """One end of a channel: the rank along the pipeline at its other end, and what travels on it."""

    peer: int
    direction: Literal["F", "B"]  # activations or gradients


class Transfers(NamedTuple):
    receive: Link | None  # before the op
    send: Link | None  # after it


def schedule(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Op]:
    """The order of a training step on rank `stage`: plain 1F1B for one chunk, interleaved 1F1B for several.

    With one stage it is gradient accumulation: F0 B0 F1 B1 ...  Raises UserError as `interleaved` does.
    """
    if chunks == 1:
        return one_f_one_b(stage, stages, micro_batches)
    return interleaved(stage, stages, chunks, micro_batches)


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> list[Op]:
    """One forward, one backward (arXiv:2104.04473, section 2.2.1): at most stages - stage micro-batches are in flight.

    The ranks after this one take one micro-batch each before the first gradient can come back, so this rank runs as
    many forwards ahead.  From then on every backward frees what the forward before it took.
    """
    assert 0 <= stage < stages
    assert micro_batches >= 1
    forwards = [Op("F", 0, i) for i in range(micro_batches)]
    backwards = [Op("B", 0, i) for i in range(micro_batches)]
    return _alternate(forwards, backwards, ahead=stages - stage - 1)


def interleaved(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Op]:
    """1F1B over virtual stages (arXiv:2104.04473, section 2.2.2): `chunks` times less idle time, more messages.

    Micro-batches go in rounds of `stages`: a round passes chunk 0, then chunk 1, ...; its gradients come back through
    the last chunk first.  Raises UserError if the micro-batches do not fill whole rounds, or if there is one stage.
    """
    assert 0 <= stage < stages
    assert micro_batches >= 1
    _check_virtual(stages, chunks)
    if micro_batches % stages:
        below, above = micro_batches // stages * stages, -(-micro_batches // stages) * stages
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"parallel.virtual_pp={chunks}: {micro_batches} micro-batches do not fill rounds of parallel.pp={stages}; "
            f"make them {near} (train.global_batch_size / train.micro_batch_size / data-parallel ranks), "
            "or use parallel.virtual_pp=1"
        )
    passes = _passes(stages, chunks, micro_batches)
    forwards = [Op("F", c, i) for c, i in passes]
    backwards = [Op("B", chunks - 1 - c, i) for c, i in passes]
    # (chunks - 1) * stages forwards take the first round through all chunks but the last.  Then micro-batch 0 needs one
    # hop up for each rank above this one, and its gradient one hop down: a forward during each hop means that nobody
    # waits while a message travels.  (Half as many would keep the ranks as busy if messages took no time.)
    return _alternate(forwards, backwards, ahead=(chunks - 1) * stages + 2 * (stages - stage - 1))


def forward_only(stages: int, chunks: int, micro_batches: int) -> list[Op]:
    """Evaluation: the forwards alone, in the same order on every rank.  Any number of micro-batches is legal.

    Raises UserError for several chunks on one stage.
    """
    _check_virtual(stages, chunks)
    return [Op("F", c, i) for c, i in _passes(stages, chunks, micro_batches)]


def transfers(op: Op, stage: int, stages: int, chunks: int) -> Transfers:
    """What `op` receives before it runs on rank `stage`, and sends after; None at the embedding's and the head's end.

    A forward takes its input from the virtual stage below and gives its output to the one above; a backward the other
    way round.  The neighbour of the last rank's chunk c is the first rank's chunk c + 1, so with two stages and several
    chunks activations travel both ways between the same two ranks, on two channels.  Raises UserError for several
    chunks on one stage.
    """
    _check_virtual(stages, chunks)
    here = op.chunk * stages + stage
    source, target = (here - 1, here + 1) if op.kind == "F" else (here + 1, here - 1)
    receive, send = (
        Link(virtual % stages, op.kind) if 0 <= virtual < stages * chunks else None for virtual in (source, target)
    )
    return Transfers(receive, send)


def peak_in_flight(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Activations that rank `stage` holds at most in a step, each of one micro-batch and one chunk of its layers.

    A chunk is 1 / chunks of the rank's layers: divide by `chunks` to compare with a schedule of one chunk.
    """
    held = most = 0
    for op in schedule(stage, stages, chunks, micro_batches):
        held += 1 if op.kind == "F" else -1
        most = max(most, held)
    return most


def timeline(
    stages: int,
    chunks: int,
    micro_batches: int,
    forward: float = 1.0,
    backward: float = 2.0,
    costs: Sequence[float] | None = None,
    message: float = 0.0,
) -> list[list[tuple[Op, float, float]]]:
    """(op, start, end) of every op of a step, one list per rank.  An op starts when rank and input are there.

    forward, backward: time of one micro-batch through 1 unit of cost.  costs: of each virtual stage; None shares 1 unit
    per rank evenly among its chunks.  message: time from the end of an op until another rank has its output.
    Raises UserError as `interleaved` does.
    """
    costs = [1 / chunks] * (stages * chunks) if costs is None else costs
    assert len(costs) == stages * chunks
    waiting = [schedule(stage, stages, chunks, micro_batches)[::-1] for stage in range(stages)]  # next op last
    done: list[list[tuple[Op, float, float]]] = [[] for _ in range(stages)]
    ended: dict[tuple[str, int, int], float] = {}  # (kind, virtual stage, micro-batch) -> when

    def run(stage: int) -> bool:
        """Do the rank's next op if its input is known."""
        op = waiting[stage][-1]
        virtual = op.chunk * stages + stage
        source = virtual - 1 if op.kind == "F" else virtual + 1
        free = done[stage][-1][2] if done[stage] else 0.0
        arrival = 0.0  # the embedding needs nobody; nor does the head's gradient, whose forward this rank did before
        if 0 <= source < stages * chunks:
            if (op.kind, source, op.micro) not in ended:
                return False
            arrival = ended[op.kind, source, op.micro] + message
        start = max(free, arrival)
        end = start + costs[virtual] * (forward if op.kind == "F" else backward)
        ended[op.kind, virtual, op.micro] = end
        done[stage].append((waiting[stage].pop(), start, end))
        return True

    while any(waiting):
        moved = [run(stage) for stage in range(stages) if waiting[stage]]
        assert any(moved), "every rank waits for another"
    return done


def bubble(
    stages: int,
    chunks: int,
    micro_batches: int,
    forward: float = 1.0,
    backward: float = 2.0,
    costs: Sequence[float] | None = None,
    message: float = 0.0,
) -> float:
    """Idle share of all ranks' time in a step, from 0 to 1, found by playing the schedule (arguments: `timeline`).

    With equal costs it is (p - 1) / (v m + p - 1) for p stages, v chunks and m micro-batches.
    """
    ranks = timeline(stages, chunks, micro_batches, forward, backward, costs, message)
    busy = math.fsum(end - start for ops in ranks for _, start, end in ops)
    return 1 - busy / (stages * max(ops[-1][2] for ops in ranks))


def cut(costs: Sequence[float], parts: int, first_extra: float, last_extra: float) -> list[tuple[int, int]]:
    """(start, stop) of `parts` contiguous spans of layers, at least one layer each, whose largest cost is least.

    costs: one per layer, any unit.  first_extra is the embedding's, part of the first span's cost; last_extra is the
    head's, part of the last.  Of the cuts that are equally good, the one with the evenest numbers of layers is taken
    (least sum of squares), then the one with the shorter spans first: early stages keep more micro-batches in flight.
    Raises UserError if there are fewer layers than parts.
    """
    layers = len(costs)
    assert parts >= 1
    if parts > layers:
        raise UserError(
            f"parallel.pp x parallel.virtual_pp = {parts} virtual stages, but the model has {layers} layers and each "
            f"stage needs one; lower parallel.pp or parallel.virtual_pp until their product is at most {layers}"
        )

    def cost(part: int, start: int, stop: int) -> float:
        extra = first_extra * (part == 0) + last_extra * (part == parts - 1)
        return math.fsum(costs[start:stop]) + extra  # exact sum: the same layers cost the same in every cut

    # worst[stop]: least possible largest cost when the layers before `stop` are cut into the parts seen so far.
    worst = {stop: cost(0, 0, stop) for stop in range(1, layers + 1)}
    for part in range(1, parts):
        worst = {
            stop: min(max(worst[start], cost(part, start, stop)) for start in range(part, stop))
            for stop in range(part + 1, layers + 1)
        }
    bound = worst[layers]

    # Again, among the cuts within that bound: evenest[stop] is (sum of squares, sizes) of the best one so far.
    evenest: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for part in range(parts):
        grown: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (squares, sizes) in evenest.items():
            for stop in range(start + 1, layers + 1):
                if cost(part, start, stop) <= bound:
                    size = stop - start
                    found = (squares + size**2, (*sizes, size))
                    grown[stop] = min(grown.get(stop, found), found)
        evenest = grown
    return spans_of(evenest[layers][1], layers)


def spans_of(sizes: Sequence[int], layers: int, parts: int | None = None) -> list[tuple[int, int]]:
    """(start, stop) of each virtual stage from parallel.stages, the layers per virtual stage, in the model's order.

    parts: the number of virtual stages that the layout has, checked if given.  Raises UserError, with the arithmetic,
    on sizes that do not add up to `layers`, on an empty stage and on a wrong number of stages.
    """
    given = f"parallel.stages={list(sizes)}"
    if parts is not None and len(sizes) != parts:
        raise UserError(
            f"{given} names {len(sizes)} stages, but parallel.pp x parallel.virtual_pp = {parts}; "
            f"give {parts} sizes, or leave parallel.stages out to have the layers cut by cost"
        )
    if any(size < 1 for size in sizes):
        raise UserError(f"{given}: every stage needs at least one layer; use positive sizes that add up to {layers}")
    if (total := sum(sizes)) != layers:
        what = f"give out {layers - total} more" if total < layers else f"take away {total - layers}"
        raise UserError(f"{given}: {' + '.join(map(str, sizes))} = {total}, but the model has {layers} layers; {what}")
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]


def _alternate(forwards: list[Op], backwards: list[Op], ahead: int) -> list[Op]:
    """`ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
    steady = forwards[ahead:]
    turns = [op for pair in zip(steady, backwards, strict=False) for op in pair]
    return forwards[:ahead] + turns + backwards[len(steady) :]


def _passes(stages: int, chunks: int, micro_batches: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order of the forwards: rounds of `stages` micro-batches, each through every chunk."""
    rounds = [range(i, min(i + stages, micro_batches)) for i in range(0, micro_batches, stages)]
    return [(chunk, i) for members in rounds for chunk in range(chunks) for i in members]


def _check_virtual(stages: int, chunks: int) -> None:
    if stages == 1 and chunks > 1:
        raise UserError(
            f"parallel.virtual_pp={chunks}: virtual stages need parallel.pp above 1, and there is one stage; "
            "use parallel.virtual_pp=1, or parallel.pp=2 or more"
        )

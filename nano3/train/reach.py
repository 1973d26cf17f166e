"""What training reaches: which tensors of a step have a gradient, where weights are frozen.

A block before the first trained weight has no backward pass: it keeps nothing for one, is not computed again, and
sends nothing in it.  In the block of that weight, what comes before the weight has no gradient either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nano3.config import Config
from nano3.model.lora import BIAS, trains


@dataclass(frozen=True)
class Layer:
    """What has a gradient in a block.  Behind a trained weight, everything."""

    kind: str  # its letter
    input: bool  # what the norm gives
    choice: bool  # of a mixture: the routing weights
    routed: bool  # of a mixture: the sum of the routed experts' results
    output: bool  # of the mixer; of a mixture, of its shared expert

    @property
    def runs(self) -> bool:
        """Whether the block has a backward pass at all."""
        return self.routed or self.output


def reach(config: Config, parts: list[tuple[int, int]], names: Iterable[str]) -> tuple[list[list[Layer]], bool]:
    """A rank's layers, those of each of its parts, and whether the last norm's output has a gradient.

    names: of the tensors that the rank holds.  What another stage hands on always has a gradient (`parallel.pipeline`).
    """
    moved = {name for name in names if trains(name, config.peft) and not name.endswith(f".{BIAS}")}  # has no gradient
    found, reached = [], False
    for start, stop in parts:
        reached = start > 0 or "embeddings.weight" in moved
        found.append([])
        for i in range(start, stop):
            letter, here = config.model.hybrid_override_pattern[i], f"layers.{i}."
            mine = {name.removeprefix(here) for name in moved if name.startswith(here)}
            inside = {name.removeprefix("mixer.") for name in mine if name.startswith("mixer.")}
            experts = {name for name in inside if name.startswith("experts.")}
            given = reached or "norm.weight" in mine
            choice = letter == "E" and (given or "gate.weight" in inside)
            routed = choice or bool(experts)
            output = given or bool(inside - experts - {"gate.weight"})
            found[-1].append(Layer(letter, given, choice, routed, output))
            reached = reached or found[-1][-1].runs
    return found, reached or "norm_f.weight" in moved

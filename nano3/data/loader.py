"""From samples to the micro-batches of one rank.

A global batch is samples [first, first + batch), whatever the number of ranks; rank r of dp takes the r-th equal
slice of it, in micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nano3.data.corpus import Dataset


class Batch(NamedTuple):
    """A micro-batch: (B, S) each, int64, on the CPU."""

    tokens: Tensor
    labels: Tensor  # labels[:, t] follows tokens[:, t]
    seq_idx: Tensor | None = None  # the document of each token of packed rows
    real: Tensor | None = None  # bool: False for padding, which then enters no loss, no count and no balance term

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if t is None else t.to(device) for t in self))


def micro_batches(
    data: Dataset, split: str, first: int, batch: int, micro: int, dp_rank: int, dp_size: int
) -> Iterator[Batch]:
    """This rank's share of one global batch, `micro` rows at a time."""
    share = batch // dp_size
    mine = range(first + dp_rank * share, first + (dp_rank + 1) * share)
    for start in mine[::micro]:
        rows = np.stack([data.sample(split, i) for i in range(start, start + micro)])
        window = torch.from_numpy(rows)
        yield Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())

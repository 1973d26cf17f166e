"""From samples to the micro-batches of one rank.

A global batch is samples [first, first + batch), whatever the number of ranks; rank r of dp takes the r-th equal
slice of it, in micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nano3.data.corpus import Dataset


def micro_batches(
    data: Dataset, split: str, first: int, batch: int, micro: int, dp_rank: int, dp_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of one global batch as (tokens, labels) pairs, both (micro, S) int64 on the CPU.

    Labels are the next tokens: labels[:, t] follows tokens[:, t].
    """
    share = batch // dp_size
    mine = range(first + dp_rank * share, first + (dp_rank + 1) * share)
    for start in mine[::micro]:
        rows = np.stack([data.sample(split, i) for i in range(start, start + micro)])
        window = torch.from_numpy(rows)
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()

"""Data parallelism: every rank's gradients are summed.

The loss of a step is already divided by the global number of tokens, so a sum is all that is left to do.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of x over the group, as a new tensor."""
    if group is None:
        return x
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def sum_gradients(gradients: list[Tensor], group: dist.ProcessGroup | None, bucket: int = 1 << 25) -> None:
    """Replace each gradient by its sum over the group, in place.  `bucket`: elements per message."""
    if group is None:
        return
    waiting: list[Tensor] = []
    for i, g in enumerate(gradients):
        waiting.append(g)
        if i + 1 == len(gradients) or sum(t.numel() for t in waiting) >= bucket or gradients[i + 1].dtype != g.dtype:
            flat = torch.cat([t.flatten() for t in waiting])
            dist.all_reduce(flat, group=group)
            for t, total in zip(waiting, flat.split([t.numel() for t in waiting]), strict=True):
                t.copy_(total.view_as(t))
            waiting = []

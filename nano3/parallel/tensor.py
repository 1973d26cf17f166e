"""How a tensor lies over the ranks of one axis, as data: what to take of the whole, and how the parts make it again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._common import result_is_known
from nano3.parallel.collectives import Travelling, arrive, copy_to, depart_gather, depart_scatter, reduce_from
from nano3.parallel.mesh import Axis


def depart_enter(x: Tensor, tp: Axis, whole: bool) -> Travelling:
    """Into a region where each tp rank computes some of the channels of every token; `arrive` gives (B, S, D).

    Between the blocks each rank holds S / tp of the tokens (B, S / tp, D), which are gathered here; `whole`: every rank
    holds all of them already, as in decoding, where there may be fewer tokens than ranks.
    """
    return (copy_to(x, tp.group), None) if whole else depart_gather(x, tp.group)


def depart_leave(y: Tensor, tp: Axis, whole: bool) -> Travelling:
    """Out of it: the ranks' outputs are summands (B, S, D); each keeps its tokens' sum, or, if `whole`, all of them.

    This ends a block, so nobody reads the sum when the block is computed again."""
    return (reduce_from(y, tp.group), None) if whole else depart_scatter(y, tp.group, result_is_known())


def enter(x: Tensor, tp: Axis, whole: bool) -> Tensor:
    """`depart_enter` and arrive at once: where there is nothing to compute meanwhile."""
    return arrive(depart_enter(x, tp, whole))


def leave(y: Tensor, tp: Axis, whole: bool) -> Tensor:
    return arrive(depart_leave(y, tp, whole))


@dataclass(frozen=True)
class Split:
    """`dim` consists of consecutive `pieces`; each is cut evenly over the ranks of `axis`, and a rank has one cut of
    each, one after the other.  `copies` consecutive ranks hold the same cut.  `names` are the pieces', if several."""

    axis: str  # tp or ep
    dim: int
    pieces: tuple[int, ...]
    copies: int = 1
    names: tuple[str, ...] = ("",)

    def take(self, whole: Tensor, axis: Axis) -> Tensor:
        """This rank's part of the whole tensor, a view where the dimension has one piece."""
        parts, index = axis.size // self.copies, axis.rank // self.copies
        cuts = []
        for piece in whole.split(list(self.pieces), self.dim):
            width = piece.shape[self.dim] // parts
            cuts.append(piece.narrow(self.dim, index * width, width))
        return cuts[0] if len(cuts) == 1 else torch.cat(cuts, self.dim)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor from the parts of all ranks of the axis, in order."""
        distinct = parts[:: self.copies]
        widths = [piece // len(distinct) for piece in self.pieces]
        pieces = zip(*(part.split(widths, self.dim) for part in distinct), strict=True)
        return torch.cat([torch.cat(piece, self.dim) for piece in pieces], self.dim)

    def whole_shape(self, local: torch.Size) -> torch.Size:
        out = list(local)
        out[self.dim] = sum(self.pieces)
        return torch.Size(out)

    def shape(self, whole: torch.Size, axis: Axis) -> torch.Size:
        out = list(whole)
        out[self.dim] = sum(self.pieces) // (axis.size // self.copies)
        return torch.Size(out)

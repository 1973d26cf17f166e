"""One row of a batch, whatever it was made from, and the question that every source of data answers.

`seq_idx` numbers the documents of a row, so that convolution, SSD, attention and the balance loss start anew at each.
What is left of a row is padding, a document of its own at the end, numbered PADDING, whose labels are IGNORE: no state
reaches it that matters, and none comes from it.
"""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

IGNORE = -100  # the label of a token without a loss, as in kernels/cross_entropy.py, which data does not import
PADDING = (1 << 30) - 1  # larger than any document's number, since these never decrease along a row; fits int32


class Row(NamedTuple):
    """(S,) int64 each."""

    tokens: np.ndarray
    labels: np.ndarray  # the token that follows, or IGNORE
    seq_idx: np.ndarray | None = None  # the document of each token, or PADDING; None: one document, no padding


class Dataset(Protocol):
    def row(self, split: str, index: int) -> Row:
        """Row `index` of `train` or `valid`, for every index from 0 on; it depends on (seed, index) alone."""
        ...

    def count(self, split: str) -> int | None:
        """How many rows of a split there are before they repeat; None: more than anybody asks for."""
        ...

    about: list[str]  # lines for the log: what was read, and what was left out


class Windows(abc.ABC):
    """A Dataset of running text, made from what is cut out of it.

    isolated: each document of a row is a sequence of its own.  No state passes from one to the next then, and nothing
    is learnt where one ends, since its last token could only guess how an unrelated text begins.
    """

    about: ClassVar[list[str]] = []
    isolated: bool = True

    @abc.abstractmethod
    def window(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(S + 1,) ids, int64, and where among them documents begin, int64."""

    def row(self, split: str, index: int) -> Row:
        ids, starts = self.window(split, index)
        tokens, labels, starts = ids[:-1], ids[1:], starts[starts > 0]
        if not self.isolated or not len(starts):
            return Row(tokens, labels)
        labels = labels.copy()
        labels[starts - 1] = IGNORE
        begins = np.zeros(len(ids), np.int64)
        begins[starts] = 1
        return Row(tokens, labels, np.cumsum(begins[:-1]))

    def count(self, split: str) -> None:
        return None

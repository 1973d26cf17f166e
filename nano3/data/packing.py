"""Several samples in one row: first-fit decreasing, the same on every machine and under every layout.

A row has a fixed number of tokens: documents, numbered in its `seq_idx` from 0, and then padding.  Rows are made from
the samples' lengths alone, so neither tp, cp nor the micro-batch has a say in what is packed with what; without
packing, a row is made of one sample in the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from nano3.config import UserError
from nano3.data.row import IGNORE, PADDING, Row
from nano3.data.supervised import Sample, Samples

WINDOW = 8192  # samples that are packed together: more hardly fill rows better, fewer keep their order better
META = b"nano3.packed"


def pack(lengths: Sequence[int], size: int, window: int = WINDOW) -> list[list[int]]:
    """Which samples share a row of `size` tokens: lists of indices, each index once.

    Of each `window` samples in their order, the longest comes first and goes into the first row that has room
    (first-fit decreasing: at most 11/9 of the fewest possible rows, and 2/3 of one more).  Raises ValueError if a
    length is not between 1 and `size`, or window is below 1.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= size):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit rows of {size} tokens")
    bins: list[list[int]] = []
    for start in range(0, len(lengths), window):
        chunk = lengths[start : start + window]
        room = np.full(len(chunk), size)  # of the rows of this window, opened or not: the first that fits is found
        rows: list[list[int]] = []
        for i in np.argsort(-chunk, kind="stable").tolist():  # among equals, in their order
            row = int(np.argmax(room[: len(rows) + 1] >= chunk[i]))
            if row == len(rows):
                rows.append([])
            rows[row].append(start + i)
            room[row] -= chunk[i]
        bins.extend(sorted(row) for row in rows)
    return bins


def row_of(documents: Sequence[Sample], size: int, pad: int) -> Row:
    """The documents one after the other, then padding with the id `pad`, `size` tokens in all."""
    lengths = [len(d.tokens) for d in documents]
    if (left := size - sum(lengths)) < 0:
        raise ValueError(f"documents of {sum(lengths)} tokens do not fit a row of {size}")
    tokens = np.concatenate([*(d.tokens for d in documents), np.full(left, pad)]).astype(np.int64)
    labels = np.concatenate([*(d.labels for d in documents), np.full(left, IGNORE)]).astype(np.int64)
    return Row(tokens, labels, np.repeat([*range(len(lengths)), PADDING], [*lengths, left]))


class Documents(Protocol):
    """Which documents each row holds."""

    tokens: int  # of all documents

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> list[Sample]: ...


class Packed:
    """Samples in rows of at most `size` tokens: packed, or with window=0 one sample a row.

    The samples are shuffled by `seed` before they are packed, since neighbours are often alike.
    """

    def __init__(self, samples: Samples, size: int, window: int = WINDOW, seed: int = 0) -> None:
        self.samples, self.tokens = samples, int(samples.lengths.sum())
        order = np.random.default_rng([seed, len(samples)]).permutation(len(samples))
        bins = pack(samples.lengths[order], size, window) if window else [[i] for i in range(len(order))]
        self.bins = [order[row].tolist() for row in bins]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, row: int) -> list[Sample]:
        return [self.samples[i] for i in self.bins[row]]


class Rows:
    """A Dataset of supervised samples.

    The rows of `train` come in another order each epoch, those of `valid` always in the same; a row depends on (seed,
    index) alone.  pad: the id in the padding, which nothing depends on.  about: what is known of the samples.
    """

    def __init__(
        self, splits: dict[str, Documents], size: int, seed: int, pad: int = 0, about: Sequence[str] = ()
    ) -> None:
        self.splits, self.S, self.seed, self.pad = splits, size, seed, pad
        if empty := [split for split, documents in splits.items() if not len(documents)]:
            raise UserError(f"dataset: the split {empty[0]} has no samples; give more data or dataset.val_proportion")
        self.about = [*about, self.report()]
        self._order: tuple[int, np.ndarray] | None = None

    def count(self, split: str) -> int:
        return len(self.splits[split])

    def row(self, split: str, index: int) -> Row:
        documents = self.splits[split]
        epoch, place = divmod(index, len(documents))
        if split == "train":
            if self._order is None or self._order[0] != epoch:
                self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(documents)))
            place = int(self._order[1][place])
        return row_of(documents[place], self.S, self.pad)

    def report(self) -> str:
        """One line for the log: rows, documents' tokens, and how much of the rows is real."""
        return "; ".join(
            f"{split}: {len(d):,} rows of {self.S:,} tokens, {efficiency(d, self.S):.1%} of them real"
            for split, d in self.splits.items()
        )


def efficiency(documents: Documents, size: int) -> float:
    """Real tokens over all tokens of the rows."""
    return documents.tokens / max(1, len(documents) * size)


def packed_files(folder: Path) -> dict[str, Path]:
    """The file of each split in a folder of packed rows."""
    return {"train": folder / "training.parquet", "valid": folder / "validation.parquet"}


def write_packed(path: Path, documents: Documents, size: int, tokenizer: str) -> None:
    """Rows to a Parquet file, without their padding; complete or absent.

    Columns, a row of the file being a row of ours: tokens, labels (list of int32) and lengths, of its documents.
    """
    arrow, parquet = _arrow()
    largest = 0

    def batch(rows: Iterable[list[Sample]]) -> object:
        nonlocal largest
        rows = list(rows)
        columns = {
            "tokens": [np.concatenate([d.tokens for d in row]) for row in rows],
            "labels": [np.concatenate([d.labels for d in row]) for row in rows],
            "lengths": [[len(d.tokens) for d in row] for row in rows],
        }
        largest = max([largest, *(int(t.max()) for t in columns["tokens"]), *(int(t.max()) for t in columns["labels"])])
        return arrow.record_batch({k: arrow.array(v, arrow.list_(arrow.int32())) for k, v in columns.items()})

    schema = arrow.schema([(name, arrow.list_(arrow.int32())) for name in ("tokens", "labels", "lengths")])
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with parquet.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(documents), 1024):
                writer.write_batch(batch(documents[i] for i in range(start, min(start + 1024, len(documents)))))
            about = {"size": size, "tokens": documents.tokens, "largest_id": largest, "tokenizer": tokenizer}
            writer.add_key_value_metadata({META: json.dumps(about).encode()})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class PackedFile:
    """The rows of a file that `write_packed` wrote, in memory as int32.

    Raises UserError if it is no such file, or was made for longer rows or a larger vocabulary than asked for.
    """

    def __init__(self, path: Path, size: int, vocab_size: int) -> None:
        arrow, parquet = _arrow()
        try:
            self._table = parquet.read_table(path)
            self.about = json.loads(parquet.read_metadata(path).metadata[META])
        except (OSError, KeyError, TypeError, ValueError, arrow.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"dataset.packed_path={path} is no file of packed rows ({type(error).__name__}: {reason}); "
                "write it again with python -m nano3.data.pack"
            ) from None
        if self.about["size"] > size:
            raise UserError(
                f"dataset.packed_path={path} has rows of {self.about['size']} tokens, more than "
                f"dataset.seq_length={size}; set that to {self.about['size']}, or pack again"
            )
        if self.about["largest_id"] >= vocab_size:
            raise UserError(
                f"dataset.packed_path={path} holds the id {self.about['largest_id']} (of the tokenizer "
                f"{self.about['tokenizer']}), outside model.vocab_size={vocab_size}; pack with the model's tokenizer"
            )
        self.tokens = self.about["tokens"]

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> list[Sample]:
        tokens, labels, lengths = (
            self._table.column(name)[row].values.to_numpy().astype(np.int64) for name in ("tokens", "labels", "lengths")
        )
        ends = np.cumsum(lengths)[:-1]
        return [Sample(*pair) for pair in zip(np.split(tokens, ends), np.split(labels, ends), strict=True)]


def _arrow() -> tuple:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "dataset.packed_path: Parquet files need the pyarrow package; pip install pyarrow, or let "
            "--packed-sequence pack on the fly"
        ) from None
    return pyarrow, pyarrow.parquet

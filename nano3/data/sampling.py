"""GPT samples of an indexed file: documents shuffled and joined, cut into windows, the windows shuffled.

What sample `i` is, in full (any language can reproduce it, from integers alone):

    N ids in the D documents [first, last) of the file, windows of S + 1 ids, a seed.  Epochs e = 0, 1, 2, … follow
    each other without end: epoch e is the documents in the order permutation(D, seed, e, 0), joined, and the epochs
    are joined too.  Window k is ids [k S, k S + S] of that stream, so no id is lost where an epoch ends, and a window
    shares one id with the next (the last label is the next one's first token).
    Epoch e owns the windows that begin in it: k from ceil(e N / S) to ceil((e + 1) N / S).  Sample i belongs to the
    epoch e = i S // N, and is the window ceil(e N / S) + permutation(windows of e, seed, e, 1)[i - ceil(e N / S)].

So a sample depends on (file, S, seed, i) and not on the length of the run: training longer adds samples and moves
none.  A run that ends within an epoch has seen a random part of its windows.  (Megatron builds the order for a given
number of samples, so there it changes with train_iters; our order is not Megatron's.)
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nano3.config import UserError
from nano3.data.indexed import IndexedDataset, sync_folder

MASK = (1 << 64) - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64
VERSION = 1  # raise it when the order of samples changes
SMALL = 1 << 14  # documents and windows of an epoch below which building is faster than opening a file


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The output function of the generator of Steele, Lea and Flood (OOPSLA 2014): a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int) -> np.ndarray:
    """0 … n-1 in an order that depends on `key` alone: sorted by the first n outputs of splitmix64.

    The generator's seed h is 0, then h = splitmix64(h + k + GOLDEN) for each k of `key`; output i is
    splitmix64(h + (i + 1) GOLDEN), modulo 2^64.  All differ, so no sort can disagree.  int32 where that suffices.
    numpy's own shuffles are not used, because their streams may change between its versions.
    """
    h = 0
    for k in key:
        h = int(splitmix64(np.array([(h + k + GOLDEN) & MASK], dtype=np.uint64))[0])
    values = np.arange(1, n + 1, dtype=np.uint64)
    values *= np.uint64(GOLDEN)
    values += np.uint64(h)
    return np.argsort(splitmix64(values)).astype(np.int32 if n < 2**31 else np.int64)


class Cache:
    """Arrays that took time to build, in files that are verified when they are read.

    `folder` is tried first, then a folder of this user in the system's temporary folder; where neither can be
    written, nothing is kept.  A file holds a line of text (a CRC-32 and JSON: the key, and for each array its name,
    type, length, place and CRC-32), then the arrays, which are mapped.  Names carry a hash of the key: whatever
    changes the content changes the name.
    """

    def __init__(self, folder: str | Path) -> None:
        private = Path(tempfile.gettempdir()) / f"nano3-index-{os.getuid() if hasattr(os, 'getuid') else 0}"
        self.folder = next((f for f in (Path(folder), private) if _writable(f)), None)

    def get(self, name: str, key: dict, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays under `key`: from the file, or built and written.  Of many processes, one builds."""
        if self.folder is None:
            return build()
        text = json.dumps(key, sort_keys=True)
        path = self.folder / f"{name}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.n3i"
        if (arrays := _read(path, text)) is None:
            with _lock(path):
                if (arrays := _read(path, text)) is None:
                    arrays = build()
                    with contextlib.suppress(OSError):  # a full disk: the arrays are in memory, and that is enough
                        _write(path, text, arrays)
        return arrays


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _lock(path: Path):
    """Wait for whoever builds the same file.  Only saves work: without locks, all would write the same bytes."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            file = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go when the process ends, however it ends
            stack.callback(path.with_suffix(".lock").unlink, missing_ok=True)
        yield


def _write(path: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    at, table = 0, []
    for name, a in arrays.items():
        table.append([name, a.dtype.newbyteorder("<").str, len(a), at, zlib.crc32(a)])
        at += -(-a.nbytes // 64) * 64
    head = json.dumps({"key": key, "arrays": table}).encode()
    head = f"{zlib.crc32(head):08x} ".encode() + head
    head = head.ljust(-(-(len(head) + 1) // 64) * 64 - 1) + b"\n"  # the arrays begin at a multiple of 64
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(head)
            for a in arrays.values():
                raw = a.astype(a.dtype.newbyteorder("<"), copy=False)
                f.write(raw.data)
                f.write(bytes(-raw.nbytes % 64))
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or None if it is missing, damaged or of another key; then it is built again."""
    try:
        raw = np.memmap(path, mode="r", dtype=np.uint8)
        with path.open("rb") as f:
            line = f.readline(1 << 20)
        checksum, _, text = line.rstrip().partition(b" ")
        head = json.loads(text)
        if int(checksum, 16) != zlib.crc32(text) or head["key"] != key:
            return None
        arrays = {}
        for name, dtype, n, at, checksum in head["arrays"]:
            start, size = len(line) + at, n * np.dtype(dtype).itemsize
            part = raw[start : start + size]
            if part.size != size or zlib.crc32(part) != checksum:
                return None
            arrays[name] = part.view(dtype)
        return arrays
    except (OSError, ValueError, KeyError, TypeError):
        return None


def parse_split(text: str) -> list[Fraction]:
    """The shares of train, valid and test in `dataset.split` ("9999,8,2"), exact, adding up to 1."""
    try:
        parts = [Fraction(p.strip()) for p in str(text).split(",")]
    except (ValueError, ZeroDivisionError):
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or sum(parts) == 0:
        raise UserError(
            f"dataset.split={text}: expected up to three shares, not negative and not all 0, of train, valid and test, "
            "e.g. 9999,8,2"
        )
    parts += [Fraction(0)] * (3 - len(parts))
    return [p / sum(parts) for p in parts]


def split_documents(documents: int, shares: list[Fraction]) -> dict[str, tuple[int, int]]:
    """First and last document (exclusive) of each split, in the file's order; bounds are rounded half up."""
    bounds, total = [0], Fraction(0)
    for share in shares:
        total += share
        bounds.append(int(documents * total + Fraction(1, 2)))
    return dict(zip(("train", "valid", "test"), itertools.pairwise(bounds), strict=True))


class Epoch(NamedTuple):
    """The indices of one epoch: D documents, W windows."""

    documents: np.ndarray  # (D,): document of the split at each place of the epoch's order
    place: np.ndarray  # (W,): place where each window begins, windows in the stream's order
    offset: np.ndarray  # (W,) int64: ids of that document that precede the window
    shuffle: np.ndarray  # (W,): window of the epoch's i-th sample


class Samples:
    """Samples of documents [first, last) of one file, every index from 0 on.

    vocab_size: ids at or above it are refused when they are read, by file and document.
    """

    def __init__(
        self,
        data: IndexedDataset,
        documents: tuple[int, int],
        seq_length: int,
        seed: int,
        cache: Cache,
        vocab_size: int,
    ) -> None:
        self.data, self.S, self.seed, self.cache, self.V = data, seq_length, seed, cache, vocab_size
        self.first, self.last = documents
        starts = data.document_starts(*documents)
        self.ids = int(starts[-1] - starts[0])
        if data.dtype.kind not in "iu":
            raise UserError(f"{data.bin_path}: holds {data.dtype}, which is no token id; give a file of integers")
        if self.ids == 0:
            raise UserError(f"{data.bin_path}: documents {self.first} to {self.last} of {data.documents} hold no id")
        self._epochs: dict[int, Epoch] = {}

    def __len__(self) -> int:
        """Windows that begin in the first epoch."""
        return -(-self.ids // self.S)

    def sample(self, index: int) -> np.ndarray:
        """seq_length + 1 ids, int64."""
        return self.window(index)[0]

    def boundaries(self, index: int) -> np.ndarray:
        """Where documents begin among the seq_length inputs of a sample, (n,) int64, ascending.

        The first entry is always 0, although the document may have begun before the window.
        """
        starts = self.window(index)[1]
        return starts[starts < self.S]

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """seq_length + 1 ids, int64, and where among them documents begin, the first entry 0 in any case."""
        e = index * self.S // self.ids
        epoch = self._epoch(e)
        k = int(epoch.shuffle[index - -(-e * self.ids // self.S)])
        place, offset = int(epoch.place[k]), int(epoch.offset[k])
        out, filled, starts = np.empty(self.S + 1, dtype=np.int64), 0, []
        while filled <= self.S:
            if place == len(epoch.documents):
                e, place = e + 1, 0
                epoch = self._epoch(e)
            document = self.first + int(epoch.documents[place])
            begin, end = self.data.span(document)
            part = self.data.tokens[begin + offset : min(end, begin + offset + self.S + 1 - filled)]
            out[filled : filled + len(part)] = part
            if len(part):
                starts.append(filled)
                if not 0 <= int(part.min()) <= int(part.max()) < self.V:
                    raise bad_ids(self.data, part, self.V, f"document {document}")
            filled, place, offset = filled + len(part), place + 1, 0
        return out, np.array(starts, dtype=np.int64)

    def _epoch(self, e: int) -> Epoch:
        if e not in self._epochs:
            if len(self._epochs) > 2:  # a batch lies in one epoch or two, and a window may reach into the next
                del self._epochs[min(self._epochs)]
            if self.last - self.first + len(self) < SMALL:
                self._epochs[e] = self._build(e)
            else:
                key = {
                    "version": VERSION,
                    "idx": [self.data.idx_path.stat().st_size, self.data.checksum],
                    "documents": [self.first, self.last],
                    "seq_length": self.S,
                    "seed": self.seed,
                    "epoch": e,
                }
                arrays = self.cache.get(self.data.idx_path.stem, key, lambda: self._build(e)._asdict())
                self._epochs[e] = Epoch(**arrays)
        return self._epochs[e]

    def _build(self, e: int) -> Epoch:
        """O(documents + windows) time, about 40 bytes each at the peak."""
        lengths = np.diff(self.data.document_starts(self.first, self.last))
        documents = permutation(len(lengths), self.seed, e, 0)
        lengths = lengths[documents]
        ends = np.cumsum(lengths)
        first, last = (-(-n * self.ids // self.S) for n in (e, e + 1))
        begins = np.arange(last - first, dtype=np.int64) * self.S + (first * self.S - e * self.ids)
        place = np.searchsorted(ends, begins, side="right")  # past empty documents
        offset = begins - (ends[place] - lengths[place])
        return Epoch(documents, place.astype(documents.dtype), offset, permutation(last - first, self.seed, e, 1))


def bad_ids(data: IndexedDataset, ids: np.ndarray, vocab_size: int, where: str) -> UserError:
    low, high = int(ids.min()), int(ids.max())
    return UserError(
        f"{data.bin_path}: {where} has the id {low if low < 0 else high}, outside model.vocab_size={vocab_size}; the "
        "file was made with another tokenizer: prepare it with this model's, or set model.vocab_size"
    )


def check_vocabulary(data: IndexedDataset, vocab_size: int, blocks: int = 64, block: int = 4096) -> None:
    """Look at up to `blocks` x `block` ids spread over the file, and raise UserError if one is outside the vocabulary.

    A file larger than that is not read in full (a terabyte would take an hour): what this look misses is found, and
    refused by name, when the sample that holds it is read.
    """
    n = data.tokens.size
    for i in range(min(blocks, -(-n // block))):
        start = i * max(0, n - block) // max(1, blocks - 1) if n > blocks * block else i * block
        part = data.tokens[start : start + block]
        if not 0 <= int(part.min()) <= int(part.max()) < vocab_size:
            raise bad_ids(data, part, vocab_size, f"ids {start} to {start + len(part)}")

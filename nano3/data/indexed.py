"""Megatron's indexed format: PREFIX.bin holds ids one after the other, PREFIX.idx says where each sequence begins.

The .idx file, little-endian throughout:

    byte 0   9 bytes  b"MMIDIDX\\0\\0"
         9   u64      version, 1
        17   u8       what an id is in the .bin: a number of CODES
        18   u64      n, the number of sequences
        26   u64      d, the length of the last table
        34   i32 [n]  ids in each sequence
             i64 [n]  byte of the .bin where each begins (always the sum of what came before)
             i64 [d]  first sequence of each document, and n at the end
             i8  [n]  mode of each sequence; multimodal files only

Most files hold one sequence per document.  Both files are mapped read-only, so that the ranks of a machine share one
copy in memory; everything in the .idx is checked when it is opened, and nothing is allocated from an unchecked number.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nano3.config import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<QBQQ")  # version, dtype code, sequences, length of the document table
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
TABLES = len(MAGIC) + HEADER.size  # byte 34
BLOCK = 1 << 20  # entries checked or written at a time
LONGEST = 2**31 - 1  # ids in a sequence: its length is an i32


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that Megatron's own tools choose for ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedDataset:
    """A .bin/.idx pair.  Sequence i is `data[i]`; the ids of document d are `data.tokens[slice(*data.span(d))]`.

    tokens: every id, (ids,), of the file's dtype.  lengths: (n,) int32.  pointers: (n,) int64, bytes.
    documents: number of documents.  modes: (n,) int8, or None.  checksum: CRC-32 of the .idx.
    Raises UserError, naming file and byte, if the pair is not what the format says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.idx_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file; a data set PREFIX needs both PREFIX.bin and PREFIX.idx")
        raw = self._header()
        n, d, at = self._n, self._d, TABLES
        self.lengths = raw[at : at + 4 * n].view("<i4")
        self.pointers = raw[at + 4 * n : at + 12 * n].view("<i8")
        self._firsts = raw[at + 12 * n : at + 12 * n + 8 * d].view("<i8")
        end = at + 12 * n + 8 * d
        self.modes = raw[end : end + n].view("i1") if raw.size > end else None
        ids = self._check_sequences()
        self._check_documents()
        self.tokens = _map(self.bin_path).view(self.dtype)
        if self.tokens.size != ids:  # cannot be: the size was checked; a file that changes meanwhile is not worth code
            raise UserError(f"{self.bin_path}: changed while it was opened; wait until it is written")
        if d == 1 and n:  # a writer that never ended a document (Megatron trains on these): a sequence is a document
            self._firsts = np.arange(n + 1, dtype=np.int64)
        self.documents = len(self._firsts) - 1
        self.checksum = 0
        for start in range(0, raw.size, 8 * BLOCK):
            self.checksum = zlib.crc32(raw[start : start + 8 * BLOCK], self.checksum)

    def _bad(self, byte: int, what: str) -> UserError:
        return UserError(
            f"{self.idx_path}: byte {byte}: {what}; the file is damaged or is no Megatron index: copy it again, or "
            "write it anew with python -m nano3.data.prepare"
        )

    def _header(self) -> np.ndarray:
        """Check the first 34 bytes and the two sizes; returns the .idx as bytes."""
        size = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as f:
            head = f.read(TABLES)
        if head[: len(MAGIC)] != MAGIC[: len(head)]:
            raise self._bad(0, f"begins with {head[: len(MAGIC)]!r} instead of {MAGIC!r}")
        if len(head) < TABLES:
            raise self._bad(len(head), f"ends within its header of {TABLES} bytes")
        version, code, self._n, self._d = HEADER.unpack(head[len(MAGIC) :])
        if version != 1:
            raise self._bad(9, f"version {version} instead of 1")
        if code not in CODES:
            raise self._bad(17, f"unknown dtype code {code} (1 to 8 are known)")
        self.dtype = np.dtype(CODES[code])
        if self._d < 1:
            raise self._bad(26, "the table of documents has no entry; an empty one has 1")
        needed = TABLES + 12 * self._n + 8 * self._d
        if size not in (needed, needed + self._n):
            raise self._bad(
                18, f"{self._n} sequences and {self._d} document entries need {needed} bytes, the file has {size}"
            )
        return _map(self.idx_path)

    def _check_sequences(self) -> int:
        """Lengths are not negative, and each sequence begins where the one before it ends.  Returns the ids in all."""
        at, width = 0, self.dtype.itemsize  # bytes of the .bin so far
        for start in range(0, self._n, BLOCK):
            lengths = self.lengths[start : start + BLOCK].astype(np.int64)
            if (lengths < 0).any():
                i = start + int(np.argmax(lengths < 0))
                raise self._bad(TABLES + 4 * i, f"sequence {i} has the length {self.lengths[i]}")
            ends = at + width * np.cumsum(lengths)
            begins = np.concatenate([[at], ends[:-1]])
            if (wrong := self.pointers[start : start + BLOCK] != begins).any():
                i = int(np.argmax(wrong))
                raise self._bad(
                    TABLES + 4 * self._n + 8 * (start + i),
                    f"sequence {start + i} begins at {self.pointers[start + i]}, but what precedes it ends at "
                    f"{begins[i]}",
                )
            at = int(ends[-1])
        size = self.bin_path.stat().st_size
        if size != at:
            kind = "was cut off" if size < at else "belongs to another index, or was appended to"
            raise UserError(
                f"{self.bin_path}: has {size} bytes, but {self.idx_path.name} describes {at} ({self._n} sequences of "
                f"{self.dtype}): the file {kind}; copy both again, or write them anew with python -m nano3.data.prepare"
            )
        return at // width

    def _check_documents(self) -> None:
        at = TABLES + 12 * self._n
        last = 0
        for start in range(0, self._d, BLOCK):
            block = self._firsts[start : start + BLOCK]
            if start == 0 and block[0] != 0:
                raise self._bad(at, f"the first document begins at sequence {block[0]} instead of 0")
            steps = np.diff(block, prepend=last)
            if (steps < 0).any() or block.max() > self._n:
                i = int(np.argmax((steps < 0) | (block > self._n)))
                raise self._bad(
                    at + 8 * (start + i), f"document entry {start + i} is {block[i]}: not in order, or above {self._n}"
                )
            last = int(block[-1])
        if last != self._n and self._d > 1:
            raise self._bad(at + 8 * (self._d - 1), f"the documents end at sequence {last} of {self._n}")

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> np.ndarray:
        """The ids of sequence i, a read-only view."""
        if not 0 <= i < self._n:
            raise IndexError(f"sequence {i} of {self._n}")
        start = int(self.pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[i])]

    def span(self, document: int) -> tuple[int, int]:
        """The first id of a document and the one after its last, as positions in `tokens`."""
        return self._start(int(self._firsts[document])), self._start(int(self._firsts[document + 1]))

    def _start(self, sequence: int) -> int:
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < self._n else self.tokens.size

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """Position in `tokens` of documents first .. last, inclusive; the one after the last stands for the end."""
        sequences = self._firsts[first : last + 1]
        starts = np.full(len(sequences), self.tokens.size, dtype=np.int64)
        inside = sequences < self._n
        starts[inside] = self.pointers[sequences[inside]] // self.dtype.itemsize
        return starts

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return IndexedDataset, (self.prefix,)  # a worker process maps the files itself; their content never travels


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, mapped read-only.  (An empty file cannot be mapped.)"""
    return np.memmap(path, mode="r", dtype=np.uint8) if path.stat().st_size else np.zeros(0, np.uint8)


class IndexedWriter:
    """Writes a pair: `with IndexedWriter(prefix, dtype) as w: w.add(ids)`, a document at a time.

    Ids go to disk as they come; 4 bytes per sequence and 8 per document are kept.  The files appear under their names
    at the end of the block, complete and on disk, the .idx last; after an exception, neither does.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type | str) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {np.dtype(v): k for k, v in CODES.items()}
        if self.dtype not in codes:
            raise UserError(
                f"{prefix}: ids of type {np.dtype(dtype)} have no code in the format; use one of {[*codes]}"
            )
        self._code = codes[self.dtype]
        self._paths = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        self._temporary = [p.with_name(f".{p.name}.{os.getpid()}.tmp") for p in self._paths]
        self._lengths, self._firsts, self.ids = array("i"), array("q", [0]), 0
        integers = self.dtype.kind in "iu"
        self._limits = (np.iinfo(self.dtype).min, np.iinfo(self.dtype).max) if integers else None
        self._bin = self._temporary[0].open("wb", buffering=1 << 20)

    def add(self, ids: np.ndarray | Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Append one document; `lengths` cuts it into sequences.  Raises UserError if an id does not fit the dtype."""
        ids = np.asarray(ids)
        if ids.dtype != self.dtype:
            if ids.size and self._limits and not self._limits[0] <= ids.min() <= ids.max() <= self._limits[1]:
                raise UserError(
                    f"{self._paths[0]}: document {len(self._firsts) - 1} has ids from {ids.min()} to {ids.max()}, "
                    f"which {self.dtype} cannot hold; write with a wider type"
                )
            ids = ids.astype(self.dtype)
        lengths = [ids.size] if lengths is None else lengths
        if sum(lengths) != ids.size or max(lengths, default=0) > LONGEST:
            raise UserError(
                f"{self._paths[0]}: document {len(self._firsts) - 1} of {ids.size} ids cannot be sequences of "
                f"{list(lengths)[:8]}; they must add up, each at most {LONGEST}"
            )
        self._bin.write(ids.tobytes())
        self._lengths.extend(lengths)
        self._firsts.append(len(self._lengths))
        self.ids += ids.size

    @property
    def documents(self) -> int:
        return len(self._firsts) - 1

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._bin.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        _to_disk(self._bin)
        with self._temporary[1].open("wb") as f:
            f.write(MAGIC + HEADER.pack(1, self._code, len(self._lengths), len(self._firsts)))
            f.write(np.frombuffer(self._lengths, np.int32).astype("<i4").tobytes())
            at = 0
            for start in range(0, len(self._lengths), BLOCK):
                ends = at + self.dtype.itemsize * np.cumsum(self._lengths[start : start + BLOCK], dtype=np.int64)
                f.write(np.concatenate([[at], ends[:-1]]).astype("<i8").tobytes())
                at = int(ends[-1])
            f.write(np.frombuffer(self._firsts, np.int64).astype("<i8").tobytes())
            _to_disk(f)
        self._paths[1].unlink(missing_ok=True)  # an older .idx must never describe the new .bin
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            temporary.replace(path)
        sync_folder(self._paths[0].parent)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

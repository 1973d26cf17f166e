"""Files that are written once, from beginning to end, and known by a checksum of each of their blocks.

A reader compares a block in the memory that it was read into and uses it from there, so no file is read twice.  CRC-32
finds every flipped bit and every burst of errors up to 32 bits long, and misses other damage once in 4 billion.  It is
meant for accidents: who alters a file on purpose can alter its checksum, as with any checksum that lies beside it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BLOCK = 1 << 20  # bytes under one checksum: part of the checkpoints' format
PIECE = 1 << 18  # bytes read and written at a time, as cp does; ext4 is several times slower at 1 MB and more
WINDOW = 1 << 24  # bytes between two requests to put on the disk what was written
AHEAD = 1 << 23  # bytes asked for before they are read


class Checksums:
    """CRC-32 of each block of the bytes that it is shown in order; the last block may be shorter."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._running, self._room = 0, BLOCK

    def update(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        while len(view):
            part = view[: self._room]
            self._running = zlib.crc32(part, self._running)
            self._room -= len(part)
            view = view[len(part) :]
            if not self._room:
                self._done.append(self._running)
                self._running, self._room = 0, BLOCK

    def __str__(self) -> str:
        """Eight hexadecimal digits for each block."""
        unfinished = [self._running] if self._room < BLOCK else []
        return "".join(f"{crc:08x}" for crc in [*self._done, *unfinished])


def blocks_in(size: int) -> int:
    return -(-size // BLOCK)


def checksum_of(block: memoryview | bytes) -> str:
    return f"{zlib.crc32(block):08x}"


def expected(checksums: str, index: int) -> str:
    """That of one block among a file's."""
    return checksums[8 * index : 8 * index + 8]


def checksums_of(path: Path) -> str:
    """Of a whole file, which is read."""
    found, buffer = Checksums(), memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as f:
        while count := f.readinto(buffer):
            found.update(buffer[:count])
    return str(found)


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[memoryview | bytes], None]]:
    """A function that appends bytes to a new file, which is on the disk when the body ends.

    Once in a WINDOW the system is asked to put on the disk what was written, and to forget what has arrived there: the
    disk works while we read, the flush at the end finds little to do, and a model of 63 GB does not push everything
    else out of memory.  Above all the same few pages of memory are used again and again: taking new ones for every byte
    written costs more than copying it (`benchmarks/RESULTS.md`, conversion).
    """
    with open(path, "wb") as f:
        since = 0

        def append(data: memoryview | bytes) -> None:
            nonlocal since
            view = memoryview(data)
            for start in range(0, len(view), PIECE):
                since += f.write(view[start : start + PIECE])
                if since >= WINDOW:
                    _advise(f.fileno(), "POSIX_FADV_DONTNEED", 0, 0)
                    since = 0

        yield append
        f.flush()
        os.fsync(f.fileno())
        _advise(f.fileno(), "POSIX_FADV_DONTNEED", 0, 0)


def read_ahead(fd: int, at: int, count: int) -> None:
    """Before `count` bytes are read at `at`, one read after the other: the system is to fetch what lies behind them, in
    larger requests than it makes of its own.  Once in each AHEAD bytes of the file it does something."""
    if at % AHEAD < count:
        _advise(fd, "POSIX_FADV_WILLNEED", at - at % AHEAD + AHEAD, AHEAD)


def _advise(fd: int, advice: str, at: int, count: int) -> None:
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(fd, at, count, getattr(os, advice))

"""One process at a time: a lock that the system frees when its holder is gone, however it ended."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from nano3.config import UserError


@contextlib.contextmanager
def locked(path: Path, refusal: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the file `path`, which is made and stays.  Where the system has no locks, nothing is held.

    Raises UserError, with the text `refusal`, if another process holds it for more than `patience` seconds.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _open.add(file)
    try:
        deadline = time.monotonic() + patience
        while not _taken(file):
            if time.monotonic() >= deadline:
                raise UserError(refusal)
            time.sleep(0.2)
        yield
    finally:
        _open.discard(file)
        os.close(file)


def _let_go() -> None:
    """In a forked process, which would hold the lock as long as it lives."""
    while _open:
        os.close(_open.pop())


_open: set[int] = set()
os.register_at_fork(after_in_child=_let_go)


def _taken(file: int) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # no locks here
        pass
    return True

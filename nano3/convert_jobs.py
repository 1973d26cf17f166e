"""Files written by several threads, with a journal: a run after a kill writes only what was not finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from nano3.config import UserError
from nano3.hf_files import reason
from nano3.train.storage import make_folder

Record = list[int | str]  # a file's size and, where it needs one anyway, its checksum


class Job(NamedTuple):
    """A file to be written.  `write` gives its record, and tells its second argument of bytes; `check` says whether a
    file that exists is still what the record is of."""

    file: str
    bytes: int  # of tensors
    write: Callable[[Path, Callable[[int], None]], Record]
    check: Callable[[Path, Record], bool]


class Meter:
    """Told of the bytes that are moved; this one does not care."""

    def start(self, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


class Bar(Meter):
    """Bytes, speed and time left, on the terminal."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.task = progress, progress.add_task("", total=None)

    def start(self, total: int) -> None:
        self.progress.update(self.task, total=total)

    def advance(self, count: int) -> None:
        self.progress.update(self.task, advance=count)


@contextmanager
def bar(hidden: bool = False) -> Iterator[Meter]:
    """A bar on stderr while the body runs; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    if hidden or not console.is_terminal:
        yield Meter()
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield Bar(progress)


class _Stopped(Exception):
    pass


def journal_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.journal")


@dataclass
class Written:
    """What `journalled` has written: the files' records, and how much this run wrote in which time."""

    records: dict[str, Record]
    bytes: int
    start: float
    journal: Any

    def publishing(self) -> None:
        """Note that the files are about to move to their place: `journal_says(…).publishing` after a kill."""
        _note(self.journal, {"publishing": True})

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.start
        return f"{self.bytes:,} bytes written in {seconds:.1f} s ({self.bytes / 1e9 / seconds:.2f} GB/s)"


class Noted(NamedTuple):
    """What a journal says of a plan; nothing if it is another plan's."""

    plan: bool = False  # the journal is of this plan
    records: Mapping[str, Record] = MappingProxyType({})
    publishing: bool = False
    length: int = 0  # of the journal in bytes, without a last line that a kill cut short


def key_of(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def journal_says(temporary: Path, plan: dict[str, Any]) -> Noted:
    """What an earlier run with the same plan left to be known."""
    try:
        text = journal_of(temporary).read_text()
    except (OSError, ValueError):
        return Noted()
    whole = text[: text.rfind("\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        return Noted()
    if not lines or lines[0] != {"plan": key_of(plan)}:
        return Noted()
    records = {line["file"]: line["record"] for line in lines if "file" in line}
    return Noted(True, records, {"publishing": True} in lines, len(whole))


@contextmanager
def journalled(
    temporary: Path,
    plan: dict[str, Any],
    jobs: list[Job],
    workers: int,
    meter: Meter,
    take_back: Callable[[], None] | None = None,
) -> Iterator[Written]:
    """Write the jobs' files into the folder `temporary`, then run the body, which makes something whole of them, and
    forget the journal.

    Files that an earlier run finished and that are still what it wrote are not written again.
    take_back: brings the files that had moved to their place when a run was killed back into `temporary`.  Raises
    UserError if the disk refuses, or if another process works on the same.
    """
    try:
        make_folder(temporary.parent)
        with open(journal_of(temporary), "a") as journal:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{temporary.parent}: another process is converting into this folder") from None
            records = _finished(journal, plan, temporary, jobs, workers, take_back)
            todo = [job for job in jobs if job.file not in records]
            check_space(temporary.parent, sum(job.bytes for job in todo))
            meter.start(sum(job.bytes for job in jobs))
            meter.advance(sum(job.bytes for job in jobs if job.file in records))
            written = Written(records, sum(job.bytes for job in todo), time.perf_counter(), journal)
            _run(todo, temporary, journal, records, workers, meter)
            yield written
        journal_of(temporary).unlink()
    except OSError as error:
        raise UserError(f"{temporary.parent}: {reason(error)}; what is finished is kept, run again to go on") from None


def _finished(
    journal: Any,
    plan: dict[str, Any],
    temporary: Path,
    jobs: list[Job],
    workers: int,
    take_back: Callable[[], None] | None,
) -> dict[str, Record]:
    """What an earlier run finished; starts the journal anew if there is none of the same plan."""
    noted = journal_says(temporary, plan)
    if noted.publishing and take_back is not None:
        take_back()
    journal.truncate(noted.length)  # first: a journal must not speak of files that are gone
    if not noted.plan or not temporary.is_dir():
        journal.truncate(0)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _note(journal, {"plan": key_of(plan)})
        return {}

    def sound(job: Job) -> bool:
        path, record = temporary / job.file, noted.records.get(job.file)
        return record is not None and path.is_file() and job.check(path, record)

    with ThreadPoolExecutor(workers) as pool:
        kept = pool.map(sound, jobs)
        return {job.file: noted.records[job.file] for job, good in zip(jobs, kept, strict=True) if good}


def _note(journal: Any, line: dict[str, Any]) -> None:
    journal.write(json.dumps(line) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError if there is no room for so many bytes in a folder, which need not exist yet."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(f"{folder}: {needed:,} bytes are to be written and {free:,} are free there; make room")


def _run(
    jobs: list[Job], temporary: Path, journal: Any, records: dict[str, Record], workers: int, meter: Meter
) -> None:
    lock, stop = threading.Lock(), threading.Event()

    def progress(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            meter.advance(count)

    def run(job: Job) -> None:
        progress(0)
        record = job.write(temporary / job.file, progress)
        with lock:
            records[job.file] = record
            _note(journal, {"file": job.file, "record": record})

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when the user interrupts
            failed = any(f.done() and f.exception() for f in futures)
            if failed or not all(f.done() for f in futures):
                stop.set()
    errors = [e for f in futures if (e := f.exception()) is not None and not isinstance(e, _Stopped)]
    if errors:
        raise errors[0]

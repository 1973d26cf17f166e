"""From samples to the micro-batches of one rank.

A global batch is samples [first, first + batch), whatever the number of ranks; rank r of dp takes the r-th equal
slice of it, in micro-batches.  So the content of a batch is a function of (seed, samples seen) alone, and a run goes on
anywhere without reading what came before.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.synchronize import Semaphore
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nano3.config import UserError
from nano3.data.row import PADDING, Dataset


class Batch(NamedTuple):
    """A micro-batch: (B, S) each, int64, on the CPU."""

    tokens: Tensor
    labels: Tensor  # labels[:, t] follows tokens[:, t]
    seq_idx: Tensor | None = None  # the document of each token of packed rows
    real: Tensor | None = None  # bool: False for padding, which then enters no loss, no count and no balance term

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: the tokens of each row that are not padding."""
        if self.real is None:
            return torch.full(self.tokens.shape[:1], self.tokens.shape[1])
        return self.real.sum(1)

    def to(self, device: torch.device) -> Batch:
        """On a device; a GPU's copies go through pinned memory, so that nothing waits for them."""
        here = self.pin_memory() if device.type == "cuda" else self
        return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in here))

    def pin_memory(self) -> Batch:
        """Called by DataLoader too, where a process makes batches ahead of time.  What is pinned stays as it is."""
        return Batch(*(None if t is None else t.pin_memory() for t in self))


class Place(NamedTuple):
    """How a global batch is cut: sequences in it, sequences at once, and which of how many slices is this rank's."""

    batch: int
    micro: int
    dp_rank: int = 0
    dp_size: int = 1

    def samples(self, first: int) -> list[range]:
        """The samples of each of this rank's micro-batches in the global batch that begins with sample `first`."""
        share = self.batch // self.dp_size
        start = first + self.dp_rank * share
        return [range(i, i + self.micro) for i in range(start, start + share, self.micro)]


class _Rows:
    """Micro-batches by the range of their samples: what a worker process makes."""

    def __init__(self, data: Dataset, split: str) -> None:
        self.data, self.split = data, split

    def __getitem__(self, samples: range) -> Batch:
        rows = [self.data.row(self.split, i) for i in samples]
        tokens, labels = (torch.from_numpy(np.stack([getattr(r, f) for r in rows])) for f in ("tokens", "labels"))
        if all(r.seq_idx is None for r in rows):
            return Batch(tokens, labels)
        numbers = [np.zeros_like(r.tokens) if r.seq_idx is None else r.seq_idx for r in rows]
        seq_idx = torch.from_numpy(np.stack(numbers))
        real = seq_idx != PADDING
        return Batch(tokens, labels, seq_idx, None if real.all() else real)


class _Answers(_Rows):
    """The same in a worker process, where a UserError is a value: raised there, it would come as a traceback."""

    def __getitem__(self, samples: range) -> Batch | UserError:
        try:
            return super().__getitem__(samples)
        except UserError as error:
            return error


def micro_batches(data: Dataset, split: str, first: int, place: Place) -> list[Batch]:
    """This rank's share of one global batch."""
    rows = _Rows(data, split)
    return [rows[samples] for samples in place.samples(first)]


def stream(data: Dataset, split: str, first: int, place: Place, workers: int = 0, pin: bool = False) -> Iterator[list]:
    """This rank's share of one global batch after another, from sample `first` on, without end.

    workers: processes that make batches ahead of time; 0 makes each one when it is asked for.  pin: into pinned memory.
    The content depends on neither.
    """

    def asked() -> Iterator[range]:
        at = first
        while True:
            yield from place.samples(at)
            at += place.batch

    count = len(place.samples(first))
    if workers == 0:
        while True:
            yield micro_batches(data, split, first, place)
            first += place.batch
    over = multiprocessing.Semaphore(0)
    loader = DataLoader(
        _Answers(data, split),
        batch_size=None,  # the sampler names whole micro-batches
        sampler=asked(),
        num_workers=workers,
        prefetch_factor=max(2, -(-2 * count // workers)),  # two steps ahead
        pin_memory=pin,
        worker_init_fn=functools.partial(_obey_the_trainer, over),
    )
    batches = iter(loader)
    for _ in range(workers):
        atexit.register(over.release)  # before what DataLoader and multiprocessing do when this process ends
    while True:
        made = list(itertools.islice(batches, count))
        for batch in made:
            if isinstance(batch, UserError):
                raise batch
        yield made


def _obey_the_trainer(over: Semaphore, _: int) -> None:
    """When to stop is the trainer's decision: Ctrl-C reaches every process of a terminal, and a scheduler's SIGTERM
    every one of a job.  A worker that ignores SIGTERM must be told that the trainer has failed, which would otherwise
    wait for it without end."""
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_IGN)
    threading.Thread(target=lambda: over.acquire() and os._exit(0), daemon=True).start()

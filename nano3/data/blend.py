"""Blends: several indexed files sampled in given proportions, in every form that NVIDIA's commands take.

The forms, of which a run gives one (`dataset.` before each name):

    blend, data_paths          PREFIX | [PREFIX, …] | [WEIGHT, PREFIX, …] | [[PREFIX, …], [WEIGHT, …]], or the same
                               tokens in one string; `split` cuts each file into train, valid and test
    data_args_path             a text file of those tokens, separated by white space
    per_split_data_args_path   a JSON object with "train", "valid" and "test", each a list or a string of those tokens
                               (also the flag --per-split-data-args-path)
    blend_per_split            a list of three of the forms of `blend`
    train_data_path, valid_data_path, test_data_path    the same under three names

PREFIX is a path without .bin and .idx.  Without weights, files are sampled in proportion to their ids.  A weight of 0
leaves its file out.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nano3.config import BLEND_FORMS, BLEND_PATHS, DatasetConfig, UserError
from nano3.data.indexed import IndexedDataset
from nano3.data.row import Windows
from nano3.data.sampling import Cache, Samples, check_vocabulary, parse_split, split_documents

T = TypeVar("T")

SPLITS = ("train", "valid", "test")
BLOCK = 1 << 20  # samples whose sources are worked out at a time


class Source(NamedTuple):
    prefix: str
    weight: float | None  # None: in proportion to the file's ids


# --- what the user wrote


def parse_tokens(value: Any, name: str, folder: Path | None = None) -> list[Source]:
    """The sources in one form of `blend`.  Raises UserError, beginning with `name`, on anything that is not one.

    Relative paths start at the working directory, or at `folder` (of the file that names them) if they are there.
    """
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], list):
        return _two_lists(value, name, folder)
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list) or not value:
        what = "is empty" if value in ([], "", None) else f"is {type(value).__name__} {value!r:.60}"
        raise UserError(f"{name} {what}; expected [PREFIX, …] or [WEIGHT, PREFIX, …]")
    for i, item in enumerate(value):
        if not isinstance(item, str | int | float) or isinstance(item, bool) or item == "":
            raise UserError(f"{name}: item {i} is {item!r:.60}; expected a weight or a path without .bin and .idx")
    weights = [_number(item) for item in value]
    if not any(w is not None for w in weights):
        return _sources(name, value, None, folder)
    misplaced = [i for i, w in enumerate(weights) if (w is None) == (i % 2 == 0)]
    if len(value) % 2 or misplaced:
        at = misplaced[0] if misplaced else len(value) - 1
        raise UserError(
            f"{name}: a list with weights is [WEIGHT, PREFIX, WEIGHT, PREFIX, …]; this one has {len(value)} items, and "
            f"item {at}, {value[at]!r}, is out of place (write a path that looks like a number as ./{value[at]})"
        )
    return _sources(name, value[1::2], weights[::2], folder)


def _two_lists(value: list, name: str, folder: Path | None) -> list[Source]:
    """[[PREFIX, …], [WEIGHT, …] or null], as Megatron-Bridge's configuration has it."""
    paths, weights = value
    if weights is not None and (not isinstance(weights, list) or len(weights) != len(paths)):
        raise UserError(f"{name}: {len(paths)} paths need as many weights in the second list, not {weights!r:.60}")
    numbers = None if weights is None else [_number(w) for w in weights]
    if not paths or not all(isinstance(p, str) for p in paths) or (numbers and None in numbers):
        raise UserError(f"{name}: expected [[PREFIX, …], [WEIGHT, …]], not {value!r:.80}")
    return _sources(name, paths, numbers, folder)


def _number(item: Any) -> float | None:
    try:
        return None if isinstance(item, bool) else float(item)
    except (TypeError, ValueError, OverflowError):
        return None


def _sources(name: str, paths: list[str], weights: list[float] | None, folder: Path | None) -> list[Source]:
    if weights is not None:
        for path, weight in zip(paths, weights, strict=True):
            if not math.isfinite(weight) or weight < 0:
                raise UserError(f"{name}: the weight {weight} of {path} must be a number that is not negative")
        if math.fsum(weights) == 0:
            raise UserError(f"{name}: all weights are 0; give at least one file a positive weight")
    prefixes = [_find(name, str(p), folder) for p in paths]
    seen: dict[Path, str] = {}
    for prefix in prefixes:
        if (real := Path(prefix).resolve()) in seen:
            raise UserError(f"{name}: {prefix} is listed twice; list it once, with the sum of its weights")
        seen[real] = prefix
    return [Source(*s) for s in zip(prefixes, weights or itertools.repeat(None), strict=weights is not None)]


def _find(name: str, prefix: str, folder: Path | None) -> str:
    """The prefix of an existing pair."""
    if prefix.endswith((".bin", ".idx")):
        prefix = prefix[:-4]
    for base in (Path(), folder) if folder else (Path(),):
        if Path(f"{base / prefix}.idx").is_file() and Path(f"{base / prefix}.bin").is_file():
            return str(base / prefix)
    missing = next(s for s in (".idx", ".bin") if not Path(f"{prefix}{s}").is_file())
    parent = Path(prefix).parent
    near = difflib.get_close_matches(Path(prefix).name, sorted({p.stem for p in parent.glob("*.idx")}), n=1, cutoff=0.5)
    hint = f"; did you mean {parent / near[0]}?" if near else "; give a path without .bin and .idx"
    raise UserError(f"{name}: {prefix}{missing}: no such file{hint}")


def read_blend(config: DatasetConfig) -> dict[str, list[Source]] | list[Source]:
    """What the settings ask for: sources per split, or sources to be cut by `dataset.split`.

    Raises UserError if two forms are given, or one is wrong.  Of the .bin/.idx files, only existence is checked.
    """
    given = [k for k in BLEND_FORMS if getattr(config, k) is not None]
    paths = [k for k in BLEND_PATHS if getattr(config, k) is not None]
    if len(given) + bool(paths) > 1:
        raise UserError(
            f"{' and '.join(f'dataset.{k}' for k in given + paths)} each name the training data; give one of them"
        )
    if paths:
        if "train_data_path" not in paths:
            raise UserError(f"dataset.{paths[0]} needs dataset.train_data_path beside it")
        return {
            s: parse_tokens(getattr(config, k), f"dataset.{k}") if k in paths else []
            for s, k in zip(SPLITS, BLEND_PATHS, strict=True)
        }
    value, name = getattr(config, given[0]), f"dataset.{given[0]}"
    if given[0] in ("blend", "data_paths"):
        return parse_tokens(value, name)
    if given[0] == "data_args_path":
        return parse_tokens(_text(value, name), f"{name}={value}", Path(value).parent)
    if given[0] == "per_split_data_args_path":
        return _per_split_json(value, name)
    if not isinstance(value, list) or len(value) != 3:
        raise UserError(f"{name}: expected three blends, for train, valid and test, not {value!r:.80}")
    return {s: [] if v in (None, []) else parse_tokens(v, f"{name}: {s}") for s, v in zip(SPLITS, value, strict=True)}


def _text(path: str, name: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}={path}: cannot be read as text ({error}); give the path of a text file") from None


def _per_split_json(path: str, setting: str) -> dict[str, list[Source]]:
    name = f"{setting}={path}"
    try:
        value = json.loads(_text(path, setting))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {error}; write an object with train, valid and test") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected an object with the keys train, valid and test, not {type(value).__name__}")
    if missing := [s for s in SPLITS if s not in value]:
        near = difflib.get_close_matches(missing[0], sorted(set(value) - set(SPLITS)), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r} to be {missing[0]!r}?" if near else "; an empty list means no data"
        raise UserError(f"{name}: the key{'s' * (len(missing) > 1)} {', '.join(missing)} must be there{hint}")
    return {
        s: [] if value[s] in ([], "") else parse_tokens(value[s], f'{name}: "{s}"', Path(path).parent) for s in SPLITS
    }


# --- which source a sample comes from


class Blend:
    """The order in which sources of given weights take turns: (source, its sample) of every sample, in O(1).

    After n samples, each source has been taken within 1 of n times its share.  This is the chairman assignment of
    Tijdeman (Discrete Mathematics 32, 1980): with k sources and d = 1 / (2k - 2), the j-th turn (from 0) of a source
    of share w may be taken from step ceil((j + d) / w) on, and is due at (j + 1 - d) / w; each step, from 1 on, takes
    the turn with the earliest due time among those allowed (of equals, the source listed first).  The plain greedy
    order, by the largest deficit, has no such bound for more than two sources.

    Steps are worked out BLOCK at a time (about a second), each from the state that the one before it left, and cached.
    """

    def __init__(self, weights: list[float], cache: Cache) -> None:
        self.cache = cache
        total = math.fsum(weights)
        self.sources = [i for i, w in enumerate(weights) if w > 0]
        self.shares = np.array([weights[i] / total for i in self.sources])
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # block -> source, its sample
        self._turns = {0: np.zeros(len(self.sources), dtype=np.int64)}  # block -> turns taken before it

    def locate(self, index: int) -> tuple[int, int]:
        """(source, sample of that source) of sample `index`."""
        if len(self.sources) == 1:
            return self.sources[0], index
        b, i = divmod(index, BLOCK)
        if b not in self._blocks:
            self._load(b)
        source, turn = self._blocks[b]
        return self.sources[source[i]], int(turn[i])

    def _load(self, b: int) -> None:
        for known in range(max(k for k in self._turns if k <= b), b + 1):
            key = {"version": 1, "shares": self.shares.tolist(), "block": known, "size": BLOCK}
            arrays = self.cache.get("blend", key, lambda k=known: {"source": self._order(k)})
            source = arrays["source"]
            self._turns[known + 1] = self._turns[known] + np.bincount(source, minlength=len(self.sources))
        turn = np.empty(BLOCK, dtype=np.int64)
        for s, taken in enumerate(self._turns[b].tolist()):
            mine = np.flatnonzero(source == s)
            turn[mine] = np.arange(taken, taken + len(mine))
        if len(self._blocks) > 1:  # a batch lies in one block or two
            del self._blocks[next(iter(self._blocks))]  # the one loaded first
        self._blocks[b] = (source, turn)

    def _order(self, b: int) -> np.ndarray:
        """The sources of steps b BLOCK + 1 … (b + 1) BLOCK, (BLOCK,) uint8 or uint16."""
        k, first, last = len(self.sources), b * BLOCK + 1, (b + 1) * BLOCK
        slack = 1 / (2 * k - 2)
        turns = [np.arange(t, t + int(BLOCK * w) + 3) for t, w in zip(self._turns[b], self.shares, strict=True)]
        allowed = np.concatenate([np.ceil((t + slack) / w) for t, w in zip(turns, self.shares, strict=True)])
        due = np.concatenate([(t + 1 - slack) / w for t, w in zip(turns, self.shares, strict=True)])
        source = np.repeat(np.arange(k, dtype=np.uint8 if k <= 256 else np.uint16), [len(t) for t in turns])
        inside = allowed <= last
        allowed, due, source = allowed[inside], due[inside], source[inside]
        by_due = np.argsort(due, kind="stable")  # the heap below holds ranks in this order: small integers
        rank = np.empty_like(by_due)
        rank[by_due] = np.arange(len(by_due))
        by_time = np.argsort(allowed, kind="stable")
        waiting = rank[by_time].tolist()
        # how many may be taken by each step
        ready = np.searchsorted(allowed[by_time], np.arange(first, last + 1), side="right").tolist()
        heap, pushed, order = waiting[: ready[0]], ready[0], []
        heapify(heap)
        for r in ready:
            while pushed < r:
                heappush(heap, waiting[pushed])
                pushed += 1
            order.append(heappop(heap))
        return source[by_due[order]]


# --- the data set


class BlendedDataset(Windows):
    """A Dataset (see corpus.py) over indexed files.  sources: what each split is made of, see `read_blend`."""

    def __init__(
        self,
        config: DatasetConfig,
        sources: dict[str, list[Source]] | list[Source],
        seed: int,
        vocab_size: int,
        valid: bool,
    ) -> None:
        self.isolated = config.reset_attention_mask
        self.seed, self.S, self.V, self._folder = seed, config.seq_length, vocab_size, config.path_to_cache
        self._files: dict[str, IndexedDataset] = {}
        self.splits: dict[str, tuple[Blend, list[Samples | None]]] = {}
        shares = parse_split(config.split)
        for split in ("train", "valid") if valid else ("train",):
            listed = sources[split] if isinstance(sources, dict) else sources
            if not listed:
                raise UserError(
                    f"the blend names no {split} data; add some"
                    + (", or set validation.eval_iters=0" if split == "valid" else "")
                )
            self._build(split, listed, None if isinstance(sources, dict) else shares, config.split)

    def _build(self, split: str, listed: list[Source], shares: list | None, text: str) -> None:
        parts: list[Samples | None] = []
        for source in listed:
            if source.weight == 0:
                parts.append(None)
                continue
            data = self._open(source.prefix)
            span = (0, data.documents) if shares is None else split_documents(data.documents, shares)[split]
            if span[0] == span[1]:
                why = "holds no document" if shares is None else f"has {data.documents} documents, of which"
                tail = "" if shares is None else f" dataset.split={text} leaves none for {split}; raise that share"
                raise UserError(f"{data.idx_path} {why}{tail or '; leave it out'}")
            seed = self.seed if split == "train" else 0  # every run is measured on the same text
            parts.append(Samples(data, span, self.S, seed, self._cache(source.prefix), self.V))
        weights = [p.ids if s.weight is None else s.weight for s, p in zip(listed, parts, strict=True)]
        self.splits[split] = (Blend(weights, self._cache(listed[0].prefix)), parts)

    def _open(self, prefix: str) -> IndexedDataset:
        if prefix not in self._files:
            self._files[prefix] = IndexedDataset(prefix)
            check_vocabulary(self._files[prefix], self.V)
        return self._files[prefix]

    def _cache(self, prefix: str) -> Cache:
        return Cache(self._folder or Path(prefix).parent / "nano3_index")

    def sample(self, split: str, index: int) -> np.ndarray:
        """seq_length + 1 ids, int64, of split `train` or `valid`."""
        return self.window(split, index)[0]

    def boundaries(self, split: str, index: int) -> np.ndarray:
        """Where documents begin among the seq_length inputs of a sample; see Samples.boundaries."""
        return self._part(split, index, Samples.boundaries)

    def window(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A sample, and where documents begin in it; see Samples.window."""
        return self._part(split, index, Samples.window)

    def _part(self, split: str, index: int, read: Callable[[Samples, int], T]) -> T:
        blend, parts = self.splits[split]
        source, i = blend.locate(index)
        return read(parts[source], i)


def load_blend(config: DatasetConfig, seed: int, vocab_size: int, valid: bool) -> BlendedDataset:
    """The data set that the settings describe.  valid: is validation data needed?"""
    return BlendedDataset(config, read_blend(config), seed, vocab_size, valid)

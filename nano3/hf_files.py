"""Model folders of other people, read with suspicion: JSON, safetensors headers, shard indices, and their bytes.

Every length, offset and name in such a folder is a claim.  It is checked against the size of the file and against the
other claims before anything is allocated or opened, and what does not hold ends in one UserError that names the file.
Nothing is unpickled and no code in the folder is run.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nano3.blocks import PIECE, new_file, read_ahead
from nano3.config import UserError

BITS = {  # of an element, by safetensors' name of its type
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
    **{"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64},
}
LARGEST_JSON = 16 << 20  # bytes; the largest released index of the family, 43,000 tensors, has 5 MB
LARGEST_CONFIG = 1 << 20
LARGEST_RANK = 8
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Span(NamedTuple):
    """A tensor in a file: its elements in order are the bytes from `start` to `end`."""

    path: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    start: int
    end: int


def quote(text: object) -> str:
    """For messages: on one line, no longer than is useful, no control characters."""
    shown = repr(text[:200] if isinstance(text, str | bytes) else text)
    return shown if len(shown) <= 100 else shown[:100] + "…"


def locate(folder: Path, name: str) -> Path:
    """The path of a regular file in a folder whose name was read in another file.

    Symbolic links may lead to another place of the folder, or, in the cache of huggingface_hub, where the files of
    every snapshot are links, to the `blobs` of the same model.  Raises UserError for anything else.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0") or not name.isprintable():
        raise UserError(
            f"{folder}: {quote(name)} is not the plain name of a file; take the model from its source again"
        )
    home = folder.resolve()
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    path = folder / name
    try:
        real = path.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; take the model from its source again") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if not any(real.is_relative_to(root) for root in roots):
        raise UserError(f"{path} is a link out of its folder; put the file itself there")
    if not regular:
        raise UserError(f"{path} is not a regular file")
    return real


def reason(error: BaseException) -> str:
    """What an exception says, on one line, in characters that a terminal only shows."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def read_json(path: Path, data: bytes | None = None, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """The object in a JSON file (or in `data`, a part of it), its keys unique at every level."""
    try:
        if data is None:
            with open_file(path) as (fd, size):
                if size > limit:
                    raise UserError(f"{path} has {size:,} bytes, which is too large for such a file (limit {limit:,})")
                data = os.pread(fd, size, 0)
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not valid JSON ({reason(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"the key {quote(twice)} appears twice")
    return out


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


@contextmanager
def open_file(path: Path) -> Iterator[tuple[int, int]]:
    """A regular file's descriptor and size.  Raises UserError if there is no such file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in the place of a file would block
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path} is not a regular file")
        yield fd, about.st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    finally:
        os.close(fd)


def read_header(path: Path) -> dict[str, Span]:
    """The tensors of a safetensors file, in the order of their bytes, which must fill the file without gap or overlap.

    Source: the format's description, https://huggingface.co/docs/safetensors.  Raises UserError.
    """
    with open_file(path) as (fd, size):
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is cut short: its header does not fit into its {size:,} bytes")
        if length > LARGEST_JSON:
            raise UserError(f"{path} claims a header of {length:,} bytes (limit {LARGEST_JSON:,})")
        raw = read_json(path, os.pread(fd, length, 8))
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path} is damaged: __metadata__ must hold texts")
    base = 8 + length
    spans = {name: _span(path, name, about, base, size) for name, about in raw.items()}
    spans = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)))
    at = base
    for name, span in spans.items():
        if span.start != at:
            what = "overlaps the tensor before it" if span.start < at else "leaves a gap before it"
            raise UserError(f"{path} is damaged: {quote(name)} {what}")
        at = span.end
    if at != size:
        raise UserError(f"{path} is damaged: its tensors end at byte {at:,}, the file at {size:,}")
    return spans


def _span(path: Path, name: str, about: object, base: int, size: int) -> Span:
    def whole(values: object, count: int | None = None) -> bool:
        return (
            isinstance(values, list)
            and (count is None or len(values) == count)
            and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
        )

    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path} is damaged: {quote(name)} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UserError(f"{path}: {quote(name)} has the unknown dtype {quote(dtype)}")
    if not whole(shape) or len(shape) > LARGEST_RANK:
        raise UserError(f"{path} is damaged: {quote(name)} has the shape {quote(shape)}")
    if not whole(offsets, 2) or not offsets[0] <= offsets[1] <= size - base:
        raise UserError(f"{path} is cut short or damaged: {quote(name)} has the data_offsets {quote(offsets)}")
    if (bits := prod(shape) * BITS[dtype]) != 8 * (offsets[1] - offsets[0]):
        raise UserError(
            f"{path} is damaged: {quote(name)} of shape {quote(shape)} in {dtype} needs {bits // 8:,} bytes, "
            f"but its data_offsets {offsets} hold {offsets[1] - offsets[0]:,}"
        )
    return Span(path, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def read_folder(folder: Path) -> dict[str, Span]:
    """Every tensor of a model folder by the name in its files: one safetensors file, or shards and their index.

    Raises UserError if files and index disagree in anything.
    """
    has_index, has_single = (os.path.lexists(folder / n) for n in (INDEX, SINGLE))
    if not has_index and not has_single:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        remedy = "has only pickled weights, which nano3 never opens; take" if pickled else "has no model; give"
        raise UserError(f"{folder} {remedy} a folder with {SINGLE}, or with {INDEX} and its shards")
    if not has_index:
        return read_header(locate(folder, SINGLE))
    index = read_json(locate(folder, INDEX)).get("weight_map")
    if not isinstance(index, dict):
        raise UserError(f"{folder / INDEX} is damaged: no weight_map")
    if bad := [v for v in index.values() if not isinstance(v, str) or not v.endswith(".safetensors")]:
        raise UserError(f"{folder / INDEX} is damaged: {quote(bad[0])} is not the name of a safetensors file")
    if has_single and SINGLE not in index.values():
        raise UserError(f"{folder} has {SINGLE} and {INDEX}, two models perhaps; keep the one that is meant")
    spans: dict[str, Span] = {}
    for shard in sorted(set(index.values())):
        found = read_header(locate(folder, shard))
        for name, span in found.items():
            if index.get(name) != shard:
                where = f"in {quote(index[name])}" if name in index else "nowhere"
                raise UserError(f"{folder / INDEX}: {quote(name)} lies in {shard}, but the index has it {where}")
            spans[name] = span
    if absent := sorted(index.keys() - spans.keys()):
        name = absent[0]
        raise UserError(f"{folder / INDEX}: {quote(name)} is not in {quote(index[name])}, where the index has it")
    return spans


class Files:
    """The bytes of many files, for any number of threads; where to read was checked when the headers were."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._mine = threading.local()

    def blocks(self, path: Path, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from `start` to `end`, in pieces of PIECE and a rest.

        A piece is valid until the next one is asked for by the same thread, and begins with a whole element of any
        dtype if `start` is where one begins.  Plain reads into one small buffer, not the map: they are faster here, and
        a file that shrinks meanwhile is an error, not the end of the process.
        """
        if not hasattr(self._mine, "buffer"):
            self._mine.buffer = memoryview(bytearray(PIECE))
        for at in range(start, end, PIECE):
            piece = self._mine.buffer[: min(PIECE, end - at)]
            self._fill(piece, path, at)
            yield piece

    def _fill(self, buffer: memoryview, path: Path, at: int) -> None:
        """Read as many bytes as the buffer has, from `at` on."""
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            fd = self._open[path]
        read_ahead(fd, at, len(buffer))
        filled = 0
        while filled < len(buffer):
            got = os.preadv(fd, [buffer[filled:]], at + filled)
            if got == 0:
                raise UserError(f"{path} became shorter while it was read; run the command again")
            filled += got

    def array(self, span: Span) -> np.ndarray:
        """A tensor's elements over the file's map, as integers of their width: nothing is read until it is used."""
        width = BITS[span.dtype] // 8
        if span.start == span.end:
            return np.empty(span.shape, f"i{width}")
        with self._lock:
            if span.path not in self._maps:
                with open_file(span.path) as (fd, _):
                    self._maps[span.path] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            view = self._maps[span.path]
        if len(view) < span.end:
            raise UserError(f"{span.path} became shorter while it was read; run the command again")
        return np.frombuffer(view, f"i{width}", prod(span.shape), span.start).reshape(span.shape)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        self._maps.clear()  # unmapped when the last array is gone


class Target(NamedTuple):
    """A tensor to be written.  data: its bytes in order, in pieces."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    data: Callable[[], Iterable[memoryview]]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8


def file_of(targets: list[Target]) -> Iterator[memoryview | bytes]:
    """The bytes of a safetensors file, in pieces; the same for the same targets.

    Wider elements come first, so that every tensor begins at a multiple of its element size.
    """
    targets = sorted(targets, key=lambda t: -BITS[t.dtype])  # stable
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # older readers refuse a file without it
    at = 0
    for t in targets:
        header[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": (at, at + t.bytes)}
        at += t.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for t in targets:
        size = 0
        for block in t.data():
            yield block
            size += len(block)
        if size != t.bytes:
            raise ValueError(f"{t.name} has {size} bytes instead of {t.bytes}")


def write_safetensors(path: Path, targets: list[Target], progress: Callable[[int], None]) -> int:
    """Stream a safetensors file to disk and flush it.  Returns its size."""
    size = 0
    with new_file(path) as append:
        for block in file_of(targets):
            append(block)
            size += len(block)
            progress(len(block))
    return size


def is_file_of(path: Path, targets: list[Target]) -> bool:
    """Whether a file is what `write_safetensors` makes of the targets, to the last bit."""
    with open(path, "rb") as f:
        return all(f.read(len(block)) == block for block in file_of(targets)) and not f.read(1)

"""What a checkpoint is on disk: safetensors files and a manifest that says which part of which tensor each one holds.

    DIR/iter_0000200/   config.yaml   *.safetensors   manifest.json
    DIR/latest_checkpointed_iteration.txt

It is written under a temporary name, every file flushed to disk, and renamed when it is whole; only then is the pointer
replaced.  The manifest lists size and checksums of each file, one for each of its blocks (`nano3/blocks.py`), and for
each tensor its dtype, its shape and its chunks, so any part of any tensor can be read whatever wrote it; it has a
SHA-256 of its own.  Nothing is ever unpickled.

Names that begin with a dot belong to work in progress, or to work that was killed; `find` says what they mean.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nano3.blocks import PIECE, Checksums, blocks_in, checksums_of, new_file
from nano3.config import UserError

FORMAT = 4
READABLE = (3, FORMAT)  # 3 had one SHA-256 for each file
POINTER = "latest_checkpointed_iteration.txt"
NEXT = f".{POINTER}"  # what the pointer will be once the checkpoint has its name
MANIFEST = "manifest.json"
DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    iteration: int = 0  # optimizer steps done
    samples: int = 0
    tokens: int = 0  # tokens that carried a loss


class Chunk(NamedTuple):
    """A box of a tensor, in one file."""

    file: str
    name: str  # in the file
    offsets: tuple[int, ...]  # of its first element in the tensor
    shape: tuple[int, ...]


@dataclass
class Entry:
    """One tensor: its chunks tile it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)


class FileRecord(NamedTuple):
    bytes: int
    crc32: str  # of its blocks in order
    sha256: str = ""  # of the whole instead, where format 3 is read


@dataclass
class Manifest:
    progress: Progress
    files: dict[str, FileRecord]
    tensors: dict[str, Entry]

    def to_json(self) -> str:
        tensors = {
            key: {"dtype": NAMES[e.dtype], "shape": e.shape, "chunks": [c._asdict() for c in e.chunks]}
            for key, e in self.tensors.items()
        }
        files = {name: {"bytes": r.bytes, "crc32": r.crc32} for name, r in self.files.items()}
        body = {"progress": asdict(self.progress), "files": files, "tensors": tensors}
        return json.dumps({"format": FORMAT, "sha256": _sum(body), **body}, indent=1)


def _sum(body: dict) -> str:
    """A digest of what a manifest says, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Item:
    """A chunk to be written.  data: its elements in order, as CPU tensors or buffers of bytes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    chunk: tuple[int, ...]
    data: Callable[[], Iterable[Tensor | memoryview | bytes]]

    @property
    def name(self) -> str:
        """In the file: the key, and where the chunk begins unless it is the whole."""
        return self.key if self.chunk == self.shape else f"{self.key}@{','.join(map(str, self.offsets))}"

    @property
    def bytes(self) -> int:
        return prod(self.chunk) * self.dtype.itemsize


def as_bytes(data: Tensor | memoryview | bytes) -> memoryview:
    if isinstance(data, Tensor):
        data = data.detach().contiguous().view(-1).view(torch.uint8).numpy() if data.numel() else b""
    return memoryview(data).cast("B")


def write_file(path: Path, items: Sequence[Item], progress: Callable[[int], None] | None = None) -> FileRecord:
    """Stream a safetensors file to disk and flush it.  `progress` is told of every piece of bytes written."""
    ends = list(accumulate(item.bytes for item in items))
    header = {
        item.name: {"dtype": NAMES[item.dtype], "shape": item.chunk, "data_offsets": (end - item.bytes, end)}
        for item, end in zip(items, ends, strict=True)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as safetensors' own writer has it
    checksums, total = Checksums(), 0
    with new_file(path) as append:
        for part in (len(text).to_bytes(8, "little"), text):
            checksums.update(part)
            append(part)
        for item in items:
            written = 0
            for data in item.data():
                view = as_bytes(data)
                for start in range(0, len(view), PIECE):
                    piece = view[start : start + PIECE]
                    checksums.update(piece)
                    append(piece)
                    if progress is not None:
                        progress(len(piece))
                written += len(view)
            if written != item.bytes:
                raise ValueError(f"{path}: {item.name} has {written} bytes instead of {item.bytes}")
            total += written
    return FileRecord(8 + len(text) + total, str(checksums))


def manifest_of(progress: Progress, written: dict[str, tuple[FileRecord, Sequence[Item]]]) -> Manifest:
    """The manifest of these files and what was written into them."""
    manifest = Manifest(progress, {}, {})
    for file, (record, items) in sorted(written.items()):
        manifest.files[file] = record
        for item in items:
            entry = manifest.tensors.setdefault(item.key, Entry(item.dtype, item.shape))
            entry.chunks.append(Chunk(file, item.name, item.offsets, item.chunk))
    return manifest


def foreign(folder: Path) -> bool:
    """Whether another program made what has a checkpoint's name; one of ours may be damaged."""
    return folder.exists() and not any((folder / name).exists() for name in (MANIFEST, "config.yaml"))


def temporary_folder(final: Path) -> Path:
    """Where a checkpoint is written before it has its name; nothing takes it for one."""
    return final.with_name(f".incomplete_{final.name}")


def replaced_folder(final: Path) -> Path:
    """Where an older checkpoint of the same name waits until the new one has it."""
    return final.with_name(f".replaced_{final.name}")


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Make a checkpoint of the finished files in `temporary`, and point to it.

    Killed at any moment, `find` has the older one or this one.  The manifest lists the small files beside the tensors
    as well.  Raises FileExistsError if something that is no checkpoint of ours has the name.
    """
    if foreign(final):
        raise FileExistsError(f"{final} is there and is not nano3's; move it away")
    for path in sorted(temporary.rglob("*")):
        name = path.relative_to(temporary).as_posix()
        if path.is_file() and name not in manifest.files and name != MANIFEST:
            manifest.files[name] = FileRecord(path.stat().st_size, checksums_of(path))
    (temporary / MANIFEST).write_text(manifest.to_json())
    for path in [*temporary.rglob("*"), temporary]:
        flush(path)
    folder, replaced = final.parent, replaced_folder(final)
    if final.exists():  # a run that went back and came here again
        remove(replaced)
        final.rename(replaced)
    (folder / NEXT).write_text(str(manifest.progress.iteration))
    flush(folder / NEXT)
    temporary.rename(final)
    flush(folder)  # a pointer on the disk must not be ahead of what it points to
    (folder / NEXT).replace(folder / POINTER)
    flush(folder)
    for old in folder.glob(replaced_folder(Path("iter_*")).name):
        remove(old)


def remove(folder: Path) -> None:
    """Delete a folder that may be a checkpoint: at once it is none, whenever the deletion is cut short."""
    if folder.exists():
        gone = folder.with_name(f".deleted_{folder.name.lstrip('.')}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what killed runs left half-written or half-deleted; an import that can go on has a journal and stays."""
    for old in [*folder.glob(temporary_folder(Path("iter_*")).name), *folder.glob(".deleted_*")]:
        if not old.with_name(f"{old.name}.journal").exists():
            shutil.rmtree(old, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """mkdir -p, with each new name flushed to disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def iterations(folder: Path) -> list[Path]:
    """The folders that have a checkpoint's name, in the order of their numbers."""
    named = [p for p in folder.glob("iter_*") if re.fullmatch(r"iter_[0-9]+", p.name)]
    return sorted(named, key=lambda p: int(p.name[5:]))


def pointed_to(pointer: Path) -> Path | None:
    """The checkpoint that a pointer names, there or not; None if there is no pointer or no number in it."""
    try:
        text = pointer.read_bytes().strip()
    except OSError:
        return None
    return pointer.parent / f"iter_{int(text):07d}" if re.fullmatch(rb"[0-9]{1,18}", text) else None


def flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def intact(path: Path, record: FileRecord) -> bool:
    """Whether a file has the checksums that were noted when it was written."""
    return digest(path) == record.sha256 if record.sha256 else checksums_of(path) == record.crc32


def read_manifest(folder: Path, setting: str) -> Manifest:
    """The manifest of a checkpoint, well-formed, every file present and of the right size; contents are not read.

    Raises UserError naming the file that is wrong.  `setting` is named in errors.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text())
        version = raw["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{setting}: {path} is damaged") from None
    if version not in READABLE:
        remedy = "update nano3" if isinstance(version, int) and version > FORMAT else "it was written by an older nano3"
        raise UserError(
            f"{setting}: {folder} has format {version}, this nano3 reads {READABLE[0]} to {FORMAT}; {remedy}"
        )
    try:
        files = {str(n): _record(r, version) for n, r in raw["files"].items()}
        tensors = {str(k): _entry(e) for k, e in raw["tensors"].items()}
        progress = Progress(**{k: int(v) for k, v in raw["progress"].items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{setting}: {path} is damaged") from None
    if raw.get("sha256") != _sum({key: raw[key] for key in ("progress", "files", "tensors")}):
        raise UserError(f"{setting}: {path} was altered: its checksum is not its own")
    for name, record in files.items():
        file, inside = folder / name, not name.startswith("/") and ".." not in Path(name).parts
        if not inside or not file.is_file() or file.stat().st_size != record.bytes:
            raise UserError(f"{setting}: {file} is missing or cut short")
    for key, entry in tensors.items():
        if any(c.file not in files for c in entry.chunks):
            raise UserError(f"{setting}: {path} is damaged: {key} lies in a file that it does not list")
        if sum(prod(c.shape) for c in entry.chunks) != prod(entry.shape):
            raise UserError(f"{setting}: {path} is damaged: the chunks of {key} do not make {entry.shape}")
    return Manifest(progress, files, tensors)


def _record(raw: dict, version: int) -> FileRecord:
    if version == 3:
        return FileRecord(int(raw["bytes"]), "", str(raw["sha256"]))
    record = FileRecord(int(raw["bytes"]), str(raw["crc32"]))
    if len(record.crc32) != 8 * blocks_in(record.bytes):
        raise ValueError("another number of checksums than of blocks")
    return record


def _entry(raw: dict) -> Entry:
    chunks = [
        Chunk(str(c["file"]), str(c["name"]), tuple(map(int, c["offsets"])), tuple(map(int, c["shape"])))
        for c in raw["chunks"]
    ]
    entry = Entry(DTYPES[raw["dtype"]], tuple(map(int, raw["shape"])), chunks)
    for c in chunks:
        inside = (o >= 0 and o + s <= n for o, s, n in zip(c.offsets, c.shape, entry.shape, strict=True))
        if not all(inside):
            raise ValueError(c.name)
    return entry


def verify(folder: Path, manifest: Manifest, setting: str, part: int = 0, parts: int = 1, workers: int = 2) -> None:
    """Compare checksums of every `parts`-th file.  Raises UserError naming the first that was altered."""
    mine = sorted(manifest.files)[part::parts]
    with ThreadPoolExecutor(workers) as pool:
        for name, good in zip(mine, pool.map(lambda n: intact(folder / n, manifest.files[n]), mine), strict=True):
            if not good:
                raise UserError(f"{setting}: {folder / name} was altered: its checksum is not the manifest's")


class Container:
    """A checkpoint's tensors, memory-mapped: what is not asked for is not read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.entries = folder, manifest.tensors
        self._maps: dict[str, tuple[mmap.mmap, dict[str, tuple[int, int]]]] = {}

    def _open(self, file: str) -> tuple[mmap.mmap, dict[str, tuple[int, int]]]:
        """The file's bytes, and where each tensor in it begins and ends."""
        if file not in self._maps:
            with open(self.folder / file, "rb") as f:
                view = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # private, so that torch may wrap it
            base = 8 + int.from_bytes(view[:8], "little")
            header = json.loads(view[8:base])
            spans = {n: tuple(base + o for o in h["data_offsets"]) for n, h in header.items() if n != "__metadata__"}
            self._maps[file] = view, spans
        return self._maps[file]

    def raw(self, chunk: Chunk) -> memoryview:
        """The bytes of one chunk."""
        view, spans = self._open(chunk.file)
        start, end = spans[chunk.name]
        return memoryview(view)[start:end]

    def chunk(self, key: str, chunk: Chunk) -> Tensor:
        """One chunk as a tensor over the map."""
        dtype = self.entries[key].dtype
        if prod(chunk.shape) == 0:
            return torch.empty(chunk.shape, dtype=dtype)
        return torch.frombuffer(self.raw(chunk), dtype=torch.uint8).view(dtype).view(chunk.shape)

    def read(self, key: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A box of a tensor (a slice with a step of 1 per leading dimension), put together from the chunks."""
        entry = self.entries[key]
        spans = [s.indices(n)[:2] for s, n in zip(index, entry.shape, strict=False)]
        spans += [(0, n) for n in entry.shape[len(spans) :]]
        out = torch.empty([b - a for a, b in spans], dtype=entry.dtype)
        for c in entry.chunks:
            box = [
                (max(a, o), min(b, o + n)) for (a, b), o, n in zip(spans, c.offsets, c.shape, strict=True)
            ]  # in common
            if any(a >= b for a, b in box):
                continue
            target = tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(box, spans, strict=True))
            source = tuple(slice(a - o, b - o) for (a, b), o in zip(box, c.offsets, strict=True))
            out[target] = self.chunk(key, c)[source]
        return out

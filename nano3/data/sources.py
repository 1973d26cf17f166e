"""Readers of raw text: JSONL, JSONL.gz, JSONL.zst, plain text, Parquet, and data sets of the `datasets` package.

An input is cut into pieces, units of work of about a given size that processes share out; `documents(piece)` yields
what a piece holds.  A JSONL file is cut at bytes: a line belongs to the piece in which its first byte lies.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nano3.config import UserError

JSONL, TEXT, PARQUET = (".jsonl", ".ndjson", ".json"), (".txt", ".text", ".md"), (".parquet",)
PACKED = (".gz", ".zst")
HUB = "datasets:"  # before the id of a data set of the `datasets` package
BATCH = 1000  # rows of a table that are in memory at a time


class RecordError(ValueError):
    """A record that is no document.  The text names the place and what is wrong there."""


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a JSONL or text file; row groups of Parquet; rows of a data set; stop None: all of it."""

    kind: str  # jsonl, text, parquet or hub
    path: str
    start: int = 0
    stop: int | None = None
    size: int = 0  # bytes of input, for progress


@dataclass(frozen=True)
class Read:
    """How to read: the key of the text in a record, and what `datasets` needs."""

    key: str = "text"
    hub_config: str | None = None
    hub_split: str = "train"


def kind_of(path: str) -> str:
    """jsonl, text or parquet, by the name.  Raises UserError."""
    if kind := _suffix_kind(Path(path).name):
        return kind
    known = ", ".join(JSONL + TEXT + PARQUET)
    raise UserError(f"--input {path}: the kind of file is not known; expected {known}, or text with .gz or .zst")


def _suffix_kind(name: str) -> str | None:
    name = name.lower()
    if name.endswith(PARQUET):
        return "parquet"
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return "jsonl" if name.endswith(JSONL) else "text" if name.endswith(TEXT) else None


def find_inputs(patterns: list[str]) -> list[str]:
    """The files that names, folders and patterns stand for, in order, each once; ids of `datasets` as they are."""
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern.startswith(HUB):
            found[pattern] = None
            continue
        if Path(pattern).is_dir():
            names = sorted(str(p) for p in Path(pattern).rglob("*") if p.is_file() and _suffix_kind(p.name))
        else:
            names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise UserError(
                f"--input {pattern}: no such file, and no file fits the pattern; a data set of the hub is written "
                f"{HUB}OWNER/NAME"
            )
        found |= dict.fromkeys(str(Path(n)) for n in names)
    for name in found:
        if not name.startswith(HUB):
            kind_of(name)
    return list(found)


def cut(path: str, size: int, read: Read) -> list[Piece]:
    """The pieces of one input, of about `size` bytes each where it can be cut."""
    if path.startswith(HUB):
        rows = len(_hub(path, read))
        return [Piece("hub", path, a, min(a + 100_000, rows)) for a in range(0, rows, 100_000)]
    kind, total = kind_of(path), Path(path).stat().st_size
    if kind == "parquet":
        return _row_groups(path, size)
    if kind == "text" or path.lower().endswith(PACKED):
        return [Piece(kind, path, 0, None, total)] if total else []
    return [Piece(kind, path, a, min(a + size, total), min(size, total - a)) for a in range(0, total, size)]


def documents(piece: Piece, read: Read) -> Iterator[tuple[int, str | RecordError]]:
    """(input bytes so far, text) of each document, in order; a RecordError stands in the place of a broken one."""
    return {"jsonl": _jsonl, "text": _plain, "parquet": _parquet, "hub": _rows}[piece.kind](piece, read)


# --- lines


def _jsonl(piece: Piece, read: Read) -> Iterator[tuple[int, str | RecordError]]:
    packed = piece.path.lower().endswith(PACKED)
    with open_bytes(piece.path) as f:
        at, number = piece.start, 0  # byte of the line, lines before it in this piece
        if at:
            f.seek(at - 1)
            at += len(f.readline()) - 1  # a line that began before this piece is the work of the piece before
        first = at
        while piece.stop is None or at < piece.stop:
            try:
                line = f.readline()
            except (OSError, EOFError, zlib.error, *_zstd_errors()) as error:
                yield 0, RecordError(f"{piece.path}: line {number + 1}: the compressed file is damaged: {error}")
                return
            if not line:
                return
            try:
                text = _record(line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line, read.key)
            except RecordError as error:
                place = f"line {number + 1}" if packed else f"line {_lines(piece.path, first) + number + 1} (byte {at})"
                text = RecordError(f"{piece.path}: {place}: {error}")
            at, number = at + len(line), number + 1
            if text is not None:
                yield f.tell_packed() - piece.start if packed else at - piece.start, text


def _record(line: bytes, key: str) -> str | None:
    """The text in a line; None for an empty line."""
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 at byte {error.start} of the line ({line[error.start]:#04x})") from None
    except RecursionError:
        raise RecordError("nested too deeply") from None
    except ValueError as error:
        cause = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RecordError(f"not JSON: {cause}") from None
    if not isinstance(record, dict):
        raise RecordError(f'expected an object with the key "{key}", not {type(record).__name__}')
    return check_text(record, key)


def check_text(record: dict[str, Any], key: str) -> str:
    """`record[key]`, if it is text that can be encoded.  Raises RecordError."""
    if key not in record:
        raise RecordError(
            f'no key "{key}"; it has {", ".join(map(repr, list(record)[:5])) or "none"} (--json-key NAME)'
        )
    text = record[key]
    if not isinstance(text, str):
        raise RecordError(f'"{key}" is {"null" if text is None else type(text).__name__}, not a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f'"{key}" has half a surrogate pair at character {error.start}') from None
    return text


def _lines(path: str, stop: int) -> int:
    """Line ends before byte `stop`: read again only when there is an error to place."""
    count = 0
    with open(path, "rb") as f:
        while stop and (block := f.read(min(1 << 20, stop))):
            count, stop = count + block.count(b"\n"), stop - len(block)
    return count


def _plain(piece: Piece, read: Read) -> Iterator[tuple[int, str | RecordError]]:
    """A file is one document."""
    try:
        with open_bytes(piece.path) as f:
            text = f.read().removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        text = RecordError(f"{piece.path}: byte {error.start}: not UTF-8 ({error.object[error.start]:#04x})")
    except (OSError, EOFError, zlib.error, *_zstd_errors()) as error:
        text = RecordError(f"{piece.path}: the compressed file is damaged: {error}")
    yield piece.size, text


class _Packed(io.BufferedReader):
    """Decompressed bytes of a file, which also tells how much of the file itself has been read."""

    def __init__(self, raw: BinaryIO, unpacked: Any) -> None:
        super().__init__(unpacked, 1 << 20)
        self._file = raw

    def tell_packed(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        super().close()
        self._file.close()


def open_bytes(path: str) -> BinaryIO:
    """A file's bytes, decompressed.  .zst needs the package zstandard (or Python 3.14)."""
    lower = path.lower()
    if lower.endswith(".gz"):
        raw = io.FileIO(path)
        return _Packed(raw, gzip.GzipFile(fileobj=raw))
    if lower.endswith(".zst"):
        raw = io.FileIO(path)
        return _Packed(raw, _zstd().ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return open(path, "rb", buffering=1 << 20)


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(".zst files need a package that is not installed: pip install zstandard") from None
    return zstandard


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


# --- tables


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet files need a package that is not installed: pip install pyarrow") from None
    return pyarrow.parquet


def _parquet_file(path: str) -> Any:
    parquet = _pyarrow()
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both of these
        raise UserError(f"--input {path}: not a Parquet file: {' '.join(str(error).split())[:200]}") from None


def _row_groups(path: str, size: int) -> list[Piece]:
    meta = _parquet_file(path).metadata
    pieces, start, held = [], 0, 0
    for g in range(meta.num_row_groups):
        held += sum(meta.row_group(g).column(c).total_compressed_size for c in range(meta.num_columns))
        if held >= size or g == meta.num_row_groups - 1:
            pieces.append(Piece("parquet", path, start, g + 1, held))
            start, held = g + 1, 0
    return pieces


def _parquet(piece: Piece, read: Read) -> Iterator[tuple[int, str | RecordError]]:
    file = _parquet_file(piece.path)
    if read.key not in file.schema_arrow.names:
        raise UserError(
            f'{piece.path}: no column "{read.key}"; it has {", ".join(file.schema_arrow.names)} (--json-key NAME)'
        )
    row = sum(file.metadata.row_group(g).num_rows for g in range(piece.start))
    first, rows = row, sum(file.metadata.row_group(g).num_rows for g in range(piece.start, piece.stop))
    try:
        for batch in file.iter_batches(BATCH, row_groups=range(piece.start, piece.stop), columns=[read.key]):
            for value in batch.column(0).to_pylist():
                yield piece.size * (row + 1 - first) // rows, _cell(piece.path, row, value, read.key)
                row += 1
    except (OSError, ValueError) as error:
        yield 0, RecordError(f"{piece.path}: after row {row}: damaged: {' '.join(str(error).split())[:200]}")


def _hub(path: str, read: Read) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("data sets by id need a package that is not installed: pip install datasets") from None
    name = path.removeprefix(HUB)
    try:
        rows = datasets.load_dataset(name, read.hub_config, split=read.hub_split)
    except Exception as error:  # a dozen kinds: no network, no such id, no such split
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--input {path}: `datasets` cannot load it, split {read.hub_split!r}: {reason}") from None
    if read.key not in rows.column_names:
        raise UserError(f'{path}: no column "{read.key}"; it has {", ".join(rows.column_names)} (--json-key NAME)')
    return rows.select_columns(read.key)


def _rows(piece: Piece, read: Read) -> Iterator[tuple[int, str | RecordError]]:
    rows = _hub(piece.path, read)
    for start in range(piece.start, piece.stop, BATCH):
        for i, value in enumerate(rows[start : min(start + BATCH, piece.stop)][read.key]):
            yield 0, _cell(piece.path, start + i, value, read.key)


def _cell(path: str, row: int, value: Any, key: str) -> str | RecordError:
    try:
        return check_text({key: value}, key)
    except RecordError as error:
        return RecordError(f"{path}: row {row}: {error}")

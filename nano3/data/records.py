"""Records for supervised training: dictionaries from JSON lines or from the `datasets` package, each with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nano3.config import UserError

Record = dict[str, Any]


class RecordError(UserError):
    """One record cannot be used; the text names its place and what is wrong with it."""


def read_jsonl(path: Path) -> Iterator[tuple[str, Record | RecordError]]:
    """Each line of a JSON Lines file as (place, record); a line that is none gives its error in the record's stead.

    Blank lines are passed over.  Errors are values, so that whoever reads decides whether one ends the run.
    """
    if not path.is_file():
        raise UserError(f"dataset.path={path} does not exist; give a .jsonl file or a folder of them")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, parse(line, place)


def parse(line: bytes, place: str) -> Record | RecordError:
    """A record from one line of JSON, or what is wrong with it."""
    try:
        text = line.decode("utf-8")
        record = json.loads(text)
    except UnicodeDecodeError as error:
        return RecordError(f"{place}: not UTF-8 text (byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return RecordError(f"{place}: not JSON ({error})")
    if not isinstance(record, dict):
        return RecordError(f"{place}: expected an object with named fields, found {type(record).__name__}")
    # JSON can write half of a surrogate pair, which no encoding has.
    if "\\u" in text and re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
        return RecordError(f"{place}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return record


def hub_records(name: str, subset: str | None, split: str) -> Iterator[tuple[str, Record]] | None:
    """The rows of one split of a data set of the `datasets` package: a hub id, or a folder that it can read.

    None if it has no such split.  Loads before it returns, so that what is missing is said at once.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"dataset.name={name} needs the datasets package: pip install datasets; or give dataset.path, a local file"
        ) from None
    try:
        splits = datasets.load_dataset(name, subset)  # all: it prepares all of them to give one, and says which exist
    except Exception as error:  # no network, no such id, no such subset: its messages say which
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"dataset.name={name} (split {split}) could not be loaded: {reason}; "
            "a local file works offline: dataset.path=FILE"
        ) from None
    if split not in splits:
        return None
    return ((f"{name}[{split}][{i}]", row) for i, row in enumerate(splits[split]))


def rename(record: Record, columns: dict[str, str], place: str) -> Record:
    """The record under our field names: `columns` says for each of them which column holds it."""
    if missing := [c for c in columns.values() if c not in record]:
        raise RecordError(
            f"{place}: no column {missing[0]!r}, which dataset.columns names; there are {', '.join(map(repr, record))}"
        )
    return {**record, **{field: record[column] for field, column in columns.items()}}


def text_field(record: Record, field: str, place: str) -> str:
    """A field that must be text."""
    if field not in record:
        raise RecordError(f"{place}: no field {field!r}; there are {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(record[field], str):
        raise RecordError(f"{place}: the field {field!r} must be text, found {type(record[field]).__name__}")
    return record[field]

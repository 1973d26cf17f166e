"""Hostile model folders: each known trick by name, and 2,000 random ones (tests/hf_fuzz.py says what must hold)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nano3.config import UserError
from nano3.hf import open_model
from tests.conftest import ROOT
from tests.hf_folders import random_weights, write_folder
from tests.hf_fuzz import SMALL

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the object in a JSON file, or in the header of a safetensors file."""

    def do(folder: Path) -> None:
        path = folder / file
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little") if file.endswith(".safetensors") else 0
        value = json.loads(data[8:start] if start else data)
        changed = change(value)
        text = changed if isinstance(changed, bytes) else json.dumps(value if changed is None else changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:] if start else text)

    return do


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The tensor at the beginning of the file."""
    tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    return min(tensors.values(), key=lambda t: t["data_offsets"][0])


def second(header: dict[str, Any]) -> dict[str, Any]:
    tensors = [v for k, v in header.items() if k != "__metadata__"]
    return sorted(tensors, key=lambda t: t["data_offsets"][0])[1]


def rewrite(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes())) and None


def move_out(file: str) -> Callable[[Path], None]:
    """The file lies elsewhere, and a link leads there."""

    def do(folder: Path) -> None:
        (folder / file).rename(folder.parent / file)
        (folder / file).symlink_to(folder.parent / file)

    return do


def pipe(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def shift(by_start: int, by_end: int) -> Callable[[dict[str, Any]], None]:
    def do(header: dict[str, Any]) -> None:
        offsets = second(header)["data_offsets"]
        offsets[:] = [offsets[0] + by_start, offsets[1] + by_end]

    return do


def twice(header: dict[str, Any]) -> bytes:
    key = next(iter(k for k in header if k != "__metadata__"))
    return (json.dumps(header)[:-1] + "," + json.dumps({key: header[key]})[1:]).encode()


def integers(header: dict[str, Any]) -> None:
    next(v for k, v in header.items() if k != "__metadata__" and v["dtype"] == "BF16")["dtype"] = "I16"


def forget(index: dict[str, Any]) -> None:
    names = index["weight_map"]
    del names[next(name for name, shard in names.items() if shard == SHARD)]


def alias(header: dict[str, Any], kind: str = "backbone.") -> None:
    """The same tensor under its other name as well; empty, so that the offsets fit."""
    end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    key = next(k for k in header if k.startswith(kind))
    header[key.replace("backbone.", "model.")] = {"dtype": "BF16", "shape": [0], "data_offsets": [end, end]}


def set_all(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], value))


def set_first(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].update({next(iter(index["weight_map"])): value})


TRICKS = {
    "the header is longer than the file": (
        rewrite(SHARD, lambda d: (1 << 40).to_bytes(8, "little") + d[8:]),
        "cut short",
    ),
    "the header is larger than any": (lambda f: huge_header(f), "claims a header of"),
    "the file is cut": (rewrite(SHARD, lambda d: d[:-1]), "cut short"),
    "the file goes on": (rewrite(SHARD, lambda d: d + b"\0"), "its tensors end at byte"),
    "overlap": (edit(SHARD, shift(-2, -2)), "overlaps"),
    "gap": (edit(SHARD, shift(2, 2)), "gap"),
    "offsets the wrong way round": (edit(SHARD, lambda h: first(h)["data_offsets"].reverse()), "data_offsets"),
    "negative offset": (edit(SHARD, lambda h: first(h)["data_offsets"].__setitem__(0, -2)), "data_offsets"),
    "offset is true": (edit(SHARD, lambda h: first(h)["data_offsets"].__setitem__(0, False)), "data_offsets"),
    "10^12 elements": (edit(SHARD, lambda h: first(h).update(shape=[10**12])), "but its data_offsets"),
    "2^124 elements": (edit(SHARD, lambda h: first(h).update(shape=[2**62, 2**62])), "but its data_offsets"),
    "ninety-nine dimensions": (edit(SHARD, lambda h: first(h).update(shape=[1] * 99)), "has the shape"),
    "dtype NaN": (edit(SHARD, lambda h: first(h).update(dtype="NaN")), "unknown dtype 'NaN'"),
    "NaN for a number": (edit(SHARD, lambda h: first(h).update(shape=[float("nan")])), "NaN is not JSON"),
    "integers": (edit(SHARD, integers), "has dtype I16"),
    "a key twice in the header": (edit(SHARD, twice), "appears twice"),
    "a tensor under two names": (edit(SHARD, alias), "the index has it nowhere"),
    "a key too many": (edit(SHARD, lambda h: first(h).update(code="x")), "and nothing else"),
    "a key twice in the index": (
        rewrite(INDEX, lambda d: d.replace(b'{"metadata"', b'{"weight_map": {}, "metadata"', 1)),
        "appears twice",
    ),
    "shard in another folder": (edit(INDEX, set_first("../evil.safetensors")), "not the plain name of a file"),
    "shard by its whole path": (edit(INDEX, set_first("/elsewhere/model.safetensors")), "not the plain name of a file"),
    "shard with NUL": (edit(INDEX, set_first("a\0.safetensors")), "not the plain name of a file"),
    "shard that is a pickle": (edit(INDEX, set_first("pytorch_model.bin")), "not the name of a safetensors file"),
    "shard is a number": (edit(INDEX, set_first(7)), "not the name of a safetensors file"),
    "shard is missing": (edit(INDEX, set_first("absent.safetensors")), "absent.safetensors is missing"),
    "shard is another one": (edit(INDEX, set_all(SHARD)), "is not in"),
    "tensor not in the index": (edit(INDEX, forget), "has it nowhere"),
    "no weight_map": (edit(INDEX, lambda i: i.pop("weight_map") and None), "no weight_map"),
    "shard linked from outside": (move_out(SHARD), "link out of its folder"),
    "index linked from outside": (move_out(INDEX), "link out of its folder"),
    "config linked from outside": (move_out("config.json"), "link out of its folder"),
    "shard is a pipe": (pipe, "not a regular file"),
    "one model and another": (lambda f: (f / "model.safetensors").write_bytes(b"x") and None, "two models"),
    "config is a list": (rewrite("config.json", lambda d: b"[1]"), "expected a JSON object"),
    "config goes deep": (rewrite("config.json", lambda d: b"[" * 100_000), "config.json is damaged"),
    "config is huge": (rewrite("config.json", lambda d: d + b" " * (1 << 20)), "too large"),
    "config asks for a variable": (
        edit("config.json", lambda c: c.update(mlp_hidden_act="${oc.env:HOME}")),
        "has no meaning",
    ),
    "config of a 10^12 wide model": (edit("config.json", lambda c: c.update(hidden_size=10**12)), "1000000000000"),
    "config of 10^12 experts": (edit("config.json", lambda c: c.update(n_routed_experts=10**12)), "1000000000000"),
    "config of a million layers": (
        edit("config.json", lambda c: c.update(hybrid_override_pattern="M" * 10**5, num_hidden_layers=10**5)),
        "100000 layers",
    ),
}


def huge_header(folder: Path) -> None:
    length = 17 << 20
    with open(folder / SHARD, "wb") as f:
        f.write(length.to_bytes(8, "little") + b"{}")
        f.truncate(8 + length)


@pytest.mark.parametrize("name", TRICKS)
def test_known_tricks(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", SMALL, random_weights(SMALL, 0), shards=3)
    open_model(folder)
    break_it, part = TRICKS[name]
    break_it(folder)
    with pytest.raises(UserError) as caught:
        open_model(folder)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("kind", ["backbone.norm_f", "backbone.layers.1.mixer.experts.2."])
def test_two_names_for_one_tensor(kind: str, tmp_path: Path) -> None:
    """In the files of a folder without an index, where nothing else is wrong."""
    folder = write_folder(tmp_path / "hf", SMALL, random_weights(SMALL, 0))
    edit("model.safetensors", lambda header: alias(header, kind))(folder)
    with pytest.raises(UserError, match="one tensor under several names"):
        open_model(folder)


def test_random_hostile_folders(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hf_fuzz", "2000", "0", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["refused"] + outcome["harmless"] == 2000
    assert outcome["refused"] > 1500
    assert outcome["harmless"] > 20  # else the good folders are not good
    assert outcome["memory"] < 512 << 20
    assert not outcome["code_was_run"]

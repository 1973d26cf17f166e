"""Checksums of blocks: whatever is damaged in a file, nothing of the block in which it lies is used."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import pytest
import torch

import convert
from nano3 import blocks
from nano3.blocks import BLOCK, Checksums, checksums_of, new_file
from nano3.config import UserError
from nano3.hf_files import read_header
from nano3.train import locate, storage
from nano3.train.storage import Item, Progress, commit, manifest_of, read_manifest, temporary_folder, write_file
from tests.hf_folders import random_weights, write_checkpoint, write_folder
from tests.oracles import GOLDEN
from tests.test_convert import exported, fails, files_of, imported, run


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def cut_into(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of another size, so that small files have many."""
    monkeypatch.setattr(blocks, "BLOCK", size)
    monkeypatch.setattr("nano3.convert.BLOCK", size)


def in_format_3(folder: Path) -> None:
    """The manifest as it was when files had one SHA-256 each."""
    path = folder / "manifest.json"
    body = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("format", "sha256")}
    for name, record in body["files"].items():
        del record["crc32"]
        record["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps({"format": 3, "sha256": storage._sum(body), **body}))


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 5432])
def test_one_checksum_for_each_block(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever pieces the bytes come; zlib is the oracle."""
    cut_into(1000, monkeypatch)
    monkeypatch.setattr(blocks, "PIECE", 300)
    monkeypatch.setattr(blocks, "WINDOW", 700)
    data = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()
    wanted = "".join(f"{zlib.crc32(data[at : at + 1000]):08x}" for at in range(0, size, 1000))
    for pieces in (1, 7, 1000, 10_000):
        sums = Checksums()
        with new_file(tmp_path / "x") as append:
            for at in range(0, size, pieces):
                sums.update(data[at : at + pieces])
                append(data[at : at + pieces])
        assert str(sums) == checksums_of(tmp_path / "x") == wanted
        assert (tmp_path / "x").read_bytes() == data


@pytest.mark.parametrize("damage", ["flip", "shorter", "longer", "one more", "one less", "exchanged"])
def test_a_file_of_several_blocks_is_verified(tmp_path: Path, damage: str) -> None:
    """Blocks of the real size.  The last iteration that is good is named, and taken when asked for."""
    for iteration in (1, 2):
        final = tmp_path / f"iter_{iteration:07d}"
        temporary_folder(final).mkdir()
        x = torch.randint(256, (3 * BLOCK + 12345,), dtype=torch.uint8)
        item = Item("model.x", torch.uint8, tuple(x.shape), (0,), tuple(x.shape), lambda x=x: [x])
        written = {"x.safetensors": (write_file(temporary_folder(final) / "x.safetensors", [item]), [item])}
        commit(temporary_folder(final), final, manifest_of(Progress(iteration), written))
    file, manifest = final / "x.safetensors", read_manifest(final, "test")
    data, record = file.read_bytes(), manifest.files["x.safetensors"]
    assert len(record.crc32) == 8 * 4

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=rf"{match}.*last good one is iteration 1"):
            locate.open_verified(tmp_path, "test")
        assert locate.open_verified(tmp_path, "test", or_last_good=True)[0].name == "iter_0000001"

    locate.open_verified(tmp_path, "test")
    if damage == "flip":
        for at in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 77, 3 * BLOCK, len(data) - 1):
            flip(file, at)
            refused(r"x\.safetensors was altered")
            file.write_bytes(data)
    elif damage == "exchanged":  # two blocks, each as it was written
        file.write_bytes(data[:BLOCK] + data[2 * BLOCK : 3 * BLOCK] + data[BLOCK : 2 * BLOCK] + data[3 * BLOCK :])
        refused(r"x\.safetensors was altered")
    elif damage in ("shorter", "longer"):
        file.write_bytes(data[:-1] if damage == "shorter" else data + b"\0")
        refused(r"x\.safetensors is missing or cut short")
    else:
        sums = record.crc32 + "00000000" if damage == "one more" else record.crc32[:-8]
        manifest.files["x.safetensors"] = record._replace(crc32=sums)
        (final / "manifest.json").write_text(manifest.to_json())
        refused(r"manifest\.json is damaged")


@pytest.mark.parametrize(("form", "size"), [("import", 1000), ("training", 97)])
def test_the_same_export_however_the_blocks_cut_the_elements(
    form: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where numbers are looked at, for another dtype.  In training layouts tensors lie in pieces, from odd places
    on, and their rows are put together from the maps."""
    folder = write_folder(tmp_path / "hf", GOLDEN, random_weights(GOLDEN, 1), shards=3)
    wide = ["--dtype", "float32", "--max-shard-size", "100KB"]
    made = []
    for cut in (BLOCK, size):
        cut_into(cut, monkeypatch)
        if form == "import":
            ckpt = imported(folder, "--overwrite")
        else:
            ckpt = write_checkpoint(tmp_path / str(cut), GOLDEN, random_weights(GOLDEN, 1), seed=1)
        made.append([files_of(exported(folder, ckpt, *more, to=f"{cut}{len(more)}")) for more in ([], wide)])
        locate.open_verified(ckpt, "test")
    assert made[0] == made[1]
    run("verify", folder, tmp_path / f"{size}0")


@pytest.mark.parametrize("form", ["import", "training", "format 3"])
def test_a_flipped_bit_in_any_block_is_not_exported(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First, last and middle byte of the tensors, both sides of a boundary, the tensor that is written last, and the
    header, whose damage is not always the checksum's to find."""
    cut_into(1000, monkeypatch)
    weights = random_weights(GOLDEN, 1, any_bits=True)
    folder = write_folder(tmp_path / "hf", GOLDEN, weights, shards=3)
    if form == "training":
        write_checkpoint(tmp_path / "ckpt", GOLDEN, weights, seed=1, iteration=9)
        last = write_checkpoint(tmp_path / "ckpt", GOLDEN, weights, seed=1)
        good = "the last good one is iteration 9"
    else:
        last = imported(folder, "--max-shard-size", "150KB") / "iter_0000000"
        good = "there is no good one beside it"
    if form == "format 3":
        in_format_3(last)
    whole = exported(folder, last, to="whole")
    chunks = [c for k, e in read_manifest(last, "").tensors.items() for c in e.chunks if k == "model.lm_head.weight"]
    places = []
    files = sorted(last.glob("*.safetensors"))
    for path in files if form != "format 3" else files[-1:]:
        spans = list(read_header(path).items())
        weight = [s for name, s in spans if name.startswith("model.")]
        boundary = 1000 * (weight[-1].end // 1000)
        places += [(path, at) for at in (boundary - 1, boundary, weight[-1].end - 1) if at < weight[-1].end]
        places += [(path, s.end - 1) for name, s in spans if (path.name, name) in {(c.file, c.name) for c in chunks}]
    places += [(path, at) for at in (0, 8, weight[0].start, (weight[0].start + weight[-1].end) // 2)]
    args = ["export", "--hf-model", folder, "--megatron-path", tmp_path / "ckpt", "--hf-path", tmp_path / "out"]
    for path, at in places:
        flip(path, at)
        said = [path.name] if at < 9 else [path.name, "was altered", good]
        fails(capsys, args, *said)
        assert not (tmp_path / "out" / "config.json").exists()
        assert not list((tmp_path / "out").glob("*.safetensors"))
        with pytest.raises(UserError, match=path.name):
            locate.open_verified(last, "test")
        flip(path, at)
    flip(path, at)
    assert convert.main(["verify", str(folder), str(last)]) == 1
    flip(path, at)
    locate.open_verified(last, "test")
    run(*args)
    assert files_of(tmp_path / "out") == files_of(whole)


def test_a_header_that_fills_blocks_of_its_own_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tensors exchange their names: the header is sound in itself, and the weights are the wrong ones."""
    cut_into(100, monkeypatch)
    folder = write_folder(tmp_path / "hf", GOLDEN, random_weights(GOLDEN, 1))
    file = imported(folder) / "iter_0000000" / "model-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    a, b = b"model.layers.0.norm.weight", b"model.layers.1.norm.weight"
    assert data.count(a) == data.count(b) == 1
    here, there = data.index(a), data.index(b)
    data[here : here + len(a)], data[there : there + len(b)] = b, a
    file.write_bytes(data)
    args = ["export", "--hf-model", folder, "--megatron-path", tmp_path / "ckpt", "--hf-path", tmp_path / "out"]
    fails(capsys, args, file.name, "was altered")

"""Names and manifests of checkpoints: which one is found after a kill between any two steps, and after damage."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nano3.config import UserError
from nano3.train import checkpoint, locate, storage
from nano3.train.storage import POINTER, Item, Progress, manifest_of, read_manifest, temporary_folder, write_file
from tests.train.small import small, trainer


def make(folder: Path, iteration: int, value: float = 0.0) -> Path:
    """A checkpoint of one tensor."""
    final = folder / f"iter_{iteration:07d}"
    temporary = temporary_folder(final)
    temporary.mkdir(parents=True, exist_ok=True)
    (temporary / "config.yaml").write_text("model: {}\n")
    item = Item("model.x", torch.float32, (3,), (0,), (3,), lambda: [torch.full((3,), value)])
    written = {"rank-00000.safetensors": (write_file(temporary / "rank-00000.safetensors", [item]), [item])}
    storage.commit(temporary, final, manifest_of(Progress(iteration), written))
    return final


def value_of(folder: Path) -> float:
    """What is in the checkpoint that `find` chooses, which must be whole."""
    found = locate.find(folder, "test")
    manifest = read_manifest(found, "test")
    storage.verify(found, manifest, "test")
    return storage.Container(found, manifest).read("model.x")[0].item()


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Every call that changes names on the disk counts; the one with this number does not happen."""
    count = [0]

    def counted(real: Callable) -> Callable:
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] > step:
                raise Killed
            return real(*args, **kwargs)

        return call

    for owner, name in [(Path, "rename"), (Path, "replace"), (Path, "write_text"), (os, "unlink"), (os, "rmdir")]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize(("there", "new"), [([3, 4], 5), ([3, 5], 5), ([5], 5), ([3, 5, 6], 4), ([3, 4, 6], 4)])
def test_a_kill_between_any_two_steps_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[int], new: int
) -> None:
    """Also where a run went back and writes a name for the second time, with later ones beside it.  The next save, of
    the same or of another iteration, leaves nothing behind."""
    values, steps = [], 0
    while len(values) < 40:
        folder = tmp_path / str(steps)
        for i in there:
            make(folder, i, value=float(i))
        with monkeypatch.context() as patch:
            kill_at(patch, steps)
            try:
                make(folder, new, value=100.0)
                done = True
            except Killed:
                done = False
        values.append(value_of(folder))
        if done:
            break
        make(folder, new + steps % 2, value=200.0)
        assert value_of(folder) == 200.0
        storage.sweep(folder)
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        steps += 1
    assert done
    assert values == [float(there[-1])] * values.count(float(there[-1])) + [100.0] * values.count(100.0)
    assert values.count(100.0) >= 2
    assert values.count(float(there[-1])) >= 2


def test_a_copy_in_any_order_is_as_good(tmp_path: Path) -> None:
    """cp -r gives the files new times, in the order of the folder."""
    for i in (3, 6):
        make(tmp_path / "run", i, value=float(i))
    for first in ("iter_0000003", "iter_0000006", POINTER):
        copy = tmp_path / f"copy{first}"
        shutil.copytree(tmp_path / "run", copy)
        for i, name in enumerate([first, *({"iter_0000003", "iter_0000006", POINTER} - {first})]):
            for path in [copy / name, *(copy / name).glob("*")]:
                os.utime(path, (1000 + i, 1000 + i))
        assert value_of(copy) == 6.0
    (copy / POINTER).write_text("3")  # gone back by hand
    assert value_of(copy) == 3.0


def test_iterations_are_numbers_not_words(tmp_path: Path) -> None:
    for i in (9_999_999, 10_000_000):
        make(tmp_path, i, value=float(i))
    (tmp_path / "iter_0000001.bak").mkdir()
    (tmp_path / "iter_x").mkdir()
    (tmp_path / POINTER).unlink()
    assert value_of(tmp_path) == 1e7
    assert locate.last_good(tmp_path).name == "iter_10000000"


def test_what_retention_deletes_is_no_checkpoint_from_the_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in (1, 2, 3):
        make(tmp_path, i)
    saver = checkpoint.Saver(tmp_path, small("checkpoint.most_recent_k=1"), checkpoint.ALONE)

    def one_file(path: Path, **options: object) -> None:
        if path.exists():
            (path / "rank-00000.safetensors").unlink()
            raise Killed

    monkeypatch.setattr(shutil, "rmtree", one_file)
    with pytest.raises(Killed):
        saver._retire(tmp_path / "iter_0000003")
    monkeypatch.undo()
    for p in tmp_path.glob("iter_*"):
        storage.verify(p, read_manifest(p, "test"), "test")
    saver._retire(tmp_path / "iter_0000003")
    storage.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000003", POINTER]


def test_leftovers_of_killed_saves_go_and_a_killed_import_stays(tmp_path: Path) -> None:
    t = trainer()
    (tmp_path / ".incomplete_iter_0000004").mkdir()
    (tmp_path / ".deleted_iter_0000002").mkdir()
    (tmp_path / ".incomplete_iter_0000000").mkdir()
    (tmp_path / ".incomplete_iter_0000000.journal").write_text("")
    saver = checkpoint.Saver(tmp_path, t.config, checkpoint.ALONE)
    saver.save(t.model, t.optimizer, Progress(7))
    saver.wait()
    hidden = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("."))
    assert hidden == [".incomplete_iter_0000000", ".incomplete_iter_0000000.journal"]


@pytest.mark.parametrize("file", ["manifest.json", "config.yaml"])
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, file: str) -> None:
    """In the manifest a digit more or less can move a tensor, or the iteration; in config.yaml it is another model."""
    trainer(f"logger.run_dir={tmp_path}", "train.train_iters=1").run()
    folder = locate.find(tmp_path, "test")
    original = read_manifest(folder, "test")
    data, r = (folder / file).read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        damaged[r.randrange(len(data))] ^= 1 << r.randrange(8)
        (folder / file).write_bytes(damaged)
        try:
            found, manifest = locate.open_verified(folder, "test")
        except UserError:
            continue
        assert file == "manifest.json"  # white space between two values
        assert (found, manifest) == (folder, original)


def test_a_pointer_that_is_damaged_is_named(tmp_path: Path) -> None:
    make(tmp_path, 3)
    for text in (b"\xb3", b"", b"7", "٣".encode(), b"9" * 5000):
        (tmp_path / POINTER).write_bytes(text)
        with pytest.raises(UserError, match="last good one is iteration 3"):
            locate.find(tmp_path, "test")


def test_a_job_that_is_killed_while_it_replaces_its_only_checkpoint_does_not_start_anew(tmp_path: Path) -> None:
    same = [f"checkpoint.save={tmp_path}/ck", f"checkpoint.load={tmp_path}/ck", f"logger.run_dir={tmp_path}/run"]
    trainer(*same, "train.train_iters=2").run()
    final = tmp_path / "ck" / "iter_0000002"
    final.rename(storage.replaced_folder(final))
    assert trainer(*same, "train.train_iters=4").progress.iteration == 2

"""Conversion where it is easily wrong: kills at the worst moment, dtypes and names at their limits, folders in use."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import convert
from nano3 import convert as library
from nano3.compare import difference, open_any
from nano3.config import UserError
from nano3.hf import open_model, our_name
from nano3.train.storage import Item, Progress, commit, manifest_of, read_manifest, temporary_folder, write_file
from tests.hf_folders import random_weights, write_checkpoint, write_folder
from tests.oracles import GOLDEN
from tests.test_convert import exported, fails, files_of, imported, run

SMALL_FILES = ["--max-shard-size", "20KB", "--workers", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "hf", GOLDEN, random_weights(GOLDEN, 1, any_bits=True), shards=3)


def written(capsys: pytest.CaptureFixture[str]) -> int:
    """Bytes that the last command says it wrote."""
    return int(re.findall(r"([\d,]+) bytes written", capsys.readouterr().out)[-1].replace(",", ""))


def test_a_journal_cut_in_the_middle_of_a_line_is_still_of_use(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Killed twice: the line that the first kill cut short does not spoil those after it."""
    args = ["import", "--hf-model", folder, "--megatron-path", tmp_path / "ckpt", *SMALL_FILES]
    real, calls = library.write_file, []

    def write(path: Path, *rest):
        calls.append(path.name)
        if len(calls) in (4, 8):
            raise OSError("killed")
        return real(path, *rest)

    monkeypatch.setattr(library, "write_file", write)
    assert convert.main([str(a) for a in args]) == 2
    journal = tmp_path / "ckpt" / ".incomplete_iter_0000000.journal"
    journal.write_bytes(journal.read_bytes() + b'{"file": "model-000')
    assert convert.main([str(a) for a in args]) == 2
    done = [json.loads(line)["file"] for line in journal.read_text().splitlines()[1:]]
    kept = {f: (journal.with_suffix("") / f).stat().st_mtime_ns for f in done}
    assert len(kept) > 4
    monkeypatch.undo()
    run(*args)
    assert {f: (tmp_path / "ckpt" / "iter_0000000" / f).stat().st_mtime_ns for f in done} == kept


def test_a_kill_while_an_export_is_moved_to_its_place_copies_nothing_again(folder: Path, monkeypatch, capsys) -> None:
    ckpt = imported(folder)
    whole = files_of(exported(folder, ckpt, *SMALL_FILES, to="whole"))
    for moved in (3, len(whole) - 1, len(whole)):
        out, left, real = folder.parent / f"out{moved}", [moved], Path.replace

        def move(self: Path, target: Path, left: list[int] = left, real=real) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise OSError("killed")
            return real(self, target)

        def no_end(path: Path, ignore_errors: bool = False) -> None:
            if not ignore_errors:
                raise OSError("killed")

        args = ["export", "--hf-model", folder, "--megatron-path", ckpt, "--hf-path", out, *SMALL_FILES]
        monkeypatch.setattr(Path, "replace", move)
        monkeypatch.setattr(shutil, "rmtree", no_end)
        fails(capsys, args, "killed")
        monkeypatch.undo()
        run(*args)
        assert written(capsys) == 0
        assert files_of(out) == whole
        assert {p.name for p in out.iterdir()} == set(whole)


def test_a_kill_after_an_import_has_its_name_leaves_nothing_to_do(folder: Path, tmp_path: Path, monkeypatch, capsys):
    args = ["import", "--hf-model", folder, "--megatron-path", tmp_path / "ckpt", *SMALL_FILES]

    def killed(self: Path, target: Path) -> None:
        raise OSError("killed")

    monkeypatch.setattr(Path, "replace", killed)  # of the pointer
    fails(capsys, args, "killed")
    monkeypatch.undo()
    run("verify", folder, tmp_path / "ckpt")
    run(*args)
    assert "imported already" in capsys.readouterr().out
    assert not list((tmp_path / "ckpt").glob("*.journal"))
    fails(capsys, args, "--overwrite")


def test_bfloat16_refuses_what_would_become_infinite(tmp_path: Path, capsys) -> None:
    weights = {n: t.float() for n, t in random_weights(GOLDEN, 1).items()}
    weights["norm_f.weight"][3] = 3.4e38  # a float32, and more than bfloat16's largest number
    source = write_folder(tmp_path / "hf", GOLDEN, weights)
    args = ["import", "--hf-model", source, "--megatron-path", tmp_path / "c", "--dtype", "bfloat16"]
    fails(capsys, args, "norm_f.weight", "bfloat16's range", "use float32")


def test_float64_is_rounded_once(tmp_path: Path) -> None:
    """1 + 2^-8 + 2^-40 lies just above the middle of two bfloat16 numbers; in float32 it is the middle."""
    x = torch.tensor([1 + 2**-8 + 2**-40, -1 - 2**-8 - 2**-40, 1 + 2**-8, 2.0, float("inf"), float("nan"), 0.0, -1e-50])
    x = torch.cat([x.double(), torch.randn(1000, dtype=torch.float64)])
    x[0], x[1] = 1 + 2**-8 + 2**-40, -1 - 2**-8 - 2**-40
    (block,) = library.cast([memoryview(x.view(torch.uint8).numpy())], "x", "F64", "BF16")
    got = torch.frombuffer(block, dtype=torch.bfloat16).double()
    assert got[:8].tolist()[:5] == [1 + 2**-7, -1 - 2**-7, 1.0, 2.0, float("inf")]
    assert got[5].isnan()
    up, down = (torch.nextafter(got.bfloat16(), torch.tensor(v).bfloat16()).double() for v in (1e38, -1e38))
    finite = x.isfinite()
    assert ((got - x).abs() <= (up - x).abs())[finite].all()
    assert ((got - x).abs() <= (down - x).abs())[finite].all()


def test_verify_rounds_float64_once_too(tmp_path: Path) -> None:
    weights = {n: t.double() for n, t in random_weights(GOLDEN, 1).items()}
    weights["norm_f.weight"][3] = 1 + 2**-8 + 2**-40
    a = write_folder(tmp_path / "a", GOLDEN, weights)
    run("import", "--hf-model", a, "--megatron-path", tmp_path / "b", "--dtype", "bfloat16")
    run("verify", "--rounded", a, tmp_path / "b")


@pytest.mark.parametrize("number", ["1٣", "01", "-1", "+1", "1_0", " 1", "1.0", ""])
def test_an_experts_number_is_written_in_plain_digits(number: str) -> None:
    """int() reads the digits of every script, and more."""
    name = "backbone.layers.1.mixer.experts.{}.up_proj.weight"
    assert our_name(name.format(13)) == ("layers.1.mixer.experts.up_proj", 13)
    assert our_name(name.format(number)) == (name.format(number).removeprefix("backbone."), None)


@pytest.mark.parametrize("reference", ["none", "bare"])
def test_config_json_names_the_dtype_that_was_written(folder: Path, tmp_path: Path, reference: str) -> None:
    run("import", "--hf-model", folder, "--megatron-path", tmp_path / "wide", "--dtype", "float32")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = [] if reference == "none" else ["--hf-model", tmp_path / "bare"]
    run("export", *model, "--megatron-path", tmp_path / "wide", "--hf-path", tmp_path / "out")
    source = open_model(tmp_path / "out")
    assert set(source.dtypes.values()) == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_two_training_checkpoints_are_the_same_only_with_their_optimizer(folder: Path, tmp_path: Path, capsys) -> None:
    """Cut in different ways over different files; then one moment differs in one bit."""
    weights = random_weights(GOLDEN, 1, any_bits=True)
    a, b = (write_checkpoint(tmp_path / f"run{seed}", GOLDEN, weights, seed) for seed in (0, 1))
    run("verify", a, b)
    assert "not compared" not in capsys.readouterr().out
    run("verify", folder, a)
    assert "the optimizer state in B has no counterpart and was not compared" in capsys.readouterr().out

    final = tmp_path / "run2" / "iter_0000010"
    temporary = temporary_folder(final)
    temporary.mkdir(parents=True)
    items, source = [], open_any(str(a))
    for key, entry in read_manifest(a, "test").tensors.items():
        tensor = source.read(key) if key in source.state else None
        if tensor is not None:
            if key == "exp_avg.layers.1.mixer.experts.up_proj":
                tensor.view(torch.int16)[5, 1, 2] ^= 1
            items.append(
                Item(key, entry.dtype, entry.shape, (0,) * len(entry.shape), entry.shape, lambda t=tensor: [t])
            )
    for name, tensor in weights.items():
        for key, start, stop in library.components(name, tensor.shape[0], GOLDEN):
            part = tensor[start:stop]
            shape = tuple(part.shape)
            items.append(Item(key, part.dtype, shape, (0,) * len(shape), shape, lambda t=part: [t]))
    (temporary / "config.yaml").write_text(OmegaConf.to_yaml({"model": OmegaConf.structured(GOLDEN)}))
    commit(
        temporary,
        final,
        manifest_of(Progress(10), {"x.safetensors": (write_file(temporary / "x.safetensors", items), items)}),
    )
    assert convert.main(["verify", str(a), str(final)]) == 1
    text = capsys.readouterr().out
    assert "exp_avg.layers.1.mixer.experts.up_proj (BF16): 1 of" in text
    assert "the first at [5, 1, 2]" in text
    assert "different: 1 of" in text


def test_a_tensor_that_is_not_all_there_is_not_identical(folder: Path) -> None:
    a, b = open_model(folder), open_model(folder)
    name = "layers.1.mixer.experts.up_proj"
    b.tensors[name].parts.pop()
    with pytest.raises(UserError, match="elements could be read"):
        difference(a, b, name)


def test_overwriting_replaces_a_model_with_its_tokenizer_and_nothing_else(folder: Path, tmp_path: Path, capsys) -> None:
    ckpt, out = imported(folder), tmp_path / "out"
    args = ["export", "--hf-model", folder, "--megatron-path", ckpt, "--hf-path", out, "--overwrite"]
    out.mkdir()
    (out / "train.py").write_text("mine")
    (out / "data.json").write_text("{}")
    fails(capsys, args, "no model to replace", "train.py" if sorted(out.iterdir())[0].name == "train.py" else "")
    assert len(list(out.iterdir())) == 2
    for name in ("config.json", "added_tokens.json", "vocab.json", "old.safetensors"):
        (out / name).write_text("of another model")
    run(*args)
    assert {p.name for p in out.iterdir()} - {"train.py", "data.json"} == set(
        files_of(exported(folder, ckpt, to="new"))
    )


def test_an_import_does_not_settle_in_a_model_or_a_run(folder: Path, tmp_path: Path, capsys) -> None:
    fails(capsys, ["import", "--hf-model", folder, "--megatron-path", folder], "own folder")
    write_checkpoint(tmp_path / "run" / "checkpoints", GOLDEN, random_weights(GOLDEN, 1), 0)
    fails(capsys, ["import", "--hf-model", folder, "--megatron-path", tmp_path / "run"], "holds a run")


def test_a_dry_run_looks_at_the_free_space(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    ckpt = imported(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    for args in (
        ["import", "--hf-model", folder, "--megatron-path", tmp_path / "a" / "b"],
        ["export", "--megatron-path", ckpt, "--hf-path", tmp_path / "a" / "b"],
    ):
        fails(capsys, [*args, "--dry-run"], "1,000 are free")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("file", ["config.yaml", "hf/config.json", "hf/tokenizer_config.json"])
def test_an_altered_small_file_is_not_exported(folder: Path, file: str, capsys) -> None:
    ckpt = imported(folder)
    path = ckpt / "iter_0000000" / file
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    fails(capsys, ["export", "--megatron-path", ckpt, "--hf-path", folder.parent / "out"], file, "was altered")


def test_another_geometry_is_said(folder: Path, tmp_path: Path, capsys) -> None:
    from dataclasses import replace

    write_checkpoint(tmp_path / "run", replace(GOLDEN, num_experts_per_tok=2), random_weights(GOLDEN, 1), 0)
    exported(folder, tmp_path / "run")
    assert "config.json is not the one in" in (text := capsys.readouterr().out)
    assert "other num_experts_per_tok" in text


def test_licence_files_of_any_spelling_are_kept(folder: Path) -> None:
    for name in ("license", "NOTICE.md", "Licence.txt"):
        (folder / name).write_text(name)
    out = exported(folder, imported(folder))
    assert {"license", "NOTICE.md", "Licence.txt", "LICENSE"} <= {p.name for p in out.iterdir()}


def test_a_hub_id_comes_from_the_local_cache_when_offline(
    folder: Path, tmp_path: Path, run_script, monkeypatch
) -> None:
    """The cache as huggingface_hub lays it out, two revisions in it, and no network."""
    home = tmp_path / "hub" / "models--nvidia--tiny"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    other = write_folder(tmp_path / "other", GOLDEN, random_weights(GOLDEN, 2, any_bits=True))
    for ref, commit_id, source in [("main", "1" * 40, folder), ("v2", "2" * 40, other)]:
        (home / "refs" / ref).write_text(commit_id)
        snapshot = home / "snapshots" / commit_id
        snapshot.mkdir(parents=True)
        for path in source.iterdir():
            blob = f"{ref}{path.name}"
            shutil.copyfile(path, home / "blobs" / blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = (
        "import convert, sys\n"
        "for i, more in enumerate(([], ['--revision', 'v2'], ['--revision', '2' * 40], ['--revision', 'v3'])):\n"
        "    args = ['import', '--hf-model', 'nvidia/tiny', '--megatron-path', f'{sys.argv[1]}/{i}', *more]\n"
        "    print('status', convert.main(args))\n"
    )
    done = run_script("-c", script, str(tmp_path / "ckpt"))
    assert re.findall(r"status (\d)", done.stdout) == ["0", "0", "0", "2"], done.stderr
    assert "at revision v3: not a folder here, and the hub did not give it" in done.stderr
    for i, source in enumerate((folder, other, other)):
        run("verify", source, tmp_path / "ckpt" / str(i))

"""Import, export, verify, inspect, compare: exact to the bit, whatever the names, the shards, the layout, the kill."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert
from nano3.compare import load_source, open_any
from nano3.config import UserError
from nano3.convert import Checked
from nano3.hf import open_model, shapes
from nano3.hf_files import Files
from nano3.model.init import named_tensors
from nano3.model.layout import whole_shapes
from nano3.train.checkpoint import load_model
from tests.hf_folders import FORMS, random_geometry, random_weights, write_checkpoint, write_folder
from tests.oracles import CPU, GOLDEN
from tests.train.small import SHRINK


def run(*args: str | Path) -> None:
    assert convert.main([str(a) for a in args]) == 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("seed", range(20))
def test_shapes_are_those_of_the_model(seed: int) -> None:
    c = random_geometry(seed)
    assert shapes(c) == {name: tuple(shape) for name, shape in whole_shapes(c).items()}


@pytest.mark.parametrize("seed", range(20))
def test_there_and_back(seed: int, tmp_path: Path) -> None:
    """Random geometry, every form of names, odd shards: the same bits, a second export of the same bytes, and
    transformers opens what was written and computes what we compute."""
    from transformers import NemotronHForCausalLM

    c = random_geometry(seed)
    weights = random_weights(c, seed)
    source = write_folder(tmp_path / "hf", c, weights, FORMS[seed % 4], seed, shards=1 + seed % 5)
    ckpt, out, again = tmp_path / "ckpt", tmp_path / "out", tmp_path / "again"
    run("import", "--hf-model", source, "--megatron-path", ckpt, "--max-shard-size", "40KB")
    run("export", "--hf-model", source, "--megatron-path", ckpt, "--hf-path", out, "--max-shard-size", "30KB")
    for a, b in [(source, ckpt), (ckpt, out), (source, out)]:
        run("verify", a, b)
    run("export", "--hf-model", source, "--checkpoint", ckpt, "--hf-path", again, "--max-shard-size", "30KB")
    assert files_of(out) == files_of(again)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "README.md").exists()

    theirs, info = NemotronHForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for layer in theirs.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, math.inf)
    theirs.config._experts_implementation = "eager"
    ids = torch.randint(0, c.vocab_size, (2, 37))
    ours = load_source(open_any(str(ckpt)), torch.float32, CPU)
    with torch.no_grad():
        x, y = ours.logits(ours(ids).hidden), theirs.eval()(ids, use_cache=False).logits
    assert (x - y).abs().max() <= 2e-5


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.numel() == 0 or torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A released folder with random bits in three shards: NaN payloads, infinities, subnormals."""
    return write_folder(tmp_path / "hf", GOLDEN, random_weights(GOLDEN, 1, any_bits=True), shards=3)


def imported(folder: Path, *more: str) -> Path:
    out = folder.parent / "ckpt"
    run("import", "--hf-model", folder, "--megatron-path", out, *more)
    return out


def exported(folder: Path, ckpt: Path, *more: str, to: str = "out") -> Path:
    run("export", "--hf-model", folder, "--megatron-path", ckpt, "--hf-path", folder.parent / to, *more)
    return folder.parent / to


def fails(capsys: pytest.CaptureFixture[str], args: list[str | Path], *parts: str) -> None:
    """The command ends with status 2 and one line that has all the parts."""
    capsys.readouterr()
    assert convert.main([str(a) for a in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert.py: error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


@pytest.mark.parametrize("form", FORMS)
def test_any_bits_survive(form: str, tmp_path: Path) -> None:
    """Compared with the safetensors package's own reading, not with ours."""
    weights = random_weights(GOLDEN, 3, any_bits=True)
    released = tensors_of(write_folder(tmp_path / "released", GOLDEN, weights))
    source = write_folder(tmp_path / "hf", GOLDEN, weights, form, shards=4)
    out = exported(source, imported(source), "--max-shard-size", "20KB")
    found = tensors_of(out)
    assert found.keys() == released.keys()
    assert [n for n, t in released.items() if not same_bits(t, found[n])] == []
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in released.values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as f:
            assert name in list(f.keys())
            assert f.metadata() == {"format": "pt"}


def test_reading_any_part_by_our_names(folder: Path) -> None:
    weights = random_weights(GOLDEN, 1, any_bits=True)
    r = random.Random(0)
    for source in (open_model(folder), open_any(str(imported(folder)))):
        assert source.dtypes == {n: t.dtype for n, t in weights.items()}
        assert source.config == replace(GOLDEN)
        for name, tensor in weights.items():
            assert same_bits(source.read(name), tensor)
            for _ in range(3):
                cuts = [sorted(r.choices(range(n + 1), k=2)) for n in tensor.shape]
                index = tuple(slice(a, b) for a, b in cuts)[: r.randint(1, tensor.dim())]
                assert same_bits(source.read(name, index), tensor[index])


def test_an_import_is_a_checkpoint_like_any_other(folder: Path) -> None:
    """Its checksums hold, and training's own reader finds the weights; dt_bias, bf16 in the file, is fp32 there."""
    weights = random_weights(GOLDEN, 1, any_bits=True)
    model, config = load_model(str(imported(folder)), "--checkpoint", CPU)
    assert config.model == GOLDEN
    for name, tensor in named_tensors(model).items():
        assert same_bits(tensor.detach(), weights[name].to(tensor.dtype)), name
        assert tensor.dtype == torch.float32 or not name.endswith("dt_bias")


def test_tensors_may_begin_at_any_byte(tmp_path: Path) -> None:
    """The format does not ask for alignment, and some writers do not care for it."""
    weights = random_weights(GOLDEN, 2, any_bits=True)
    folder = write_folder(tmp_path / "hf", GOLDEN, weights)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + n].rstrip() + b" " * 3
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + n :])
    source = open_model(folder)
    assert {t.parts[0].span.start % 2 for t in source.tensors.values()} == {len(header) % 2} == {1}
    assert all(same_bits(source.read(name), t) for name, t in weights.items())


@pytest.mark.parametrize("seed", range(6))
def test_a_trained_checkpoint_of_any_layout_is_exported_in_the_dtypes_of_its_origin(seed: int, tmp_path: Path) -> None:
    """Training keeps dt_bias in fp32; the release has it in bf16."""
    c = random_geometry(seed)
    origin = write_folder(tmp_path / "hf", c, random_weights(c, 0))
    weights = random_weights(c, seed, any_bits=seed % 2 == 0)
    trained = {n: t.float() if n.endswith("dt_bias") else t for n, t in weights.items()}
    write_checkpoint(tmp_path / "run", c, trained, seed)
    out = exported(origin, tmp_path / "run", "--max-shard-size", "25KB")
    wanted = {n: t.to(random_weights(c, 0)[n].dtype) for n, t in trained.items()}
    source = open_model(out)
    assert [n for n, t in wanted.items() if not same_bits(source.read(n), t)] == []
    (tmp_path / "bare").mkdir()  # the same without its weights: the released dtypes follow from config.json
    (tmp_path / "bare" / "config.json").write_bytes((origin / "config.json").read_bytes())
    bare = exported(tmp_path / "bare", tmp_path / "run", "--max-shard-size", "25KB", to="out2")
    run("verify", out, bare)


def test_dtype_changes_what_may_change(folder: Path, tmp_path: Path) -> None:
    ckpt = imported(folder)
    wide = open_model(exported(folder, ckpt, "--dtype", "float32"))
    weights = random_weights(GOLDEN, 1, any_bits=True)
    assert all(same_bits(wide.read(n), t.float()) for n, t in weights.items())
    text = json.loads((tmp_path / "out" / "config.json").read_text())
    assert text["torch_dtype"] == "float32"
    back = write_folder(tmp_path / "wide", GOLDEN, {n: t.float() for n, t in random_weights(GOLDEN, 4).items()})
    run("import", "--hf-model", back, "--megatron-path", tmp_path / "narrow", "--dtype", "bfloat16")
    assert all(same_bits(open_any(str(tmp_path / "narrow")).read(n), t) for n, t in random_weights(GOLDEN, 4).items())


def test_float16_refuses_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = random_weights(GOLDEN, 1)
    weights["norm_f.weight"][3] = 1e6
    folder = write_folder(tmp_path / "hf", GOLDEN, weights)
    args = ["import", "--hf-model", folder, "--megatron-path", tmp_path / "c", "--dtype", "float16"]
    fails(capsys, args, "norm_f.weight", "float16's range")
    assert not (tmp_path / "c" / "latest_checkpointed_iteration.txt").exists()


def test_another_geometry_is_written_so_that_every_reader_takes_it(folder: Path, tmp_path: Path) -> None:
    from transformers import NemotronHConfig

    fewer = replace(GOLDEN, num_experts_per_tok=2, time_step_limit=[0.0, 0.5])
    write_checkpoint(tmp_path / "run", fewer, random_weights(GOLDEN, 1), seed=0)
    out = exported(folder, tmp_path / "run")
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    assert new["num_experts_per_tok"] == 2
    assert new["time_step_limit"] == [0.0, 0.5]
    assert new["hybrid_override_pattern"] == "MEM*E"
    assert "layers_block_type" not in new  # beside the pattern, some of transformers 5 refuse either spelling of it
    assert new["rope_theta"] == old["rope_theta"]
    read = NemotronHConfig.from_pretrained(out)
    assert read.layers_block_type == ["linear_attention", "moe", "linear_attention", "full_attention", "moe"]
    assert open_model(out).config == fewer


def test_multi_token_prediction_is_refused_or_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "hf", GOLDEN, random_weights(GOLDEN, 1))
    tensors = tensors_of(folder)
    mtp = {"mtp.layers.0.eh_proj.weight": torch.zeros(4, 8), "mtp.layers.0.enorm.weight": torch.zeros(4)}
    save_file(tensors | mtp, folder / "model.safetensors")
    args = ["import", "--hf-model", folder, "--megatron-path", tmp_path / "ckpt"]
    fails(capsys, args, "2 tensors mtp.*", "--drop-mtp")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "num_nextn_predict_layers": 1}))
    fails(capsys, args, "num_nextn_predict_layers", "multi-token prediction")
    out = exported(folder, imported(folder, "--drop-mtp"), "--drop-mtp")
    assert tensors_of(out).keys() == tensors.keys()
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    run("verify", folder, out, "--drop-mtp")


def test_verify_names_what_differs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = random_weights(GOLDEN, 1, any_bits=True)
    expert = weights["layers.1.mixer.experts.down_proj"]
    expert.view(torch.int16)[5, 7, 2] ^= 1
    expert.view(torch.int16)[6, 0, 0] ^= -0x8000
    weights["layers.0.mixer.A_log"] = weights["layers.0.mixer.A_log"].bfloat16()
    other = write_folder(tmp_path / "other", replace(GOLDEN, num_experts_per_tok=2), weights, "fused")
    for a, b in [(folder, other), (imported(folder), other)]:
        capsys.readouterr()
        assert convert.main(["verify", str(a), str(b)]) == 1
        text = capsys.readouterr().out
        assert "num_experts_per_tok is 3 in A and 2 in B" in text
        assert "backbone.layers.0.mixer.A_log: dtype F32 in A, BF16 in B" in text
        place = r"layers\.1\.mixer\.experts\.5\.down_proj\.weight \(BF16\): 2 of 24,576 elements differ, .* \[7, 2\]"
        assert re.search(place, text)
        assert "different: 2 of" in text
    assert convert.main(["verify", str(folder), str(tmp_path / "nowhere")]) == 2


def test_an_export_in_a_narrower_dtype_is_verified_as_one_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = {n: t if "bias" in n else torch.randn(t.shape) for n, t in random_weights(GOLDEN, 1).items()}
    narrow = {n: t if n.endswith(("A_log", "correction_bias")) else t.bfloat16() for n, t in wide.items()}
    a, b = write_folder(tmp_path / "a", GOLDEN, wide, "fused"), write_folder(tmp_path / "b", GOLDEN, narrow, "fused")
    assert convert.main(["verify", str(a), str(b)]) == 1
    run("verify", "--rounded", a, b)
    assert convert.main(["verify", "--rounded", str(b), str(a)]) == 1  # wider is no rounding
    narrow["layers.0.mixer.D"].view(torch.int16)[1] += 1  # the other neighbour
    c = write_folder(tmp_path / "c", GOLDEN, narrow, "fused")
    assert convert.main(["verify", "--rounded", str(a), str(c)]) == 1


def test_inspect(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("inspect", folder)
    run("inspect", imported(folder))
    text = capsys.readouterr().out
    for part in (
        "backbone. names, one tensor per expert",
        "iteration 0, weights only",
        "MEM*E",
        "F32",
        "none unexpected",
    ):
        assert part in text
    total = sum(math.prod(s) for n, s in shapes(GOLDEN).items() if not n.endswith("correction_bias"))
    assert text.count(f"parameters    {total:,}, of which a token uses") == 2
    tensors = tensors_of(folder)
    del tensors["backbone.layers.4.mixer.experts.6.up_proj.weight"], tensors["backbone.norm_f.weight"]
    tensors["backbone.layers.3.mixer.rotary"] = torch.zeros(3)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].contiguous()
    broken = write_folder(tmp_path / "broken", GOLDEN, {"lm_head.weight": torch.zeros(1)})
    save_file(tensors, broken / "model.safetensors")
    assert convert.main(["inspect", str(broken)]) == 1
    text = capsys.readouterr().out
    for part in (
        *("experts.6.up_proj.weight (7 experts found, 8 expected)", "missing: backbone.norm_f.weight"),
        *("lm_head.weight has the shape [127, 64]", "1 unexpected tensors: 'backbone.layers.3.mixer.rotary'"),
    ):
        assert part in text


def test_compare_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "hf", GOLDEN, random_weights(GOLDEN, 1), "fused")
    args = ["--hf-model", folder, "--checkpoint", imported(folder), "--prompt", "7 10 13 99", "--prompt", "1 2 3"]
    run("compare", *args)
    lines = capsys.readouterr().out.splitlines()[-3:-1]
    errors = {
        w: float(re.search(r"largest logit error (\S+),", x)[1]) for w, x in zip(("on", "off"), lines, strict=True)
    }
    assert "floor on" in lines[0]
    assert "floor off" in lines[1]
    assert errors["off"] <= 2e-5
    assert "same first choice 100.00%" in lines[1]
    fails(capsys, ["compare", "--hf-model", folder, "--prompt", "words"], "token ids")


@pytest.mark.parametrize("offline", [False, True])
def test_hub_ids_go_through_huggingface_hub(
    folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str], offline: bool
) -> None:
    """In its cache every file is a link to a blob; those are followed, other links out of a folder are not."""
    import huggingface_hub

    cache = folder.parent / "models--nvidia--tiny"
    snapshot = cache / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate(folder.iterdir()):
        path.rename(cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    asked = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        assert local_files_only == offline
        asked.append((repo, revision, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    out = folder.parent / "ckpt"
    run("import", "--hf-model", "nvidia/tiny", "--revision", "v1", "--megatron-path", out, "--trust-remote-code")
    assert asked == [("nvidia/tiny", "v1", True, False)]
    assert "not needed" in capsys.readouterr().out
    run("verify", snapshot, out)
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, part in [("nvidia/absent-model", "the hub did not give it"), ("no/such/folder", "no such folder")]:
        fails(capsys, ["import", "--hf-model", name, "--megatron-path", folder.parent / "x"], name, part)


def test_what_is_there_is_not_overwritten_unasked(folder: Path, tmp_path: Path, capsys) -> None:
    ckpt = imported(folder)
    again = ["import", "--hf-model", folder, "--megatron-path", ckpt]
    fails(capsys, again, "--overwrite")
    run(*again, "--overwrite")
    out = exported(folder, ckpt, "--max-shard-size", "20KB")
    shards = len(list(out.glob("*.safetensors")))
    assert shards > 3
    more = ["export", "--hf-model", folder, "--megatron-path", ckpt, "--hf-path"]
    fails(capsys, [*more, out], "--overwrite")
    run(*more, out, "--overwrite")
    assert len(list(out.glob("*.safetensors"))) == 1
    assert not (out / "model.safetensors.index.json").exists()
    run("verify", folder, out)
    fails(capsys, [*more, ckpt, "--overwrite"], "holds")
    fails(capsys, [*more, folder, "--overwrite"], "being read")
    write_checkpoint(tmp_path / "run", GOLDEN, random_weights(GOLDEN, 1), seed=0)
    fails(capsys, ["import", "--hf-model", folder, "--megatron-path", tmp_path / "run"], "iter_0000010", "new folder")
    before = sorted(tmp_path.rglob("*"))
    run("import", "--hf-model", folder, "--megatron-path", tmp_path / "dry", "--dry-run")
    run(*more, tmp_path / "dry", "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_import_alone_is_enough_to_export(folder: Path, tmp_path: Path) -> None:
    """Without --hf-model: what the import kept."""
    ckpt = imported(folder)
    whole = exported(folder, ckpt)
    run("export", "--megatron-path", ckpt, "--hf-path", tmp_path / "alone")
    assert files_of(whole) == files_of(tmp_path / "alone")


def test_an_altered_checkpoint_is_not_exported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = imported(folder, "--max-shard-size", "40KB")
    file = sorted((ckpt / "iter_0000000").glob("*.safetensors"))[2]
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    out = folder.parent / "out"
    fails(capsys, ["export", "--hf-model", folder, "--megatron-path", ckpt, "--hf-path", out], file.name, "altered")
    assert not (out / "config.json").exists()
    assert not list(out.glob("*.safetensors"))


def test_a_model_trained_from_nothing_opens_in_transformers(run_script, tmp_path: Path, capsys) -> None:
    """Two steps of training, no Hugging Face folder anywhere."""
    from transformers import NemotronHForCausalLM

    args = [
        "--mode",
        "pretrain",
        "--preset",
        "tiny",
        *SHRINK,
        "train.train_iters=2",
        f"logger.run_dir={tmp_path / 'run'}",
    ]
    done = run_script("train.py", *args)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    run("export", "--checkpoint", tmp_path / "run", "--hf-path", out)
    assert "no --hf-model" in capsys.readouterr().out
    run("verify", tmp_path / "run", out)
    theirs, info = NemotronHForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.num_experts_per_tok == open_model(out).config.num_experts_per_tok
    run("compare", "--hf-model", out, "--checkpoint", tmp_path / "run", "--prompt", "7 8 9")


def slowly(args: list[str | Path]) -> None:
    """convert.py, waiting at every block that it reads."""

    def slow(blocks: Callable) -> Callable:
        def wait(self: Files, *where):
            for block in blocks(self, *where):
                time.sleep(0.002)
                yield block

        return wait

    for kind in (Files, Checked):
        kind.blocks = slow(kind.blocks)
    convert.main([str(a) for a in args])


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_killed_conversion_goes_on_where_it_was(command: str, folder: Path, tmp_path: Path) -> None:
    """kill -9 at two moments; what was finished is not written again, and the end is the same to the byte."""
    args = ["--hf-model", folder, "--megatron-path", tmp_path / "ckpt", "--max-shard-size", "20KB", "--workers", "2"]
    whole = exported(folder, imported(folder, *args[4:]), *args[4:])
    if command == "import":
        args[3] = tmp_path / "new"
        temporary, final = tmp_path / "new" / ".incomplete_iter_0000000", tmp_path / "new" / "iter_0000000"
        whole = tmp_path / "ckpt" / "iter_0000000"
    else:
        args += ["--hf-path", tmp_path / "new"]
        temporary, final = tmp_path / "new" / ".incomplete", tmp_path / "new"
    shards = len(list(whole.glob("*.safetensors")))
    journal = temporary.with_name(temporary.name + ".journal")
    times: dict[str, int] = {}
    for goal in (shards // 3, 2 * shards // 3):
        p = multiprocessing.get_context("fork").Process(target=slowly, args=([command, *args],))
        p.start()
        while not journal.exists() or journal.read_text().count("record") < goal:
            assert p.is_alive()
            time.sleep(0.005)
        p.kill()
        p.join()
        assert not (final / "config.json").exists()
        assert not (final / "manifest.json").exists()
        done = [json.loads(x)["file"] for x in journal.read_text().splitlines()[1:] if x.endswith("}")]
        kept = {f: (temporary / f).stat().st_mtime_ns for f in done}
        assert times.items() <= kept.items()
        times = kept
    broken = sorted(times)[0]  # finished, and damaged since: that one is written again
    data = (temporary / broken).read_bytes()
    (temporary / broken).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    run(command, *args)
    assert files_of(final) == files_of(whole)
    assert {f: (final / f).stat().st_mtime_ns for f in times if f != broken}.items() <= times.items()
    assert not journal.exists()
    assert not temporary.exists()


def test_a_half_published_export_is_no_model(folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The moves to the final names fail after each number of files; the next run finishes."""
    small = ["--max-shard-size", "200KB"]
    ckpt = imported(folder)
    whole = files_of(exported(folder, ckpt, *small, to="whole"))
    real = Path.replace
    for k in (0, 2, *range(len(whole) - 3, len(whole))):
        out = folder.parent / f"out{k}"
        moved = []

        def move(self: Path, target: Path, k: int = k, moved: list[Path] = moved) -> Path:
            if len(moved) == k:
                raise OSError("stopped here")
            moved.append(target)
            return real(self, target)

        monkeypatch.setattr(Path, "replace", move)
        args = ["export", "--hf-model", folder, "--megatron-path", ckpt, "--hf-path", out, *small]
        fails(capsys, args, "stopped here")
        assert len(moved) == k
        with pytest.raises(UserError):
            open_model(out)
        monkeypatch.undo()
        run(*args)
        assert files_of(out) == whole


def test_a_full_disk_is_said_and_survived(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import errno

    import nano3.convert as library

    real = library.write_file

    def full(path: Path, *args):
        if "00002" in path.name[:12]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args)

    args = ["import", "--hf-model", folder, "--megatron-path", tmp_path / "ckpt", "--max-shard-size", "20KB"]
    monkeypatch.setattr(library, "write_file", full)
    fails(capsys, args, "No space left", "run again")
    assert not (tmp_path / "ckpt" / "iter_0000000").exists()
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    fails(capsys, args, "1,000 are free")
    monkeypatch.undo()
    run(*args)
    run("verify", folder, tmp_path / "ckpt")


def test_two_at_once_do_not_mix(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    (tmp_path / "ckpt").mkdir()
    with open(tmp_path / "ckpt" / ".incomplete_iter_0000000.journal", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        fails(capsys, ["import", "--hf-model", folder, "--megatron-path", tmp_path / "ckpt"], "another process")


def test_the_script_says_what_it_can(run_script) -> None:
    done = run_script("convert.py", "import", "--hf-model", "nowhere", "--megatron-path", "x")
    assert done.returncode == 2
    assert (
        done.stderr == "convert.py: error: --hf-model 'nowhere': no such folder, and not an id of the hub such as "
        "nvidia/NAME\n"
    )
    assert "--max-shard-size" in run_script("convert.py", "export", "--help").stdout


@pytest.mark.parametrize(("text", "value"), [("5GB", 5 * 10**9), ("1.5MiB", 3 << 19), ("20 kb", 20_000), ("7", 7)])
def test_sizes(text: str, value: int) -> None:
    assert convert.size(text) == value

"""Adapters merged, and written for PEFT: the same function as the adapted model, in transformers and in peft."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import NemotronHForCausalLM

import convert
import merge_lora
from kernels import fp8
from nano3 import adapters
from nano3.model.lora import Site
from tests.oracles import hf_model
from tests.train.small import trainer

SETTINGS = ["peft.scheme=lora", "peft.rank=3", "peft.alpha=5", "optimizer.lr=0.02"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of random weights in fp32."""
    folder = tmp_path_factory.mktemp("base")
    theirs = hf_model(trainer("model.vocab_size=256").config.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.ndim > 1:
                p.normal_(std=0.08)
            elif name.endswith(("A_log", "dt_bias", "conv1d.bias")):
                p.normal_(std=0.5)
        for name, b in theirs.named_buffers():
            if name.endswith("correction_bias"):
                b.normal_(std=0.1)
    theirs.save_pretrained(folder)
    return folder


def train(base: Path, folder: Path, *more: str) -> Path:
    """A few steps; returns the checkpoint."""
    trainer(*SETTINGS, *more, f"checkpoint.pretrained_checkpoint={base}", f"logger.run_dir={folder}").run()
    return folder / "checkpoints" / "iter_0000006"


def run(*args: object) -> None:
    assert merge_lora.main([str(a) for a in args]) == 0


def tokens_of() -> Tensor:
    return torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def our_logits(checkpoint: Path) -> Tensor:
    model, _ = adapters.load_model(str(checkpoint), "test", torch.device("cpu"))
    return model.logits(model(tokens_of()).hidden)


@torch.no_grad()
def their_logits(model: torch.nn.Module) -> Tensor:
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model.eval()(tokens_of(), use_cache=False).logits


def load(folder: Path, **more: object) -> NemotronHForCausalLM:
    model = NemotronHForCausalLM.from_pretrained(folder, **more)
    model.config._experts_implementation = "eager"
    return model


@pytest.mark.parametrize(
    "more",
    [[], ["peft.experts=shared", "peft.rslora=true"], ["peft.target_modules=[up_proj]", "peft.freeze_router=false"]],
    ids=["all", "shared-rslora", "router"],
)
def test_the_merged_model_is_the_adapted_one(base: Path, tmp_path: Path, more: list[str]) -> None:
    checkpoint = train(base, tmp_path / "run", *more)
    run("--hf-model-path", base, "--lora-checkpoint", checkpoint, "--output", tmp_path / "out", "--cpu")
    ours, theirs = our_logits(checkpoint), their_logits(load(tmp_path / "out"))
    assert (ours - theirs).abs().max() < 2e-5
    assert (ours - their_logits(load(base))).abs().max() > 1e-3  # and training did change it
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "backbone.layers.1.mixer.experts.7.up_proj.weight" in names


def test_adapters_of_a_base_in_fp8_are_added_to_the_base_as_it_is(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read from a Hugging Face folder, codes are those of its numbers; merged weights are W + s B A of these numbers,
    and so the merged model is the trained one but for the rounding of the base."""
    checkpoint = train(base, tmp_path / "run", "peft.base_dtype=fp8")
    run("--hf-model-path", base, "--lora-checkpoint", checkpoint, "--output", tmp_path / "out")
    assert "trained beside the base in FP8" in capsys.readouterr().out
    model, _ = adapters.load_model(str(checkpoint), "test", torch.device("cpu"))
    source, out = (adapters.open_base(str(f), "test") for f in (base, tmp_path / "out"))
    for site in map(Site, adapters.read_recipe(checkpoint, "test").targets):
        held, W = model.get_parameter(site.weight), source.read(site.weight)
        assert torch.equal(held.view(torch.uint8), fp8.quantise(W)[0].view(torch.uint8)), site.weight
        A, B = (model.get_parameter(f"{site.adapter}.{x}").double() for x in "AB")
        assert (out.read(site.weight) - (W.double() + model.peft.scale * (B @ A))).abs().max() < 1e-6, site.weight
    ours, theirs = our_logits(checkpoint), their_logits(load(tmp_path / "out"))
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.3


def test_a_base_without_the_head_it_was_released_with(base: Path, tmp_path: Path) -> None:
    """Imported with --drop-mtp --dtype: a merge and an export need no flag again, and say what they hold."""
    folder, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1, "dtype": "bfloat16"}))
    imported = ["import", "--hf-model", folder, "--megatron-path", ckpt, "--drop-mtp", "--dtype", "float32"]
    assert convert.main([str(a) for a in imported]) == 0
    checkpoint = train(ckpt, tmp_path / "run")
    run("--lora-checkpoint", checkpoint, "--output", tmp_path / "merged")
    assert convert.main(["export", "--megatron-path", str(ckpt), "--hf-path", str(tmp_path / "out")]) == 0
    for out in ("merged", "out"):
        said = json.loads((tmp_path / out / "config.json").read_text())
        assert (said["num_nextn_predict_layers"], said["dtype"]) == (0, "float32")
    assert (our_logits(checkpoint) - their_logits(load(tmp_path / "merged", dtype="auto"))).abs().max() < 2e-5


def test_the_sum_is_rounded_once(base: Path, tmp_path: Path) -> None:
    """Every tensor of a merge into bf16 is the fp32 sum, rounded to nearest; what has no adapter is the base's."""
    checkpoint = train(base, tmp_path / "run")
    args = ["--hf-model-path", base, "--lora-checkpoint", checkpoint, "--output", tmp_path / "out"]
    run(*args, "--dtype", "bfloat16")
    run(*args[:-1], tmp_path / "wide")
    narrow, wide = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "wide"))
    model, _ = adapters.load_model(str(checkpoint), "test", torch.device("cpu"))
    for name, tensor in wide.items():
        assert torch.equal(narrow[name], tensor.to(narrow[name].dtype)), name
    for site in map(Site, adapters.read_recipe(checkpoint, "test").targets):
        A, B = (model.get_parameter(f"{site.adapter}.{x}") for x in "AB")
        expected = model.get_parameter(site.weight).double() + model.peft.scale * (B.double() @ A.double())
        for e, W in enumerate(expected if site.routed else [expected]):
            name = site.module.replace("experts.", f"experts.{e}.") if site.routed else site.module
            got = wide[f"backbone.{name}.weight"]
            assert (got - W).abs().max() <= 2 * torch.finfo(torch.float32).eps * W.abs().max(), name


@pytest.mark.parametrize("experts", ["per-expert", "shared"])
def test_peft_loads_the_adapters(base: Path, tmp_path: Path, experts: str) -> None:
    """On transformers' model, with routed experts as target_parameters; merging there and here gives the same."""
    from peft import PeftModel

    checkpoint = train(base, tmp_path / "run", "peft.exclude_modules=[out_proj]", f"peft.experts={experts}")
    where = ["--hf-model-path", base, "--lora-checkpoint", checkpoint]
    run(*where, "--output", tmp_path / "peft", "--as-peft")
    run(*where, "--output", tmp_path / "merged")
    theirs = PeftModel.from_pretrained(load(base), tmp_path / "peft")
    held = {n for n, p in theirs.named_parameters() if "lora_" in n}
    assert len(held) == 2 * len(adapters.read_recipe(checkpoint, "test").targets)
    assert (our_logits(checkpoint) - their_logits(theirs)).abs().max() < 2e-5
    there, here = (m.state_dict() for m in (theirs.merge_and_unload(), load(tmp_path / "merged")))
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        assert (tensor - here[name]).abs().max() <= 2 * torch.finfo(tensor.dtype).eps * tensor.abs().max(), name


def test_what_peft_cannot_hold_is_refused_with_a_way_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = train(base, tmp_path / "run")
    args = ["--lora-checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--as-peft"]
    assert merge_lora.main(args) == 2
    error = capsys.readouterr().err
    assert "PEFT refuses adapters on out_proj" in error
    assert "peft.exclude_modules=[out_proj]" in error
    assert "without --as-peft" in error
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = train(base, tmp_path / "run")
    other = load(base)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    args = ["--hf-model-path", tmp_path / "other", "--lora-checkpoint", checkpoint, "--output", tmp_path / "out"]
    assert merge_lora.main([str(a) for a in args]) == 2
    assert "is not the base of these adapters" in capsys.readouterr().err
    run(*args, "--pretrained", base)  # configuration from one, weights from the other
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "nemotron_h"
    run("--lora-checkpoint", checkpoint, "--output", tmp_path / "found")  # the base is found where it was
    assert (tmp_path / "found" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()

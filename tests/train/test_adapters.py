"""Adapters on disk: only what was trained, with its recipe; resumed to the bit; on no other base."""

import json
import re
from pathlib import Path

import pytest
import torch

from kernels import fp8
from nano3 import adapters
from nano3.config import UserError
from nano3.model.init import named_tensors
from nano3.model.lora import adapted
from nano3.train import checkpoint
from nano3.train.plan import memory
from nano3.train.storage import read_manifest
from tests.train.small import small, trainer

LORA = ["peft.scheme=lora", "peft.rank=3", "optimizer.lr=0.01"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained model."""
    folder = tmp_path_factory.mktemp("base")
    trainer(f"logger.run_dir={folder}").run()
    return f"checkpoint.pretrained_checkpoint={folder}/checkpoints"


@pytest.mark.parametrize("more", [[], ["peft.experts=shared", "train.precision=bf16"]], ids=["fp32", "bf16-shared"])
def test_a_stopped_and_resumed_run_equals_one_that_did_not_stop(base: str, tmp_path: Path, more: list[str]) -> None:
    """Adapters alone are stored, and with them everything: weights, moments and masters are equal to the bit."""
    whole = trainer(base, *LORA, *more, f"logger.run_dir={tmp_path / 'whole'}", "checkpoint.save_interval=3")
    whole.run()
    folder = tmp_path / "whole" / "checkpoints" / "iter_0000003"
    keys = read_manifest(folder, "test").tensors
    assert {k.split(".", 1)[0] for k in keys} == {"model", "exp_avg", "exp_avg_sq"} | ({"master"} if more else set())
    assert all(".lora." in k or ".shared_lora." in k for k in keys)
    resumed = trainer(*LORA, *more, f"logger.run_dir={tmp_path / 'resumed'}", f"checkpoint.load={folder}")
    resumed.run()
    for name, t in named_tensors(whole.model).items():
        assert torch.equal(t, named_tensors(resumed.model)[name]), name
    for name, state in whole.optimizer.state().items():
        for kind, t in state.items():
            assert torch.equal(t, resumed.optimizer.state()[name][kind]), (name, kind)


def test_frozen_tensors_are_unchanged_to_the_bit_after_50_steps(base: str, tmp_path: Path) -> None:
    """Every base weight, the router's weights and the selection biases, and adapters do move."""
    t = trainer(base, *LORA, "train.train_iters=50", f"logger.run_dir={tmp_path}")
    before = {n: x.clone() for n, x in named_tensors(t.model).items()}
    t.run()
    assert any("e_score_correction_bias" in n for n in before)
    for name, x in named_tensors(t.model).items():
        assert torch.equal(x, before[name]) == (adapted(name) is None), name
    assert set(t.optimizer.masters) == {n for n in before if adapted(n)}


def test_the_recipe_is_complete_and_the_model_is_found_again(base: str, tmp_path: Path) -> None:
    t = trainer(base, *LORA, "peft.target_modules=[in_proj,linear_fc1]", f"logger.run_dir={tmp_path}")
    t.run()
    folder = tmp_path / "checkpoints" / "iter_0000006"
    recipe = adapters.read_recipe(folder, "test")
    assert recipe.targets == [
        "layers.0.mixer.in_proj",
        "layers.1.mixer.experts.up_proj",
        "layers.1.mixer.shared_experts.up_proj",
        "layers.3.mixer.up_proj",
    ]
    assert (recipe.rank, recipe.scale, recipe.variant, recipe.experts) == (3, 32 / 3, "lora", "per-expert")
    assert recipe.base == base.split("=")[1] + "/iter_0000006"  # not a folder, to which more may come
    model, _ = adapters.load_model(str(tmp_path), "test", torch.device("cpu"))
    tokens = torch.randint(0, 250, (2, 16))
    assert torch.equal(model(tokens).hidden, t.model.eval()(tokens).hidden)


def test_another_base_and_another_recipe_are_refused(base: str, tmp_path: Path) -> None:
    trainer(base, *LORA, f"logger.run_dir={tmp_path / 'lora'}").run()
    load = f"checkpoint.load={tmp_path / 'lora'}/checkpoints"
    longer = "train.train_iters=9"
    other = trainer("rng.seed=7", f"logger.run_dir={tmp_path / 'other'}")
    other.run()
    with pytest.raises(UserError, match=r"other/checkpoints/iter_0000006 is not the base of these adapters"):
        trainer(load, *LORA, longer, f"checkpoint.pretrained_checkpoint={tmp_path / 'other'}/checkpoints")
    with pytest.raises(UserError, match=r"its adapters have scale 10.6.*, the settings say 2.0"):
        trainer(load, base, *LORA, longer, "peft.alpha=6")
    with pytest.raises(UserError, match=r"its adapters have targets"):
        trainer(load, base, *LORA, longer, "peft.exclude_modules=[q_proj]")
    with pytest.raises(UserError, match=r"holds adapters, not a model.*merge_lora.py"):
        trainer(f"checkpoint.pretrained_checkpoint={tmp_path / 'lora'}/checkpoints")
    with pytest.raises(UserError, match=r"holds adapters, not a model"):
        checkpoint.load_model(str(tmp_path / "lora"), "test", torch.device("cpu"))
    with pytest.raises(UserError, match=r"give it with checkpoint.pretrained_checkpoint=PATH"):
        trainer(*LORA)


def test_one_number_changes_the_fingerprint(base: str, tmp_path: Path) -> None:
    source = adapters.open_base(base.split("=")[1], "test")
    first = adapters.fingerprint(source)
    assert first == adapters.fingerprint(source, workers=1)
    original = source.stream
    source.stream = lambda name: (
        b[:-1] + b"\x01" if name == "norm_f.weight" else b for b in map(bytes, original(name))
    )
    assert adapters.fingerprint(source) != first


def test_routers_may_be_trained_beside_adapters(base: str, tmp_path: Path) -> None:
    """Then their weights move in full, their biases too, and both are stored and found again."""
    t = trainer(base, *LORA, "peft.freeze_router=false", f"logger.run_dir={tmp_path}")
    before = {n: x.clone() for n, x in named_tensors(t.model).items()}
    t.run()
    router = {n for n in before if ".gate." in n}
    assert len(router) == 2
    assert all(not torch.equal(before[n], named_tensors(t.model)[n]) for n in router)
    model, _ = adapters.load_model(str(tmp_path), "test", torch.device("cpu"))
    for name, x in named_tensors(model).items():
        assert torch.equal(x, named_tensors(t.model)[name]), name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["peft.freeze=[layers.9.*]"], r"'layers.9.\*' matches no tensor"),
        (["peft.freeze=['*']"], r"leaves nothing to train"),
        (["peft.rank=8"], r"peft.rank is about adapters.*--peft lora"),
        (["peft=lora", "peft.freeze=[norm_f.weight]"], r"freezes everything but its adapters"),
        (["peft=lora", "peft.dropout=0.1"], r"no dropout here"),
        (["peft=lora", "peft.dora=true"], r"peft.dora=true is not available"),
        (["peft=lora", "peft.base_dtype=int4"], r"peft.base_dtype='int4' is not known; choose from bf16, fp8"),
        (["peft.base_dtype=fp8"], r"peft.base_dtype is about adapters.*--peft lora"),
        (["peft=qlora"], r"peft.scheme='qlora' is not available; use lora"),
        (["peft=lora", "peft.target_modules=[gate_proj]"], r"'gate_proj' matches nothing; there are in_proj"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(setting: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        memory(small(*setting), 1, "cpu")


@pytest.mark.parametrize(("key", "value"), [("format", 9), ("rank", None)])
def test_a_recipe_that_is_damaged_is_refused(tmp_path: Path, key: str, value: int | None) -> None:
    raw = json.loads(adapters.Recipe([], 1, 1.0, 1.0, "lora", "none", True, "", "").to_json())
    raw[key] = value
    if value is None:
        del raw[key]
    (tmp_path / "adapter.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"adapter\.json"):
        adapters.read_recipe(tmp_path, "test")


@pytest.mark.parametrize("more", [[], ["train.precision=bf16", "peft.experts=none"]], ids=["fp32", "bf16-none"])
def test_a_base_in_fp8(base: str, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str]) -> None:
    """The codes are those of the base's numbers and stay as they are; the error is said; a run goes on to the bit; the
    model is found again; and adapters of one kind of base do not go on on the other."""
    settings = [base, *LORA, *more, "peft.base_dtype=fp8"]
    t = trainer(*settings, f"logger.run_dir={tmp_path / 'whole'}", "checkpoint.save_interval=3")
    source = adapters.open_base(base.split("=")[1], "test")
    coded = {n: x for n, x in named_tensors(t.model).items() if x.dtype == fp8.CODE}
    before = {n: (x.view(torch.uint8).clone(), x.scales.clone()) for n, x in coded.items()}
    for name, (codes, scales) in before.items():
        expected = fp8.quantise(source.read(name))
        assert torch.equal(codes, expected[0].view(torch.uint8)), name
        assert torch.equal(scales, expected[1]), name
    t.run()
    kinds = {n.split(".mixer.")[1].removesuffix(".weight") for n in coded}
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("base in FP8"))
    errors = dict(re.findall(r"([\w.]+) (\d\.\d\d)%", line))
    assert set(errors) == kinds
    assert all(2 < float(e) < 3 for e in errors.values())
    assert all(torch.equal(coded[n].view(torch.uint8), codes) for n, (codes, _) in before.items())
    assert all(torch.equal(coded[n].scales, scales) for n, (_, scales) in before.items())
    folder = tmp_path / "whole" / "checkpoints" / "iter_0000003"
    assert all(".lora." in k for k in read_manifest(folder, "test").tensors)
    assert adapters.read_recipe(folder, "test").base_dtype == "fp8"
    resumed = trainer(*settings[1:], f"logger.run_dir={tmp_path / 'resumed'}", f"checkpoint.load={folder}")
    resumed.run()
    found, _ = adapters.load_model(str(tmp_path / "whole"), "test", torch.device("cpu"))
    for name, x in named_tensors(t.model).items():
        for other in (resumed.model, found):
            assert torch.equal(x.view(torch.uint8), named_tensors(other)[name].view(torch.uint8)), name
    with pytest.raises(UserError, match=r"its adapters have base_dtype fp8, the settings say bf16"):
        trainer(base, *LORA, *more, f"checkpoint.load={folder}")

"""Counts against the published model, the code's own tensors, and hand arithmetic."""

import pytest

from nano3.cli import parser, resolve
from nano3.config import Config, ModelConfig, UserError
from nano3.presets import PRESETS
from nano3.train import plan
from nano3.train.checkpoint import build
from nano3.train.plan import check_fits, memory, parameters, training_flops


def preset(name: str, *overrides: str) -> Config:
    return resolve(parser().parse_args(["--mode", "pretrain", "--preset", name, *overrides]))[0]


def test_the_released_model() -> None:
    n = parameters(ModelConfig())
    assert n.total == 31_577_937_344
    assert n.active == 3_580_076_352 - 23 * 128  # the published figure counts the bias buffers
    assert (n.block["M"], n.block["*"]) == (38_744_896, 23_399_040)
    assert n.block["E"] == 1_297_468_160 - 128


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("ladder-1b", 1.275e9, 0.315e9),
        ("ladder-2b", 2.424e9, 0.505e9),
        ("ladder-4b", 4.374e9, 0.776e9),
        ("ladder-7b", 7.249e9, 1.109e9),
        ("ladder-15b", 14.80e9, 2.009e9),
    ],
)
def test_the_published_ladder(name: str, total: float, active: float) -> None:
    n = parameters(preset(name).model)
    assert n.total == pytest.approx(total, rel=5e-4)
    assert n.active == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_formula_equals_the_model_built(name: str) -> None:
    config = preset(name).model
    assert parameters(config).total == sum(p.numel() for p in build(config).parameters())


def test_flops_of_the_released_model() -> None:
    flops = training_flops(ModelConfig(), 8192)
    assert sum(flops.values()) == pytest.approx(21.05e9, rel=0.01)
    assert flops["head"] == 3 * 2 * 2688 * 131072


def test_memory_by_hand() -> None:
    config = preset("tiny")
    n = parameters(config.model).total
    one = memory(config, 1, bf16=False)
    assert (one.weights, one.gradients, one.optimizer) == (4 * n, 4 * n, 8 * n)
    nano = preset("nano-30b-a3b", "parallel.tp=1", "parallel.ep=8")
    experts = 23 * 128 * 2 * 2688 * 1856
    dense = parameters(nano.model).total - experts
    eight = memory(nano, 8, bf16=True)
    assert eight.weights == 2 * (dense + experts // 8)
    assert eight.optimizer == pytest.approx(12 * (dense / 8 + experts / 8), rel=1e-6)


def test_recompute_lowers_the_estimate() -> None:
    kept, less = (memory(preset("ladder-1b", f"train.recompute={r}"), 1, True) for r in ("none", "full"))
    assert less.activations < kept.activations / 3


def test_a_model_too_large_is_refused_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "machine_memory", lambda device: 16 << 30)
    with pytest.raises(UserError) as caught:
        check_fits(preset("nano-30b-a3b-top5"), "nano-30b-a3b-top5", 1, "cpu", 1)
    text = str(caught.value)
    for part in ("31,577,937,344 parameters", "tp=4 ep=8", "GiB", "16.0 GiB", "--preset tiny", "torchrun"):
        assert part in text
    check_fits(preset("tiny"), "tiny", 1, "cpu", 1)


def test_the_nearest_preset_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "machine_memory", lambda device: 130 << 30)
    with pytest.raises(UserError, match="--preset ladder-4b"):
        check_fits(preset("nano-30b-a3b"), "nano-30b-a3b", 1, "cuda", 1)

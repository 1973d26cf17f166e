"""The learning rate at hand-computed places."""

import math

import pytest

from nano3.config import UserError
from nano3.train.schedule import learning_rate
from tests.train.small import small

WSD = ["scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=40", "train.train_iters=100"]
BASE = ["optimizer.lr=1.0", "optimizer.min_lr=0.2", "scheduler.lr_warmup_iters=10"]  # 4 samples a step


def at(iteration: float, *overrides: str) -> float:
    return learning_rate(small(*BASE, *overrides))(round(iteration * 4))


@pytest.mark.parametrize(
    ("style", "left"),
    [
        ("linear", 0.75),
        ("cosine", 0.5 * (1 + math.cos(math.pi / 4))),
        ("exponential", 2 * 0.5**0.25 - 1),
        ("minus_sqrt", 0.5),
    ],
)
def test_wsd_warms_up_stays_and_decays(style: str, left: float) -> None:
    flags = [*WSD, f"scheduler.lr_wsd_decay_style={style}"]
    assert at(0, *flags) == 0
    assert at(5, *flags) == pytest.approx(0.5)
    assert at(10, *flags) == at(35, *flags) == at(60, *flags) == 1
    assert at(70, *flags) == pytest.approx(0.2 + 0.8 * left)  # a quarter of the decay
    assert at(100, *flags) == at(500, *flags) == 0.2


def test_cosine_linear_and_constant() -> None:
    cosine = ["scheduler.lr_decay_style=cosine", "train.train_iters=110"]
    assert at(60, *cosine) == pytest.approx(0.6)
    assert at(110, *cosine) == 0.2
    linear = ["scheduler.lr_decay_style=linear", "scheduler.lr_decay_iters=60", "train.train_iters=110"]
    assert at(35, *linear) == pytest.approx(0.6)
    assert at(61, *linear) == 0.2
    assert at(90, "scheduler.lr_decay_style=constant", "train.train_iters=110") == 1


def test_lengths_in_samples_tokens_and_fractions_agree() -> None:
    runs = [
        ["scheduler.lr_warmup_iters=10", "scheduler.lr_wsd_decay_iters=40"],
        ["scheduler.lr_warmup_samples=40", "scheduler.lr_wsd_decay_samples=160"],
        ["scheduler.lr_warmup_tokens=960", "scheduler.lr_wsd_decay_tokens=3840"],
        ["scheduler.lr_warmup_samples=40", "scheduler.lr_wsd_decay_fraction=0.4"],
    ]
    lengths = [["train.train_iters=100"], ["train.train_samples=400"], ["train.train_tokens=9600"]]
    curves = set()
    for run in runs:
        for length in lengths:
            config = small("scheduler.lr_decay_style=WSD", *run, *length)
            assert config.iterations == 100
            curves.add(tuple(learning_rate(config)(s) for s in range(0, 404, 4)))
    assert len(curves) == 1


def test_warm_up_from_a_value() -> None:
    assert at(0, *WSD, "scheduler.lr_warmup_init=0.1") == pytest.approx(0.1)
    assert at(5, *WSD, "scheduler.lr_warmup_init=0.1") == pytest.approx(0.55)


@pytest.mark.parametrize("end", ["iters=80", "samples=320", "tokens=7680"])
def test_the_warm_up_is_a_fraction_of_the_decay_as_in_megatron(end: str) -> None:
    """lr_warmup_steps = lr_warmup_fraction * lr_decay_steps there; the length of the run has no part in it."""
    given = [f"scheduler.lr_decay_{end}", "scheduler.lr_decay_style=linear", "train.train_iters=200"]
    config = small("optimizer.lr=1.0", "scheduler.lr_warmup_fraction=0.25", *given)
    curve = [learning_rate(config)(4 * i) for i in (10, 20, 50, 80)]
    assert curve == pytest.approx([0.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    "bad",
    [
        ["scheduler.lr_warmup_iters=100", "scheduler.lr_decay_style=cosine"],
        ["scheduler.lr_warmup_iters=50", "scheduler.lr_wsd_decay_iters=60", "scheduler.lr_decay_style=WSD"],
    ],
)
def test_lengths_that_do_not_fit_are_refused(bad: list[str]) -> None:
    with pytest.raises(UserError, match="shorten"):
        learning_rate(small("train.train_iters=100", *bad))

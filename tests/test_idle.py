"""Settings that do nothing are refused, each where it does nothing; what presets and earlier runs say is not."""

from pathlib import Path

import pytest

from nano3.cli import parser, resolve, to_yaml
from nano3.config import Config, UserError
from nano3.idle import RULES, Rule
from nano3.presets import PRESETS

TUNE, TEXT = ["--mode", "finetune", "--preset", "tiny"], ["--mode", "pretrain", "--preset", "tiny"]
ENTERS = {  # the place that a rule is about -> commands that are there
    "in pretraining": [TEXT],
    "with a blend": [[*TUNE, "dataset.blend=x"], [*TUNE, "--per-split-data-args-path", "x.json"]],
    "with dataset.name=embedded or mock": [[*TUNE, "dataset=mock"], [*TUNE, "dataset=embedded"]],
    "with dataset.packed_path": [[*TUNE, "dataset.packed_path=x"]],
    "with dataset.path": [[*TUNE, "dataset.path=x.jsonl"]],
    "without a blend": [TEXT, TUNE, [*TUNE, "dataset.path=x"], [*TUNE, "dataset.packed_path=x"]],
    "with a blend that names its splits": [
        [*TEXT, "dataset.train_data_path=x"],
        [*TEXT, "dataset.blend_per_split=[x,y,z]"],
        [*TEXT, "dataset.per_split_data_args_path=x.json"],
    ],
    "with dataset.name=mock": [[*TEXT, "dataset=mock"]],
    "with scheduler.lr_decay_style=constant": [
        [*TEXT, "scheduler.lr_decay_style=constant", "scheduler.lr_warmup_iters=5"]
    ],
    "without scheduler.lr_decay_style=WSD": [[*TEXT, f"scheduler.lr_decay_style={s}"] for s in ("cosine", "constant")],
    "without a warm-up": [[*TEXT, "scheduler.lr_warmup_iters=0"]],
    "with validation.eval_iters=0 or validation.sample_tokens=0": [
        [*TEXT, "validation.eval_iters=0"],
        [*TEXT, "validation.sample_tokens=0"],
    ],
}
GIVEN = {
    "dataset.name": "tulu",
    "dataset.path": "a.jsonl",
    "dataset.subset": "a",
    "dataset.columns": "{input: a}",
    "dataset.packed_sequence": "true",
    "dataset.packed_path": "a",
    "dataset.loss_mode": "full",
    "dataset.chat_template": "a",
    "dataset.chat_template_kwargs": "{a: 1}",
    "dataset.truncation": "left",
    "dataset.on_error": "skip",
    "dataset.val_proportion": "0.2",
    "dataset.seed": "1",
    "dataset.split": "9,1",
    "dataset.path_to_cache": "a",
    "dataset.random_seed": "1",
    "dataset.reset_attention_mask": "false",
    "scheduler.lr_decay_iters": "50",
    "scheduler.lr_decay_samples": "50",
    "scheduler.lr_decay_tokens": "50",
    "scheduler.lr_wsd_decay_style": "exponential",
    "scheduler.lr_wsd_decay_iters": "5",
    "scheduler.lr_wsd_decay_samples": "5",
    "scheduler.lr_wsd_decay_tokens": "5",
    "scheduler.lr_wsd_decay_fraction": "0.9",  # the preset's own value: here somebody means it
    "scheduler.lr_warmup_init": "0.1",
    "validation.sample_prompt": "a",
}


def settings(*args: str) -> Config:
    return resolve(parser().parse_args(list(args)))[0]


CASES = [
    pytest.param(rule, key, command, id=f"{key} {rule.where} {' '.join(command[4:])}")
    for rule in RULES
    for key in rule.keys
    for command in ENTERS[rule.where]
    if (rule.where, key) != ("in pretraining", "dataset.name")
]


@pytest.mark.parametrize(("rule", "key", "command"), CASES)
def test_what_does_nothing_is_refused(rule: Rule, key: str, command: list[str]) -> None:
    settings(*command)
    with pytest.raises(UserError) as caught:
        settings(*command, f"{key}={GIVEN[key]}")
    message = str(caught.value)
    assert message.startswith(f"{key}=")
    assert "does nothing" in message
    assert message.endswith(("drop it", "drop it, or the blend", "drop one of the two", "and rng.seed)"))


@pytest.mark.parametrize(
    "args",
    [
        [*TEXT, "dataset.blend=x", "dataset.split=9,1", "dataset.random_seed=1", "dataset.path_to_cache=a"],
        [*TEXT, "dataset.train_data_path=x", "dataset.random_seed=1", "dataset.reset_attention_mask=false"],
        [*TUNE, "dataset=tulu", "dataset.subset=a", "dataset.columns={input: a}", "dataset.seed=1"],
        [*TUNE, "dataset.path=x", "dataset.loss_mode=full", "dataset.truncation=left", "dataset.on_error=skip"],
        [*TUNE, "dataset.path=x", "dataset.val_proportion=0.2", "dataset.chat_template=a", "--packed-sequence"],
        [*TUNE, "dataset.packed_path=x", "dataset.seed=1"],
        [*TEXT, "scheduler.lr_wsd_decay_style=exponential", "scheduler.lr_wsd_decay_iters=5"],
        [*TEXT, "scheduler.lr_decay_style=cosine", "scheduler.lr_decay_iters=50"],
        [*TEXT, "scheduler.lr_warmup_init=0.1", "validation.sample_prompt=a"],
    ],
    ids=lambda args: " ".join(args[1:]),
)
def test_what_does_something_is_taken(args: list[str]) -> None:
    settings(*args)


@pytest.mark.parametrize("mode", ["pretrain", "finetune"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_the_configurations_of_their_runs_are_taken(preset: str, mode: str, tmp_path: Path) -> None:
    """And the file of a run holds for a later one, of another kind of data or schedule, whatever its preset is."""
    changes = [["dataset.blend=x"], ["scheduler.lr_decay_style=constant"], ["scheduler.lr_decay_style=cosine"]]
    changes += [["dataset.path=x"], ["--peft", "lora"]] if mode == "finetune" else [["dataset=mock"]]
    plain = settings("--mode", mode, "--preset", preset)
    (tmp_path / "plain.yaml").write_text(to_yaml(plain))
    again = ["--mode", mode, "--config-file", str(tmp_path / "plain.yaml")]
    assert settings(*again) == plain
    for more in changes:
        changed = settings(*again, *more)
        (tmp_path / "changed.yaml").write_text(to_yaml(changed))
        assert settings("--mode", mode, "--config-file", str(tmp_path / "changed.yaml")) == changed


def test_a_file_that_somebody_wrote_is_held_to_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("scheduler: {lr_decay_style: cosine, lr_wsd_decay_iters: 7}")
    with pytest.raises(UserError, match=r"lr_wsd_decay_iters=7 does nothing without scheduler\.lr_decay_style=WSD"):
        settings(*TEXT, "--config-file", str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "setting",
    [
        *(f"lr_warmup_{unit}=-5" for unit in ("iters", "samples", "tokens")),
        *(f"lr_decay_{unit}=0" for unit in ("iters", "samples", "tokens")),
        *(f"lr_wsd_decay_{unit}=-1" for unit in ("iters", "samples", "tokens")),
        "lr_warmup_init=-0.1",
    ],
)
def test_lengths_are_not_negative(setting: str) -> None:
    with pytest.raises(UserError, match=rf"scheduler\.{setting} must be at least"):
        settings(*TEXT, f"scheduler.{setting}")


def test_the_decay_of_a_constant_rate_may_say_how_long_the_warm_up_is() -> None:
    words = ["scheduler.lr_decay_style=constant", "scheduler.lr_decay_iters=50", "train.train_iters=200"]
    words += ["scheduler.lr_wsd_decay_fraction=null"]
    args = ["--mode", "pretrain", "--preset", "tiny", *words]
    with pytest.raises(UserError, match="lr_decay_iters=50 does nothing"):
        resolve(parser().parse_args([*args, "scheduler.lr_warmup_fraction=0"]))
    resolve(parser().parse_args([*args, "scheduler.lr_warmup_fraction=0.1"]))

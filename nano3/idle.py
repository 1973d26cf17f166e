"""Settings that do nothing where they are given: refused by name, since whoever gives one means something by it.

What only the data can tell, a column or a chat template that no record needs, is not known here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from nano3.config import BLEND_PATHS, Config, UserError
from nano3.presets import DEFAULT, PRESETS, layers


class Rule(NamedTuple):
    """In a message: KEY=VALUE does nothing `where`: `instead`."""

    where: str
    holds: Callable[[Config], bool]
    keys: tuple[str, ...]
    instead: str


def _of(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


RECORDS = _of(  # how records become samples, and rows
    "dataset",
    *("subset", "columns", "packed_sequence", "loss_mode", "chat_template", "chat_template_kwargs"),
    *("truncation", "on_error", "val_proportion"),
)
SUPERVISED = (*RECORDS, *_of("dataset", "packed_path", "seed"))
NAMED_SPLITS = ("per_split_data_args_path", "blend_per_split", *BLEND_PATHS)
UNITS = ("iters", "samples", "tokens", "fraction")


def _no_warm_up(c: Config) -> bool:
    return not any(getattr(c.scheduler, f"lr_warmup_{unit}") for unit in UNITS)


RULES = (
    Rule(
        "in pretraining",
        lambda c: c.mode == "pretrain",
        (*SUPERVISED, "dataset.path"),
        "it is for supervised data: use --mode finetune, or drop it",
    ),
    Rule(
        "with a blend",
        lambda c: c.dataset.kind == "blend",
        (*SUPERVISED, "dataset.name"),
        "it is for other data: drop it, or the blend",
    ),
    Rule(
        "with dataset.name=embedded or mock",
        lambda c: c.dataset.kind in ("embedded", "mock"),
        SUPERVISED,
        "it is for supervised data: give dataset.path or another dataset.name, or drop it",
    ),
    Rule(
        "with dataset.packed_path",
        lambda c: c.dataset.kind == "packed",
        (*RECORDS, "dataset.name"),
        "its rows are made already: give it to python -m nano3.data.pack, or drop it",
    ),
    Rule(
        "with dataset.path",
        lambda c: c.dataset.kind == "records" and c.dataset.path is not None,
        ("dataset.subset",),
        "it is for data sets of the hub: drop one of the two",
    ),
    Rule(
        "without a blend",
        lambda c: c.dataset.kind != "blend",
        _of("dataset", "split", "path_to_cache", "random_seed"),
        "it is for .bin/.idx files: name some, e.g. dataset.blend=PREFIX, or drop it (other data has dataset.seed for "
        "supervised data and rng.seed)",
    ),
    Rule(
        "with a blend that names its splits",
        lambda c: any(getattr(c.dataset, name) is not None for name in NAMED_SPLITS),
        ("dataset.split",),
        "it cuts the files of dataset.blend: give them so, or drop it",
    ),
    Rule(
        "with dataset.name=mock",
        lambda c: c.dataset.kind == "mock",
        ("dataset.reset_attention_mask",),
        "a row of mock data is one document: drop it",
    ),
    Rule(
        "with scheduler.lr_decay_style=constant",
        lambda c: c.scheduler.lr_decay_style == "constant" and not c.scheduler.lr_warmup_fraction,  # which is of it
        _of("scheduler", "lr_decay_iters", "lr_decay_samples", "lr_decay_tokens"),
        "choose a style that decays (WSD, cosine or linear), or drop it",
    ),
    Rule(
        "without scheduler.lr_decay_style=WSD",
        lambda c: c.scheduler.lr_decay_style != "WSD",
        _of("scheduler", "lr_wsd_decay_style", *(f"lr_wsd_decay_{unit}" for unit in UNITS)),
        "set that, or drop it",
    ),
    Rule(
        "without a warm-up",
        _no_warm_up,
        ("scheduler.lr_warmup_init",),
        "give its length, e.g. scheduler.lr_warmup_iters=10, or drop it",
    ),
    Rule(
        "with validation.eval_iters=0 or validation.sample_tokens=0",
        lambda c: not (c.validation.eval_iters and c.validation.sample_tokens),
        ("validation.sample_prompt",),
        "nothing is sampled then: raise them, or drop it",
    ),
)


def refuse_idle(config: Config, typed: Collection[str] = ()) -> None:
    """Raise UserError on a setting that does nothing.

    A default is never refused, nor is a preset's value, unless it is among those `typed` on the command line: the
    config.yaml of a run lists them all, and holds for a later run that changes the kind of data.
    """
    defaults = Config()
    for rule in RULES:
        if not rule.holds(config):
            continue
        for key in rule.keys:
            value = operator.attrgetter(key)(config)
            if value == operator.attrgetter(key)(defaults) or (key not in typed and value in _presets_values(key)):
                continue
            raise UserError(f"{key}={value} does nothing {rule.where}: {rule.instead}")


def _presets_values(key: str) -> list[Any]:
    """What any preset in any mode gives a setting."""
    section, _, name = key.partition(".")
    every = (layer for preset in PRESETS for mode in DEFAULT for layer in layers(preset, mode, True))
    return [layer[section][name] for layer in every if name in layer.get(section, {})]

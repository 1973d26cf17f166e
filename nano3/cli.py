"""From the command line to a validated Config: preset, --config-file, flags, `a.b=v`, each over what came before."""

from __future__ import annotations

import argparse
import math
import operator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nano3.config import KINDS, Config, UserError, keys_of, merge, nearest, schema
from nano3.idle import UNITS, refuse_idle
from nano3.presets import DEFAULT, PRESETS, layers

ALIASES = {  # what NVIDIA's commands say -> what it is here
    "dataset": "dataset.name",
    "model.seq_length": "dataset.seq_length",
    "model.tensor_model_parallel_size": "parallel.tp",
    "model.expert_model_parallel_size": "parallel.ep",
    "model.pipeline_model_parallel_size": "parallel.pp",
    "model.virtual_pipeline_model_parallel_size": "parallel.virtual_pp",
    "model.context_parallel_size": "parallel.cp",
    "peft": "peft.scheme",
    "peft.dim": "peft.rank",
    "ddp.grad_reduce_in_fp32": "parallel.grad_reduce_in_fp32",
}
LENGTHS = ["train.train", "scheduler.lr_warmup", "scheduler.lr_decay", "scheduler.lr_wsd_decay"]


class Parser(argparse.ArgumentParser):
    """Settings and flags may come in any order."""

    parse_args = argparse.ArgumentParser.parse_intermixed_args


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="train.py",
        description="Train a Nemotron 3 Nano, alone (python train.py …) or under torchrun; nothing else differs.",
        epilog="Any setting can be given as section.key=value, e.g. train.train_iters=100 optimizer.lr=1e-3.",
    )
    p.add_argument("--mode", choices=["pretrain", "finetune"], required=True)
    defaults = " or ".join(f"{name} to {mode}" for mode, name in DEFAULT.items())
    p.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default: {defaults})")
    p.add_argument(
        "--config-file", metavar="YAML", help="settings laid over the preset, e.g. the config.yaml of an earlier run"
    )
    p.add_argument(
        "--per-split-data-args-path", metavar="JSON", help="blend of .bin/.idx files for train, valid and test"
    )
    p.add_argument("--tokenizer-model", metavar="PATH", help="'bytes', a Hugging Face folder, or a tokenizer.json")
    p.add_argument(
        "--resume-from-last-good",
        action="store_true",
        help="if checkpoint.load is damaged, take the newest checkpoint beside it that is not",
    )
    p.add_argument("--seq-length", metavar="N", help="tokens per sequence")
    p.add_argument(
        "--peft", metavar="SCHEME", help="lora: train adapters beside the frozen weights (docs/finetuning.md)"
    )
    p.add_argument("--packed-sequence", action="store_true", help="several samples a row, to fine-tune on short ones")
    p.add_argument(
        "--dry-run", action="store_true", help="print parameters, memory and messages of each rank, then stop; no GPU"
    )
    p.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for, with --dry-run")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")
    return p


def resolve(args: argparse.Namespace) -> tuple[Config, str]:
    """The validated configuration and the name of its preset.  Raises UserError."""
    if args.world_size is not None:
        _check_world_size(args)
    if asked := [o for o in args.overrides if o.startswith("mode=")]:
        raise UserError(f"{asked[0]}: the mode is what --mode says; it is {args.mode}")
    name = args.preset or DEFAULT[args.mode]
    if name not in PRESETS:
        raise UserError(
            f"--preset {name}: there is no such preset{nearest(name, list(PRESETS))} Known: {', '.join(PRESETS)}"
        )
    flags = {
        "dataset.per_split_data_args_path": args.per_split_data_args_path,
        "tokenizer.tokenizer_model": args.tokenizer_model,
        "dataset.seq_length": args.seq_length,
        "peft.scheme": args.peft,
        "dataset.packed_sequence": args.packed_sequence or None,
        "checkpoint.resume_from_last_good": args.resume_from_last_good or None,
    }
    asked = [
        (args.config_file or "", read_yaml(args.config_file) if args.config_file else {}),
        ("command line", _nest([(k, v) for k, v in flags.items() if v is not None])),
        ("command line", _nest(_split(args.overrides))),
    ]
    schemes = [layer["peft"]["scheme"] for _, layer in asked if "scheme" in (layer.get("peft") or {})]
    adapts = bool(schemes) and schemes[-1] != "none"
    given = [
        *((f"preset {name}", layer) for layer in layers(name, args.mode, adapts)),
        *asked,
        ("command line", {"mode": args.mode}),
    ]
    node = schema(Config)
    for source, layer in given:
        layer = _one_unit_each(node, OmegaConf.create(layer), source)
        node = merge(node, layer, source)
    config = OmegaConf.to_object(node)
    validate(config)
    typed = [OmegaConf.create(layer) for source, layer in asked if source == "command line"]
    refuse_idle(config, {k for k in keys_of(Config) if any(OmegaConf.select(t, k) is not None for t in typed)})
    return config, name


def _check_world_size(args: argparse.Namespace) -> None:
    n = args.world_size
    if not args.dry_run:
        raise UserError(
            f"--world-size {n} says what --dry-run plans for; a run has the ranks that torchrun starts: "
            f"torchrun --nproc-per-node={n} train.py ..., or add --dry-run"
        )
    if n < 1:
        raise UserError(f"--world-size {n} must be at least 1")


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, aliases resolved."""
    if not Path(path).is_file():
        raise UserError(
            f"--config-file {path}: no such file; every run writes its own as config.yaml in the run folder"
        )
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # the YAML reader has many exceptions, all of which mean this
        raise UserError(f"--config-file {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(node):
        raise UserError(f"--config-file {path}: expected sections with keys, e.g. 'train: {{train_iters: 100}}'")
    flat = []
    for section, values in OmegaConf.to_container(node).items():
        if isinstance(values, dict):
            flat += [(ALIASES.get(f"{section}.{k}", f"{section}.{k}"), v) for k, v in values.items()]
        else:
            flat.append((ALIASES.get(section, section), values))
    return _nest(flat)


def _split(overrides: list[str]) -> list[tuple[str, Any]]:
    pairs = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"{item!r}: settings are written section.key=value{nearest(item, keys_of(Config))}")
        try:
            value = OmegaConf.from_dotlist([f"v={text}"])["v"] if text else ""
        except Exception:  # not YAML: then it is plain text
            value = text
        if OmegaConf.is_dict(value) and not text.startswith("{"):  # "def f(x):" is text too
            value = text
        pairs.append((ALIASES.get(key, key), value))
    return pairs


def _nest(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        *sections, leaf = str(key).split(".")
        node = out
        for s in sections:
            node = node.setdefault(s, {})
            if not isinstance(node, dict):
                raise UserError(f"{key}: {s} was given a value of its own before")
        node[leaf] = value
    return out


def _one_unit_each(base: Any, layer: Any, source: str) -> Any:
    """A length given in one unit replaces one that an earlier layer gave in another; two units in one layer clash."""
    for stem in LENGTHS:
        here = [f"{stem}_{u}" for u in UNITS if OmegaConf.select(layer, f"{stem}_{u}") is not None]
        if len(here) > 1:
            raise UserError(f"{source}: {' and '.join(here)} say the same thing in two units; give one")
        if here:
            for u in UNITS:
                other = f"{stem}_{u}"
                if other != here[0] and OmegaConf.select(base, other) is not None:
                    OmegaConf.update(base, other, None)
    return layer


def validate(config: Config) -> None:
    """Raise UserError on anything wrong that can be known without the machine; the mesh checks the rest."""
    for key in keys_of(Config):
        value = operator.attrgetter(key)(config)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} is not a finite number")
    config.model.validate()
    config.peft.validate()
    _one_of("mode", config.mode, list(DEFAULT))
    t, s, d = config.train, config.scheduler, config.dataset
    if t.train_iters is None and t.train_samples is None and t.train_tokens is None:
        raise UserError("train: how long? Set train.train_iters, train.train_samples or train.train_tokens")
    for section, key in [
        ("train", "global_batch_size"),
        ("train", "loss_chunk_tokens"),
        ("logger", "log_interval"),
    ]:
        _at_least(config, section, key, 1)
    for section, key in [
        ("validation", "eval_interval"),
        ("validation", "eval_iters"),
        ("validation", "sample_tokens"),
        ("validation", "answer_samples"),
        ("dataset", "num_workers"),
        ("dataset", "seed"),
        ("rng", "seed"),
        *(("optimizer", k) for k in ("lr", "min_lr", "weight_decay", "clip_grad")),
    ]:
        _at_least(config, section, key, 0)
    for stem, least in (("lr_warmup", 0), ("lr_decay", 1), ("lr_wsd_decay", 0)):
        for key in (f"{stem}_{unit}" for unit in UNITS[:3]):
            if getattr(s, key) is not None:
                _at_least(config, "scheduler", key, least)
    _at_least(config, "scheduler", "lr_warmup_init", 0)
    _at_least(config, "checkpoint", "save_interval", -1)
    for key in ("tp", "ep", "pp", "cp", "virtual_pp"):
        _at_least(config, "parallel", key, 1)
    if t.micro_batch_size is not None:
        _at_least(config, "train", "micro_batch_size", 1)
    k = config.checkpoint.most_recent_k
    if k == 0 or k < -1:
        raise UserError(f"checkpoint.most_recent_k={k} would keep nothing; use 1 or more, or -1 to keep all")
    c = config.checkpoint
    if c.save_retain_interval is not None:
        _at_least(config, "checkpoint", "save_retain_interval", 1)
    if c.resume_from_last_good and c.load is None:
        raise UserError("--resume-from-last-good says what to do if checkpoint.load is damaged, which is not given")
    both = c.load is not None and c.pretrained_checkpoint is not None
    # Adapters are resumed, and lie beside weights that come from elsewhere; and a job that loads where it saves begins
    # with the weights and goes on from the checkpoint.
    if both and not config.peft.adapts and c.load != c.save:
        raise UserError(
            f"checkpoint.load={config.checkpoint.load} resumes a run and checkpoint.pretrained_checkpoint="
            f"{config.checkpoint.pretrained_checkpoint} starts a new one; give one of them"
        )
    _check_data(config)
    if d.seq_length < 2:
        raise UserError(
            f"dataset.seq_length={d.seq_length}: a sequence needs at least 2 tokens (one to see, one to predict)"
        )
    if config.iterations < 1:
        raise UserError(
            f"train: the length given is less than a step of {t.global_batch_size} x {d.seq_length} tokens; "
            "train longer or lower train.global_batch_size"
        )
    _one_of("train.precision", t.precision, ["auto", "bf16", "fp32"])
    _one_of("train.device", t.device, ["auto", "cpu", "cuda"])
    _one_of("scheduler.lr_decay_style", s.lr_decay_style, ["WSD", "cosine", "linear", "constant"])
    _one_of("scheduler.lr_wsd_decay_style", s.lr_wsd_decay_style, ["linear", "cosine", "exponential", "minus_sqrt"])
    for key, backend in vars(config.model.kernels).items():
        _one_of(f"model.kernels.{key}", backend, ["auto", "triton", "torch"])
    if s.lr_decay_style == "WSD" and all(getattr(s, f"lr_wsd_decay_{u}") is None for u in UNITS):
        raise UserError(
            "scheduler.lr_decay_style=WSD needs the length of its decay, e.g. scheduler.lr_wsd_decay_fraction=0.2"
        )
    for key in ("lr_warmup_fraction", "lr_wsd_decay_fraction"):
        if (fraction := getattr(s, key)) is not None and not 0 <= fraction <= 1:
            raise UserError(f"scheduler.{key}={fraction} must lie in [0, 1]")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise UserError(f"optimizer.min_lr={config.optimizer.min_lr} is above optimizer.lr={config.optimizer.lr}")
    for key in ("adam_beta1", "adam_beta2"):
        if not 0 <= (beta := getattr(config.optimizer, key)) < 1:
            raise UserError(f"optimizer.{key}={beta} must lie in [0, 1)")
    if config.optimizer.adam_eps <= 0:
        raise UserError(f"optimizer.adam_eps={config.optimizer.adam_eps} must be positive")
    for key, forms in (
        ("moments", ["fp32", "bf16", "8bit"]),
        ("masters", ["fp32", "none"]),
        ("gradients", ["fp32", "bf16"]),
    ):
        _one_of(f"optimizer.{key}", getattr(config.optimizer, key), forms)
    kinds = [*KINDS.values(), "conv"]
    if isinstance(t.recompute, str):
        _one_of("train.recompute", t.recompute, ["none", "full", "auto", *kinds])
    else:
        for kind in t.recompute or []:
            _one_of("train.recompute", kind, kinds)
    if config.recompute >= {"mamba", "conv"}:
        raise UserError("train.recompute names mamba and conv, which is a part of it; drop conv")
    if (config.logger.wandb_entity or config.logger.wandb_exp_name) and not config.logger.wandb_project:
        raise UserError("logger.wandb_entity and logger.wandb_exp_name need logger.wandb_project=NAME")


def _check_data(config: Config) -> None:
    """What kind of data is meant, and that the mode has a use for it."""
    d, own = config.dataset, ["embedded", "mock"]
    if config.mode == "pretrain":
        _one_of("dataset.name", d.name, own)
    elif d.path is not None and d.name in own:
        raise UserError(f"dataset.path={d.path} and dataset.name={d.name} are two kinds of data; give one of them")
    for key, known in [
        ("loss_mode", ["assistant", "last_turn", "full"]),
        ("truncation", ["left", "right"]),
        ("on_error", ["raise", "skip"]),
    ]:
        _one_of(f"dataset.{key}", getattr(d, key), known)
    if not 0 <= d.val_proportion < 1:
        raise UserError(f"dataset.val_proportion={d.val_proportion} must be at least 0 and below 1")


def _at_least(config: Config, section: str, key: str, least: int) -> None:
    if (value := getattr(getattr(config, section), key)) < least:
        raise UserError(f"{section}.{key}={value} must be at least {least}")


def _one_of(name: str, value: Any, known: list[str]) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r} is not known{nearest(str(value), known)} Choose from {', '.join(known)}")


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def difference(config: Config, preset: str) -> list[str]:
    """`section.key=value` for every setting that differs from the preset in this mode."""
    base = OmegaConf.structured(Config)
    for layer in [*layers(preset, config.mode, config.peft.adapts), {"mode": config.mode}]:
        base = merge(base, _one_unit_each(base, OmegaConf.create(layer), preset), preset)
    mine = OmegaConf.structured(config)
    pairs = ((k, OmegaConf.select(base, k), OmegaConf.select(mine, k)) for k in keys_of(Config))
    replaced = {f"{stem}_{unit}" for stem in LENGTHS for unit in UNITS}  # a length that is None is said in another unit
    return [f"{k}={new}" for k, old, new in pairs if old != new and not (new is None and k in replaced)]

"""The learning rate as a pure function of the samples seen, in Megatron's convention: step 0 runs at lr_warmup_init."""

from __future__ import annotations

import math
from collections.abc import Callable

from nano3.config import Config, UserError


def in_samples(config: Config, stem: str, default: int, whole: int) -> int:
    """The length scheduler.STEM_{iters,samples,tokens,fraction} in samples; `default` if none is set.

    whole: the samples that a fraction is a fraction of.
    """
    s = config.scheduler
    if (n := getattr(s, f"{stem}_iters")) is not None:
        return n * config.train.global_batch_size
    if (n := getattr(s, f"{stem}_samples")) is not None:
        return n
    if (n := getattr(s, f"{stem}_tokens")) is not None:
        return n // config.dataset.seq_length
    fraction = getattr(s, f"{stem}_fraction", None)
    return default if fraction is None else round(fraction * whole)


DECAY: dict[str, Callable[[float], float]] = {  # r from 0 to 1 -> share of (lr - min_lr) that is left
    "linear": lambda r: 1 - r,
    "cosine": lambda r: 0.5 * (1 + math.cos(math.pi * r)),
    "exponential": lambda r: 2 * 0.5**r - 1,
    "minus_sqrt": lambda r: 1 - math.sqrt(r),
}


def learning_rate(config: Config) -> Callable[[int], float]:
    """samples seen before a step -> its learning rate.

    Linear warm-up from lr_warmup_init to lr; then `constant`; or `linear` and `cosine` from the end of the warm-up to
    lr_decay (default: the end of the run); or WSD, constant until the last lr_wsd_decay and then down by
    lr_wsd_decay_style.  After lr_decay it stays at min_lr.  lr_warmup_fraction is a fraction of lr_decay, as in
    Megatron; lr_wsd_decay_fraction, which Megatron has not, of the run.  Raises UserError if the lengths do not fit
    into each other.
    """
    o, s = config.optimizer, config.scheduler
    run = config.iterations * config.train.global_batch_size
    end = in_samples(config, "lr_decay", run, run)
    warmup = in_samples(config, "lr_warmup", 0, end)
    wsd = in_samples(config, "lr_wsd_decay", 0, run)
    constant = s.lr_decay_style == "constant"
    if not constant and warmup >= end:
        raise UserError(
            f"scheduler: the warm-up ({warmup:,} samples) is not shorter than the schedule ({end:,} samples); "
            "shorten scheduler.lr_warmup_iters or train longer"
        )
    if s.lr_decay_style == "WSD" and warmup + wsd > end:
        raise UserError(
            f"scheduler: the warm-up ({warmup:,}) and the WSD decay ({wsd:,}) exceed the schedule ({end:,} samples); "
            "shorten scheduler.lr_warmup_iters or scheduler.lr_wsd_decay_fraction"
        )

    def lr(seen: int) -> float:
        if seen < warmup:
            return s.lr_warmup_init + (o.lr - s.lr_warmup_init) * seen / warmup
        if constant:
            return o.lr
        if seen >= end:
            return o.min_lr
        if s.lr_decay_style == "WSD":
            start, shape = end - wsd, DECAY[s.lr_wsd_decay_style]
        else:
            start, shape = warmup, DECAY[s.lr_decay_style]
        left = 1.0 if seen <= start else shape((seen - start) / (end - start))
        return o.min_lr + (o.lr - o.min_lr) * left

    return lr

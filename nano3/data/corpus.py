"""Which data the settings mean; and data for the first minute: text that every machine has, and ids that need none.

A data set answers one question: what is row `index` of a split?  The answer depends on (seed, index) alone, so a batch
is the same on any number of ranks, and a run resumes anywhere by counting.
"""

from __future__ import annotations

import sysconfig
from dataclasses import fields
from pathlib import Path

import numpy as np

from nano3.config import Config, UserError
from nano3.data.blend import load_blend
from nano3.data.packing import WINDOW, Packed, PackedFile, Rows, packed_files
from nano3.data.row import Dataset, Windows
from nano3.data.supervised import SupervisedOptions, load_supervised
from nano3.data.tiktoken_vocab import TiktokenOptions
from nano3.data.tokenizer import Tokenizer, load_tokenizer, usable

VALID_EVERY = 20  # of the embedded files, in their fixed order, every 20th is validation
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class EmbeddedText(Windows):
    """The source text of Python's own standard library, as installed: about 14 MB of Python.

    Files in the order of their names, each ended by eod and every VALID_EVERY-th held out; tests are left out.
    Training windows of S + 1 tokens are shuffled anew each epoch; validation windows once, with a seed that no
    setting changes, so that every run is measured on the same text.
    """

    def __init__(self, tokenizer: Tokenizer, seq_length: int, seed: int, isolated: bool = True) -> None:
        self.S, self.seed, self.eod, self.isolated = seq_length, seed, tokenizer.eod, isolated
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
        parts: dict[str, list[np.ndarray]] = {"train": [], "valid": []}
        for i, path in enumerate(files):
            ids = tokenizer.encode(path.read_text(encoding="utf-8", errors="ignore").replace("\0", ""))
            parts["valid" if i % VALID_EVERY == VALID_EVERY // 2 else "train"].append(
                np.array([*ids, tokenizer.eod], dtype=np.int32)
            )
        self.tokens = {k: np.concatenate(v) if v else np.zeros(0, np.int32) for k, v in parts.items()}
        if (short := min(len(t) for t in self.tokens.values())) <= 2 * seq_length:
            raise UserError(
                f"dataset.name=embedded: the standard library ({root}) has {len(files)} source files, too few "
                f"for windows of dataset.seq_length={seq_length} (a split has {short} tokens); try dataset=mock"
            )
        self._order: tuple[int, np.ndarray, int] | None = None

    def sample(self, split: str, index: int) -> np.ndarray:
        tokens = self.tokens[split]
        windows = (len(tokens) - 1) // self.S - 1  # one less: the epoch's offset shifts them by up to S
        if split == "valid":
            start = int(np.random.default_rng(0).permutation(windows)[index % windows]) * self.S
        else:
            epoch, place = divmod(index, windows)
            if self._order is None or self._order[0] != epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._order = (epoch, rng.permutation(windows), int(rng.integers(self.S)))
            start = int(self._order[1][place]) * self.S + self._order[2]
        return tokens[start : start + self.S + 1].astype(np.int64)

    def window(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self.sample(split, index)
        return ids, np.flatnonzero(ids[:-1] == self.eod) + 1


class MockTokens(Windows):
    """Arithmetic progressions modulo the vocabulary, start and stride drawn per sample: learnable, without a file.

    The stride is one of 16, so a model that has seen two tokens can know all that follow.
    """

    def __init__(self, vocab_size: int, seq_length: int, seed: int) -> None:
        self.V, self.S, self.seed = vocab_size, seq_length, seed

    def sample(self, split: str, index: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, index] if split == "train" else [0, index, 1])
        start, stride = int(rng.integers(self.V)), int(rng.integers(1, 17))
        return (start + stride * np.arange(self.S + 1, dtype=np.int64)) % self.V

    def window(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.sample(split, index), np.zeros(1, np.int64)


def is_supervised(config: Config) -> bool:
    """Do the settings mean prompts with answers, or conversations?"""
    return config.dataset.kind in ("records", "packed")


def load_dataset(config: Config, tokenizer: Tokenizer) -> Dataset:
    """A blend of indexed files if the settings name one, else what dataset.path or dataset.name says."""
    d, valid = config.dataset, config.validation.eval_iters > 0
    if d.kind == "blend":
        if d.path is not None:
            raise UserError(f"dataset.path={d.path} and a blend are two kinds of data; give one of them")
        seed = config.rng.seed if d.random_seed is None else d.random_seed
        return load_blend(d, seed, config.model.vocab_size, valid)
    if d.kind == "embedded":
        return EmbeddedText(tokenizer, d.seq_length, config.rng.seed, d.reset_attention_mask)
    if d.kind == "mock":
        return MockTokens(config.model.vocab_size, d.seq_length, config.rng.seed)
    if not d.reset_attention_mask:
        raise UserError(
            "dataset.reset_attention_mask=false is for running text; supervised samples never see each other: drop it"
        )
    if d.kind == "packed":
        splits, about = read_packed(config, valid), []
    else:
        splits, about = pack_samples(config, tokenizer)
    return Rows(splits, d.seq_length, d.seed, tokenizer.eod, about)


def pack_samples(config: Config, tokenizer: Tokenizer) -> tuple[dict[str, Packed], list[str]]:
    """The rows of each split, with several samples or one in each, and lines about them for the log."""
    d, about = config.dataset, []
    options = SupervisedOptions(**{f.name: getattr(d, f.name) for f in fields(SupervisedOptions)})
    samples = load_supervised(tokenizer, d.seq_length, options, about.append, config.validation.eval_iters > 0)
    window = WINDOW if d.packed_sequence else 0
    return {split: Packed(s, d.seq_length, window, d.seed) for split, s in samples.items()}, about


def read_packed(config: Config, valid: bool) -> dict[str, PackedFile]:
    """The rows in the folder dataset.packed_path, which `python -m nano3.data.pack` wrote."""
    d = config.dataset
    if d.path is not None:
        raise UserError(f"dataset.path={d.path} and dataset.packed_path={d.packed_path}: give one of them")
    files = packed_files(Path(d.packed_path))
    wanted = ("train", "valid") if valid else ("train",)
    return {split: PackedFile(files[split], d.seq_length, config.model.vocab_size) for split in wanted}


def tokenizer_name(config: Config) -> str:
    """What `tokenizer.tokenizer_model=auto` means for this data, where no checkpoint says it."""
    if config.tokenizer.tokenizer_model != "auto":
        return config.tokenizer.tokenizer_model
    if is_supervised(config):
        if config.model.vocab_size == 256:
            return "bytes"
        raise UserError(
            "tokenizer.tokenizer_model: supervised data is text, and the checkpoint brings no tokenizer; give the "
            "model's, e.g. --tokenizer-model FOLDER"
        )
    return "bytes" if config.dataset.kind == "embedded" else "none"


def open_tokenizer(config: Config, name: str | None = None) -> Tokenizer:
    """The tokenizer of the settings, or the one called `name`, with as many of the settings as are for such a one."""
    t = config.tokenizer
    options = TiktokenOptions(
        pattern=t.pattern,
        special_tokens=None if t.special_tokens is None else tuple(t.special_tokens),
        num_special_tokens=t.num_special_tokens,
        vocab_size=t.vocab_size,
    )
    if name is not None:
        return load_tokenizer(name, config.model.vocab_size, usable(name, options))
    return load_tokenizer(tokenizer_name(config), config.model.vocab_size, options)

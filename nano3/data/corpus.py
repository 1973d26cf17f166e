"""Data for the first minute: text that every machine has, and token ids that need none.

A data set answers one question: what is sample `index` of a split?  The answer depends on (seed, index) alone, so a
batch is the same on any number of ranks, and a run resumes anywhere by counting.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Protocol

import numpy as np

from nano3.config import Config, UserError
from nano3.data.blend import has_blend, load_blend
from nano3.data.tokenizer import Tokenizer

VALID_EVERY = 20  # of the embedded files, in their fixed order, every 20th is validation
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Dataset(Protocol):
    def sample(self, split: str, index: int) -> np.ndarray:
        """`seq_length + 1` ids (int64) of split `train` or `valid`; every index from 0 on is defined."""
        ...


class EmbeddedText:
    """The source text of Python's own standard library, as installed: about 14 MB of Python.

    Files in the order of their names, each ended by eod and every VALID_EVERY-th held out; tests are left out.
    Training windows of S + 1 tokens are shuffled anew each epoch; validation windows once, with a seed that no
    setting changes, so that every run is measured on the same text.
    """

    def __init__(self, tokenizer: Tokenizer, seq_length: int, seed: int) -> None:
        self.S, self.seed = seq_length, seed
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


class MockTokens:
    """Arithmetic progressions modulo the vocabulary, start and stride drawn per sample: learnable, without a file.

    The stride is one of 16, so a model that has seen two tokens can know all that follow.
    """

    def __init__(self, vocab_size: int, seq_length: int, seed: int) -> None:
        self.V, self.S, self.seed = vocab_size, seq_length, seed

    def sample(self, split: str, index: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, index] if split == "train" else [0, index, 1])
        start, stride = int(rng.integers(self.V)), int(rng.integers(1, 17))
        return (start + stride * np.arange(self.S + 1, dtype=np.int64)) % self.V


def load_dataset(config: Config, tokenizer: Tokenizer) -> Dataset:
    """A blend of indexed files if the settings name one, else what dataset.name says."""
    if has_blend(config.dataset):
        seed = config.rng.seed if config.dataset.random_seed is None else config.dataset.random_seed
        return load_blend(config.dataset, seed, config.model.vocab_size, valid=config.validation.eval_iters > 0)
    if config.dataset.name == "embedded":
        return EmbeddedText(tokenizer, config.dataset.seq_length, config.rng.seed)
    return MockTokens(config.model.vocab_size, config.dataset.seq_length, config.rng.seed)


def tokenizer_name(config: Config) -> str:
    """What `tokenizer.tokenizer_model=auto` means for this data."""
    if config.tokenizer.tokenizer_model != "auto":
        return config.tokenizer.tokenizer_model
    return "bytes" if config.dataset.name == "embedded" and not has_blend(config.dataset) else "none"

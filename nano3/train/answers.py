"""Exact match and F1 of greedy answers, counted as SQuAD's own evaluation does (arXiv:1606.05250, section 6.1)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nano3.config import Config
from nano3.data.corpus import is_supervised
from nano3.data.row import IGNORE, Dataset
from nano3.data.tokenizer import Tokenizer
from nano3.model.generate import generate
from nano3.model.model import Nano3

LONGER = 16  # tokens that a generated answer may exceed the right one by; more would only cost time


class Question(NamedTuple):
    """Ids of a prompt, and of the answer that was to be learnt, its end included."""

    prompt: list[int]
    answer: list[int]


class Score(NamedTuple):
    exact: float  # share of questions whose answer is the right one
    f1: float  # mean over the questions of the harmonic mean of precision and recall, in words
    questions: int


def is_squad(config: Config) -> bool:
    """Do the settings mean SQuAD, or a file in its form?  What rows packed in advance were made of is not known."""
    d = config.dataset
    if d.packed_path is not None:
        return False
    own = d.path is None or Path(d.path).suffix == ".json" or any(Path(d.path).glob("train-v*.json"))
    return is_supervised(config) and d.name == "squad" and own


def questions(data: Dataset, split: str = "valid") -> Iterator[Question]:
    """The questions of a split in its order, once, packed or not."""
    for i in range(data.count(split) or 0):
        row = data.row(split, i)
        learnt = np.append(row.labels != IGNORE, False)
        begins = np.flatnonzero(learnt[:-1] & ~np.insert(learnt[:-2], 0, False))
        for a in begins:
            b = a + int(np.argmin(learnt[a:]))
            document = 0 if row.seq_idx is None else int(np.argmax(row.seq_idx == row.seq_idx[a]))
            yield Question(row.tokens[document : a + 1].tolist(), row.labels[a:b].tolist())


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(answer: str, truth: str) -> float:
    """Of the words in common: 2 P R / (P + R).  Two answers without a word are equal."""
    ours, theirs = words(answer), words(truth)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def score(model: Nano3, data: Dataset, tokenizer: Tokenizer, count: int) -> Score:
    """Answer the first `count` questions of the validation split greedily.  Every rank calls this and gets the same."""
    exact = total = 0.0
    asked = [q for q, _ in zip(questions(data), range(count), strict=False)]
    for q in asked:
        ids = list(generate(model, q.prompt, len(q.answer) + LONGER, stop_ids=tokenizer.stop_ids))
        truth = tokenizer.decode([i for i in q.answer if i not in tokenizer.stop_ids])
        answer = tokenizer.decode(ids)
        exact += words(answer) == words(truth)
        total += f1(answer, truth)
    n = max(1, len(asked))
    return Score(exact / n, total / n, len(asked))

"""Exact match and F1: SQuAD's counting, questions found in rows, packed or not, and a model that knows the answers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nano3.cli import parser, resolve
from nano3.data.row import IGNORE, PADDING, Row
from nano3.data.tokenizer import ByteTokenizer
from nano3.train import answers
from nano3.train.answers import f1, is_squad, questions, score, words


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        (" The Denver Broncos!", "denver broncos", 1.0),
        ("Denver", "the Denver Broncos", 2 / 3),
        ("in in Denver", "in Denver", 0.8),  # a word counts as often as it is in both
        ("Rome", "Denver", 0.0),
        ("the", "a.", 1.0),
        ("", "Denver", 0.0),
    ],
)
def test_f1_counts_words_in_common(answer: str, truth: str, expected: float) -> None:
    assert f1(answer, truth) == pytest.approx(expected)
    assert (words(answer) == words(truth)) == (expected == 1.0)


class Data:
    """Two rows: one question with padding, and two questions packed; tokens are bytes."""

    about = ()
    texts = ((b"Q1? A:", b" red\0"), (b"Which? A:", b" a blue hat\0"), (b"Q3? A:", b" no\0"))

    def count(self, split: str) -> int:
        return 2

    def row(self, split: str, index: int) -> Row:
        ids, labels, seq = [], [], []
        for n, (prompt, answer) in enumerate(self.texts[:1] if index == 0 else self.texts[1:]):
            whole = list(prompt + answer)
            ids += whole[:-1]
            labels += [IGNORE] * (len(prompt) - 1) + list(answer)
            seq += [n] * (len(whole) - 1)
        pad = 48 - len(ids)
        arrays = (ids + [0] * pad, labels + [IGNORE] * pad, seq + [PADDING] * pad)
        return Row(*(np.array(a, dtype=np.int64) for a in arrays))


def test_questions_are_found_in_rows() -> None:
    found = [(bytes(q.prompt), bytes(q.answer)) for q in questions(Data())]
    assert found == list(Data.texts)
    alone = Data()
    alone.count = lambda split: 1
    alone.row = lambda split, index: Data().row(split, 0)._replace(seq_idx=None)
    assert [bytes(q.prompt) for q in questions(alone)] == [Data.texts[0][0]]


def test_which_settings_mean_squad(tmp_path: Path) -> None:
    def squad(*given: str) -> bool:
        return is_squad(resolve(parser().parse_args(["--mode", "finetune", "--preset", "tiny", *given]))[0])

    (tmp_path / "train-v1.1.json").touch()
    assert all(squad(*given) for given in ([], ["dataset.path=x.json"], [f"dataset.path={tmp_path}"]))
    others = (
        "dataset.path=x.jsonl",
        "dataset=tulu",
        "dataset.blend=x",
        "dataset=mock",
        f"dataset.packed_path={tmp_path}",
    )
    assert not any(squad(given) for given in others)


def test_the_score_of_known_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {b"Q1? A:": b" red", b"Which? A:": b" blue hats", b"Q3? A:": b" yes"}
    monkeypatch.setattr(answers, "generate", lambda model, prompt, most, stop_ids: iter(said[bytes(prompt)]))
    model = torch.nn.Module()
    assert score(model, Data(), ByteTokenizer(), 10) == (pytest.approx(1 / 3), pytest.approx((1 + 2 / 4) / 3), 3)
    assert score(model, Data(), ByteTokenizer(), 1) == (1.0, 1.0, 1)

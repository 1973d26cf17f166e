"""Data: batches depend on (seed, step) alone; the splits do not meet; tokenizers come back to the text."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from nano3.config import UserError
from nano3.data.corpus import EmbeddedText, MockTokens, load_dataset
from nano3.data.loader import Place, micro_batches, stream
from nano3.data.tokenizer import ByteTokenizer, load_tokenizer
from tests.conftest import ROOT
from tests.train.small import small


@pytest.fixture(scope="module")
def text() -> EmbeddedText:
    return EmbeddedText(ByteTokenizer(), 128, seed=1)


def test_embedded_text_is_python_and_split(text: EmbeddedText) -> None:
    assert len(text.tokens["train"]) > 2_000_000
    assert 0.02 < len(text.tokens["valid"]) / len(text.tokens["train"]) < 0.15
    raw = bytes(text.tokens["train"].astype(np.uint8))
    assert b"import os" in raw
    files = [set(bytes(t.astype(np.uint8)).split(b"\0")) for t in text.tokens.values()]
    assert {f for f in files[0] & files[1] if len(f) > 200} == set()  # no file stands on both sides


def test_every_window_once_per_epoch_then_in_another_order(text: EmbeddedText) -> None:
    windows = (len(text.tokens["train"]) - 1) // 128 - 1
    fresh = EmbeddedText(ByteTokenizer(), 128, seed=1)
    starts = []
    for epoch in range(2):
        fresh.sample("train", epoch * windows)
        starts.append(fresh._order[1])
        assert sorted(starts[-1]) == list(range(windows))
    assert not np.array_equal(*starts)
    assert np.array_equal(
        text.sample("train", windows + 5), fresh.sample("train", windows + 5)
    )  # in any order of asking
    other = EmbeddedText(ByteTokenizer(), 128, seed=2)
    assert not np.array_equal(other.sample("train", 0), text.sample("train", 0))
    assert np.array_equal(other.sample("valid", 3), text.sample("valid", 3))  # every run is measured on the same text


@pytest.mark.parametrize("name", ["embedded", "mock"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_global_batch_does_not_depend_on_ranks_or_micro_batches(name: str, ranks: int) -> None:
    config = small(f"dataset={name}")
    data = load_dataset(config, ByteTokenizer())
    whole = [torch.cat(t) for t in zip(*(b[:2] for b in micro_batches(data, "train", 24, Place(8, 8))), strict=True)]
    assert torch.equal(whole[0][:, 1:], whole[1][:, :-1])
    for micro in (1, 2):
        parts = [
            torch.cat(
                [b[side] for r in range(ranks) for b in micro_batches(data, "train", 24, Place(8, micro, r, ranks))]
            )
            for side in (0, 1)
        ]
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_mock_is_a_pattern_of_any_length() -> None:
    for length in (2, 5000):
        data = MockTokens(100, length, seed=3)
        row = data.sample("train", 7)
        assert row.shape == (length + 1,)
        assert set(np.diff(row) % 100) == {(row[1] - row[0]) % 100}
        assert np.array_equal(row, MockTokens(100, length, seed=3).sample("train", 7))
        assert not np.array_equal(row, data.sample("valid", 7))


def test_windows_longer_than_the_text_are_refused() -> None:
    with pytest.raises(UserError, match="dataset=mock"):
        EmbeddedText(ByteTokenizer(), 1 << 30, seed=0)


def test_byte_tokenizer_round_trip() -> None:
    t = load_tokenizer("bytes", 256)
    for sample in ("", "def f(x):\n\treturn x", "naïve 日本語 🙂"):
        assert t.decode(t.encode(sample)) == sample
    with pytest.raises(UserError, match=r"model\.vocab_size=100"):
        load_tokenizer("bytes", 100)


def test_hugging_face_tokenizer_from_a_file_and_a_folder(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "def": 1, "x": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    t = load_tokenizer(str(tmp_path / "tokenizer.json"), 256)
    assert (t.encode("def x y"), t.vocab_size) == ([1, 2, 0], 3)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert load_tokenizer(str(tmp_path), 256).encode("x def") == [2, 1]


@pytest.mark.parametrize("content", [None, "", "{}", "not json"])
def test_a_path_that_is_no_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.tokenizer_model=.*tokenizer\.json"):
        load_tokenizer(str(path), 256)


def test_bare_ids() -> None:
    t = load_tokenizer("none", 50)
    assert t.encode("3 4") == [3, 4]
    for bad in ("x", "3 50", "-1"):
        with pytest.raises(UserError, match="prompt"):
            t.encode(bad)


class Spoilt(MockTokens):
    """Mock data of which sample 9 cannot be read."""

    error: Exception = UserError("x.bin: document 9 has the id 300")

    def sample(self, split: str, index: int) -> np.ndarray:
        if index == 9:
            raise self.error
        return super().sample(split, index)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_the_data_is_one_message_whoever_finds_it(workers: int) -> None:
    data = Spoilt(100, 16, seed=0)
    rows = stream(data, "train", 0, Place(4, 2), workers)
    assert [len(next(rows)) for _ in range(2)] == [2, 2]  # nothing is said before its turn
    with pytest.raises(UserError) as caught:
        next(rows)
    assert str(caught.value) == "x.bin: document 9 has the id 300"


def test_a_mistake_of_ours_in_a_worker_keeps_its_traceback() -> None:
    data = Spoilt(100, 16, seed=0)
    data.error = ZeroDivisionError("by zero")
    with pytest.raises(ZeroDivisionError, match="Traceback"):
        next(stream(data, "train", 8, Place(4, 2), workers=1))


FAILS = """
from nano3.data.corpus import MockTokens
from nano3.data.loader import Place, stream
rows = stream(MockTokens(100, 16, 0), "train", 0, Place(4, 2), workers=2)
def step():
    batch = next(rows)
    raise RuntimeError("out of memory")
step()
"""


def test_a_run_that_fails_does_not_wait_for_its_workers() -> None:
    """They ignore SIGTERM, which is how Python ends them, and the traceback keeps the stream that would."""
    done = subprocess.run([sys.executable, "-c", FAILS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: out of memory"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_the_same_wherever_it_begins_and_whoever_makes_it(workers: int) -> None:
    data = load_dataset(small("dataset=mock"), ByteTokenizer())
    place = Place(8, 2, 1, 2)
    whole = stream(data, "train", 0, place)
    late = stream(data, "train", 16, place, workers)
    for _ in range(2):
        next(whole)
    for _ in range(3):
        expected, got = next(whole), next(late)
        assert len(got) == 2
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(expected, got, strict=True))
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(expected, got, strict=True))

"""Packing: every sample once, no row overfull, few rows; a packed row with its padding trains like its documents."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE, linear_cross_entropy
from nano3.config import ModelConfig, UserError
from nano3.data import supervised
from nano3.data.packing import PADDING, Packed, PackedFile, Row, Rows, efficiency, pack, row_of, write_packed
from nano3.data.supervised import Reader, Sample, Samples, SupervisedOptions, Tally, collect
from nano3.data.tokenizer import load_tokenizer
from nano3.model.model import Nano3
from tests.data.chat_cases import CASES, NEMOTRON, trained_tokenizer
from tests.oracles import GOLDEN, fill_by_hash, our_model, relative


def random_samples(count: int, longest: int, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(1, 500, rng.integers(2, longest + 2))
        learn = rng.random(len(ids)) < 0.5
        learn[-1] = True
        made.append(supervised.shifted(ids, learn))
    return collect(made)


def naive(lengths: list[int], size: int, window: int) -> list[list[int]]:
    """First-fit decreasing as one says it."""
    out = []
    for start in range(0, len(lengths), window):
        rows: list[list[int]] = []
        for i in sorted(range(start, min(start + window, len(lengths))), key=lambda i: (-lengths[i], i)):
            for row in rows:
                if sum(lengths[j] for j in row) + lengths[i] <= size:
                    row.append(i)
                    break
            else:
                rows.append([i])
        out += [sorted(row) for row in rows]
    return out


@pytest.mark.parametrize("case", range(40))
def test_first_fit_decreasing(case: int) -> None:
    draw = random.Random(case)
    size = draw.randint(1, 60)
    lengths = [draw.randint(1, size) for _ in range(draw.randint(0, 80))]
    window = draw.choice([1, 7, 30, 1000])
    bins = pack(lengths, size, window)
    assert bins == naive(lengths, size, window)
    assert sorted(i for row in bins for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= size for row in bins)


def test_rows_are_nearly_full_and_packing_is_quick() -> None:
    lengths = np.random.default_rng(0).gamma(2.0, 90.0, 100_000).astype(int).clip(8, 2048)
    bins = pack(lengths, 2048)
    assert lengths.sum() / (2048 * len(bins)) > 0.99


def test_lengths_that_do_not_fit_are_refused() -> None:
    for lengths, size, window in (([5], 4, 1), ([0], 4, 1), ([1], 4, 0)):
        with pytest.raises(ValueError, match="must be at least 1" if window == 0 else "do not fit"):
            pack(lengths, size, window)
    with pytest.raises(ValueError, match="do not fit"):
        row_of([random_samples(1, 9)[0]] * 9, 8, 0)


def test_a_row_is_its_documents_and_padding() -> None:
    a, b = Sample(np.array([5, 6]), np.array([IGNORE, 7])), Sample(np.array([8]), np.array([9]))
    row = row_of([a, b], 5, 3)
    assert [t.tolist() for t in row] == [[5, 6, 8, 3, 3], [IGNORE, 7, 9, IGNORE, IGNORE], [0, 0, 1, PADDING, PADDING]]
    assert {t.dtype for t in row} == {np.dtype(np.int64)}
    assert row_of([a, b], 3, 3).seq_idx.tolist() == [0, 0, 1]  # a full row has no padding


@pytest.mark.parametrize("window", [0, 16, 1000])
def test_every_sample_once_an_epoch(window: int) -> None:
    samples = random_samples(60, 20)
    rows = Rows({"train": Packed(samples, 32, window, seed=1), "valid": Packed(samples, 32, window)}, 32, seed=1)
    count = len(rows.splits["train"])
    assert (count == 60) == (window == 0)

    def documents(row: Row) -> list[tuple]:
        places = [np.flatnonzero(row.seq_idx == d) for d in np.unique(row.seq_idx) if d != PADDING]
        return [(*row.tokens[at].tolist(), *row.labels[at].tolist()) for at in places]

    want = sorted((*s.tokens.tolist(), *s.labels.tolist()) for s in samples)
    epochs = [[rows.row("train", e * count + i) for i in range(count)] for e in range(2)]
    for epoch in epochs:
        assert sorted(d for row in epoch for d in documents(row)) == want
    assert any((a.tokens != b.tokens).any() for a, b in zip(*epochs, strict=True))
    again = Rows({"train": Packed(samples, 32, window, seed=1)}, 32, seed=1).row("train", count + 3)  # asked for alone
    assert all((a == b).all() for a, b in zip(again, epochs[1][3], strict=True))
    other = Rows({"train": Packed(samples, 32, window, seed=2)}, 32, seed=2)
    assert any((other.row("train", i).tokens != epochs[0][i].tokens).any() for i in range(len(other.splits["train"])))
    assert all((rows.row("valid", 1).tokens == rows.row("valid", 1 + e * count).tokens).all() for e in range(3))
    real = sum(len(s.tokens) for s in samples)
    assert efficiency(rows.splits["train"], 32) == real / (32 * count)
    assert f"train: {count} rows of 32 tokens, {real / (32 * count):.1%} of them real" in rows.report()


def test_no_samples_are_refused() -> None:
    with pytest.raises(UserError, match="valid has no samples"):
        Rows({"train": Packed(random_samples(2, 4), 8), "valid": Packed(Samples(), 8)}, 8, 0)


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    packed = Packed(random_samples(3000, 20), 24, seed=4)
    path = tmp_path / "sub" / "training_24.parquet"
    write_packed(path, packed, 24, "bytes")
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    back = PackedFile(path, 24, 512)
    assert len(back) == len(packed) > 1024  # more than one batch
    assert back.tokens == packed.tokens
    for ours, theirs in zip(packed, back, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a.tokens, b.tokens)
            assert np.array_equal(a.labels, b.labels)
    wider = Rows({"train": back}, 32, seed=0).row("train", 0)
    assert len(wider.tokens) == 32
    with pytest.raises(UserError, match=r"rows of 24 tokens, more than dataset\.seq_length=16"):
        PackedFile(path, 16, 512)
    largest = max(int(max(s.tokens.max(), s.labels.max())) for row in packed for s in row)
    PackedFile(path, 24, largest + 1)
    with pytest.raises(UserError, match=rf"holds the id {largest} .*outside model\.vocab_size={largest}"):
        PackedFile(path, 24, largest)


def test_files_that_are_not_packed_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    good = tmp_path / "good.parquet"
    write_packed(good, Packed(random_samples(9, 5), 8), 8, "bytes")
    parquet.write_table(pyarrow.table({"tokens": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("text")
    (tmp_path / "short.parquet").write_bytes(good.read_bytes()[:-9])
    for name in ("other", "text", "short", "absent"):
        with pytest.raises(UserError, match=rf"dataset\.packed_path=.*{name}\.parquet is no file of packed rows"):
            PackedFile(tmp_path / f"{name}.parquet", 8, 512)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_packed(tmp_path / "x.parquet", Packed(random_samples(9, 5), 8), 8, "bytes")
    assert list(tmp_path.iterdir()) == []


# Through the model


@pytest.fixture(scope="module")
def real_samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Conversations and questions, read as a user's files would be."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained_tokenizer(NEMOTRON).save_pretrained(folder)
    reader = Reader(load_tokenizer(str(folder), 512), 96, SupervisedOptions())
    row = {"context": "The Broncos won.", "question": "Who won?", "answers": {"text": ["Broncos"]}}
    records = [{"messages": m} for name, (m, tools, _) in CASES.items() if tools is None][:6]
    samples = list(reader.read(((str(i), r) for i, r in enumerate([*records, row, row])), Tally()))
    assert len(samples) == 8
    return samples


def loss_of(model: Nano3, row: Row | Sample) -> tuple[Tensor, Tensor]:
    """The summed loss times 0.1, and the loss of each token."""
    tokens, labels = torch.from_numpy(row.tokens)[None], torch.from_numpy(row.labels)
    seq_idx = torch.from_numpy(row.seq_idx)[None] if isinstance(row, Row) else None
    hidden = model(tokens, seq_idx).hidden.flatten(0, 1)
    weight = torch.full(labels.shape, 0.1, dtype=hidden.dtype)
    return linear_cross_entropy(hidden, model.lm_head.weight, labels, weight, chunk=31)


def gradients(model: Nano3) -> dict[str, Tensor]:
    out = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out


def test_a_packed_row_with_padding_trains_like_its_documents(real_samples: list[Sample]) -> None:
    config = ModelConfig(**{**vars(GOLDEN), "vocab_size": 512})
    model = fill_by_hash(our_model(config, torch.float64)).train()
    size = 250
    packed = Packed(collect(real_samples), size)
    rows = [row_of(documents, size, 0) for documents in packed]
    assert any((row.seq_idx[-5:] == PADDING).all() for row in rows)
    total = []
    for row in rows:
        loss, each = loss_of(model, row)
        loss.backward()
        total.append(each[torch.from_numpy(row.labels) != IGNORE])
    got = gradients(model)
    alone = []
    for documents in packed:
        for d in documents:
            loss, each = loss_of(model, d)
            loss.backward()
            alone.append(each[torch.from_numpy(d.labels) != IGNORE])
    truth = gradients(model)
    assert (torch.cat(total) - torch.cat(alone)).abs().max() <= 1e-10
    assert set(got) == set(truth)
    assert all(relative(got[n], truth[n]) <= 1e-10 for n in truth)


def test_what_the_padding_says_does_not_matter(real_samples: list[Sample]) -> None:
    """Other ids in it: the same losses and gradients, but for last bits: the experts' products have other rows."""
    config = ModelConfig(**{**vars(GOLDEN), "vocab_size": 512})
    model = fill_by_hash(our_model(config, torch.float64)).train()
    found = []
    for pad in (0, 7):
        row = row_of(real_samples[:2], 150, pad)
        loss, each = loss_of(model, row)
        loss.backward()
        found.append((loss, each, gradients(model)))
    real = torch.from_numpy(row.labels) != IGNORE
    assert (found[0][1] - found[1][1])[real].abs().max() <= 1e-12
    assert all(relative(found[0][2][n], found[1][2][n]) <= 1e-12 for n in found[0][2])

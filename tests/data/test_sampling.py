"""Samples are what the docstring says they are, depend on (file, S, seed, index) alone, and survive a broken cache."""

import itertools
import os
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from nano3.config import UserError
from nano3.data import sampling
from nano3.data.indexed import IndexedDataset, IndexedWriter
from nano3.data.sampling import Cache, Samples, check_vocabulary, parse_split, permutation, split_documents

M = 1 << 64


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % M
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % M
    return x ^ (x >> 31)


def shuffled(n: int, *key: int) -> list[int]:
    """`permutation` in integers, from its docstring."""
    h = 0
    for k in key:
        h = mix((h + k + 0x9E3779B97F4A7C15) % M)
    return sorted(range(n), key=lambda i: mix((h + (i + 1) * 0x9E3779B97F4A7C15) % M))


def make(tmp_path: Path, lengths: list[int], dtype: str = "int32") -> IndexedDataset:
    """A file whose ids are 0, 1, 2, … in order, so that an id says where it was."""
    count = itertools.count()
    with IndexedWriter(tmp_path / "data", dtype) as w:
        for n in lengths:
            w.add(list(itertools.islice(count, n)))
    return IndexedDataset(tmp_path / "data")


def samples(data: IndexedDataset, seq_length: int, seed: int = 3, span: tuple | None = None, **more) -> Samples:
    cache = more.get("cache") or Cache(Path(data.prefix).parent / "cache")
    return Samples(data, span or (0, data.documents), seq_length, seed, cache, more.get("vocab_size", 1 << 30))


def test_permutations_do_not_change() -> None:
    """Known to the digit: any change moves the data of every run."""
    assert permutation(10, 1234, 0, 0).tolist() == shuffled(10, 1234, 0, 0) == KNOWN
    for n, key in [(0, (1,)), (1, (1,)), (1000, (7, 2, 1)), (257, (2**63 + 5, 0))]:
        assert permutation(n, *key).tolist() == shuffled(n, *key)
    assert permutation(100, 1, 0, 0).tolist() != permutation(100, 0, 1, 0).tolist()
    assert permutation(5, 1).dtype == np.int32


KNOWN = [3, 2, 6, 0, 9, 1, 7, 5, 8, 4]


@pytest.mark.parametrize(
    ("lengths", "S"),
    [([5, 0, 17, 3, 1, 40, 2, 9, 0], 8), ([7], 3), ([2, 3], 16), ([1] * 50, 5), ([100, 1, 100], 10), ([0, 4, 0], 4)],
)
def test_samples_follow_the_definition(lengths: list[int], S: int, tmp_path: Path) -> None:
    data, N = make(tmp_path, lengths), sum(lengths)
    mine, starts = samples(data, S), np.cumsum([0, *lengths])
    stream, begins = [], []
    for e in range(3 + 3 * S // N + 2):
        for d in shuffled(len(lengths), 3, e, 0):
            if lengths[d]:
                begins.append(len(stream))
            stream += range(starts[d], starts[d + 1])
    for i in range(3 * N // S):
        e = i * S // N
        first, last = -(-e * N // S), -(-(e + 1) * N // S)
        k = first + shuffled(last - first, 3, e, 1)[i - first]
        assert mine.sample(i).tolist() == stream[k * S : k * S + S + 1]
        inside = sorted({0, *(b - k * S for b in begins if k * S <= b < k * S + S)})
        assert mine.boundaries(i).tolist() == inside


def test_an_epoch_trains_on_every_id_once(tmp_path: Path) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(0, 60, 300)]
    data = make(tmp_path, lengths)
    s = samples(data, 64)
    labels = Counter(itertools.chain.from_iterable(s.sample(i)[1:].tolist() for i in range(len(s))))
    assert set(labels.values()) <= {1, 2}  # 2: in the window that reaches into the next epoch
    assert len(labels) >= data.tokens.size - 1  # the stream's very first id follows nothing
    assert sum(v == 2 for v in labels.values()) <= 64


def test_only_the_documents_of_the_split_are_read(tmp_path: Path) -> None:
    data = make(tmp_path, [10] * 50)
    s = samples(data, 16, span=(20, 30))
    seen = np.concatenate([s.sample(i) for i in range(40)])
    assert (seen.min(), seen.max()) == (200, 299)


def test_a_sample_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    data = make(tmp_path, [13] * 100)
    a, b, c = samples(data, 32), samples(data, 32), samples(data, 32, seed=4)
    order = [977, 3, 80, 3, 0, 4000, 41]  # across epochs, backwards and forwards
    assert [b.sample(i).tolist() for i in reversed(order)][::-1] == [a.sample(i).tolist() for i in order]
    assert a.sample(0).tolist() != c.sample(0).tolist()


# --- the cache


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IndexedDataset:
    monkeypatch.setattr(sampling, "SMALL", 0)
    return make(tmp_path, [13] * 100)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*") if p.suffix != ".lock")


def test_indices_are_built_once(cached: IndexedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = samples(cached, 32).sample(5)
    assert len(files(tmp_path / "cache")) == 1
    monkeypatch.setattr(Samples, "_build", None)  # a second build would fail
    assert samples(cached, 32).sample(5).tolist() == first.tolist()
    with pytest.raises(TypeError):
        samples(cached, 33).sample(5)


@pytest.mark.parametrize("change", ["length", "seed", "split", "data", "epoch"])
def test_whatever_matters_is_in_the_key(change: str, cached: IndexedDataset, tmp_path: Path) -> None:
    samples(cached, 32).sample(5)
    if change == "data":
        cached = make(tmp_path, [13] * 99 + [14])
    samples(
        cached,
        33 if change == "length" else 32,
        seed=4 if change == "seed" else 3,
        span=(0, 90) if change == "split" else None,
    ).sample(60 if change == "epoch" else 5)
    assert len(files(tmp_path / "cache")) == 2


def test_a_damaged_index_is_built_again(cached: IndexedDataset, tmp_path: Path) -> None:
    truth = [samples(cached, 32).sample(i).tolist() for i in range(40)]
    for path in (tmp_path / "cache").glob("*.n3i"):
        path.unlink()
    samples(cached, 32).sample(5)
    (path,) = (tmp_path / "cache").glob("*.n3i")
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        raw = bytearray(good)
        raw[at] ^= 0x55
        path.write_bytes(raw if at % 2 else raw[:at])
        assert samples(cached, 32).sample(at % 40).tolist() == truth[at % 40]
        if path.read_bytes() != good:  # padding: not used, so not checked
            assert good[at] in (0, 32) if at % 2 else not any(good[at:])


def test_a_folder_that_cannot_be_written(
    cached: IndexedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling.tempfile, "gettempdir", lambda: str(tmp_path / "system"))
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "x")  # below a file no folder can be made, whoever we are
    assert cache.folder == tmp_path / "system" / f"nano3-index-{os.getuid()}"
    truth = samples(cached, 32).sample(5).tolist()
    assert samples(cached, 32, cache=cache).sample(5).tolist() == truth
    assert len(files(cache.folder)) == 1
    monkeypatch.setattr(sampling.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    nowhere = Cache(tmp_path / "file" / "x")
    assert nowhere.folder is None
    assert samples(cached, 32, cache=nowhere).sample(5).tolist() == truth


def _build(prefix: str, queue) -> None:
    sampling.SMALL = 0
    queue.put(samples(IndexedDataset(prefix), 32).sample(5).tolist())


def test_many_processes_build_the_same_file(cached: IndexedDataset, tmp_path: Path) -> None:
    context = get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_build, args=(cached.prefix, queue)) for _ in range(4)]
    for p in processes:
        p.start()
    got = [queue.get(timeout=60) for _ in processes]
    for p in processes:
        p.join()
    assert got == [samples(cached, 32).sample(5).tolist()] * 4
    assert len(files(tmp_path / "cache")) == 1


# --- splits and vocabularies


def test_splits() -> None:
    assert split_documents(10000, parse_split("9999,8,2")) == {
        "train": (0, 9990),
        "valid": (9990, 9998),
        "test": (9998, 10000),
    }
    assert split_documents(10, parse_split("1,1,1")) == {"train": (0, 3), "valid": (3, 7), "test": (7, 10)}
    assert split_documents(7, parse_split("99, 1")) == {"train": (0, 7), "valid": (7, 7), "test": (7, 7)}
    assert split_documents(8, parse_split("0.5,0.25,0.25"))["valid"] == (4, 6)
    assert split_documents(3, parse_split("100"))["train"] == (0, 3)


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf,1", "1,,2", "1/0", "9 8 2"])
def test_splits_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"dataset\.split="):
        parse_split(text)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    data = make(tmp_path, [100] * 10)
    check_vocabulary(data, 1000)
    with pytest.raises(UserError, match=r"data\.bin: ids 0 to 1000 has the id 999, outside model\.vocab_size=999"):
        check_vocabulary(data, 999)
    s = samples(data, 64, vocab_size=950)  # what the look at load missed is found when it is read
    with pytest.raises(UserError, match=r"document 9 has the id \d+, outside model\.vocab_size=950"):
        [s.sample(i) for i in range(len(s))]
    with IndexedWriter(tmp_path / "minus", "int32") as w:
        w.add([1, -5, 2])
    with pytest.raises(UserError, match="has the id -5"):
        check_vocabulary(IndexedDataset(tmp_path / "minus"), 10)


def test_the_look_at_load_reaches_both_ends(tmp_path: Path) -> None:
    ids = np.zeros(10_000, dtype=np.int32)
    for at in (0, 9_999, 5_000):
        ids[:] = 0
        ids[max(0, at - 60) : at + 60] = 77
        with IndexedWriter(tmp_path / "a", "int32") as w:
            w.add(ids)
        with pytest.raises(UserError, match="has the id 77"):
            check_vocabulary(IndexedDataset(tmp_path / "a"), 77, blocks=51, block=100)


def test_files_without_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="documents 2 to 4 of 5 hold no id"):
        samples(make(tmp_path, [3, 4, 0, 0, 5]), 8, span=(2, 4))
    with pytest.raises(UserError, match="holds float32"):
        samples(make(tmp_path, [3], "float32"), 8)

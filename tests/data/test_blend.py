"""Every form of blend means what it says, every slip is refused by name, and proportions hold at every prefix."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nano3.cli import parser, resolve
from nano3.config import DatasetConfig, UserError
from nano3.data import blend as module
from nano3.data import sampling
from nano3.data.blend import Blend, Source, load_blend, read_blend
from nano3.data.corpus import load_dataset, tokenizer_name
from nano3.data.indexed import IndexedDataset, IndexedWriter
from nano3.data.loader import Place, micro_batches, stream
from nano3.data.sampling import Cache
from nano3.data.tokenizer import load_tokenizer

STEPS = 1_000_000
WEIGHTS = {
    "two": [0.3, 0.7],
    "three": [1, 1, 1],
    "rare": [1e-6, 1],
    "equal64": [1] * 64,
    "half": [63] + [1] * 63,
    "geometric": [0.5**i for i in range(24)],
    "slow": [0.8**i for i in range(64)],
    "zeros": [0, 2, 0, 1, 0],
} | {f"random{k}": np.random.default_rng(k).dirichlet(np.full(k, 0.3)).tolist() for k in (5, 17, 40, 64)}


@pytest.mark.parametrize("name", WEIGHTS)
def test_proportions_hold_at_every_prefix(name: str, tmp_path: Path) -> None:
    blend, k = Blend(WEIGHTS[name], Cache(tmp_path)), len(WEIGHTS[name])
    blend.locate(STEPS - 1)
    source, turn = (a[:STEPS] for a in blend._blocks[0])
    source = np.array(blend.sources)[source]
    shares = np.array(WEIGHTS[name]) / sum(WEIGHTS[name])
    for s in range(k):
        mine = np.flatnonzero(source == s)
        count = np.arange(len(mine))  # turns before each of its turns; between two turns, the extremes are the ends
        before, after = count - mine * shares[s], count + 1 - (mine + 1) * shares[s]
        deviation = np.concatenate([before, after, [len(mine) - STEPS * shares[s]]])
        assert np.abs(deviation).max() < 1  # that is, |taken / n - share| < 1 / n for every n
        assert np.array_equal(turn[mine], count)  # its samples in order, none left out
    assert blend.locate(12345) == (source[12345], turn[12345])


def test_blocks_continue_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = WEIGHTS["random17"]
    whole = Blend(weights, Cache(tmp_path / "whole"))
    truth = [whole.locate(i) for i in range(20_000)]
    monkeypatch.setattr(module, "BLOCK", 1000)
    parts = Blend(weights, Cache(tmp_path / "parts"))
    assert [parts.locate(i) for i in range(20_000)] == truth
    again = Blend(weights, Cache(tmp_path / "parts"))
    monkeypatch.setattr(Blend, "_order", None)  # a second build would fail
    for i in (19_999, 5, 7_531, 0, 12_000):  # in any order
        assert again.locate(i) == truth[i]


# --- what users write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files a (100 documents), b (300), c (50), whose ids are 1000, 2000, 3000 + something."""
    for name, documents in (("a", 100), ("b", 300), ("c", 50)):
        with IndexedWriter(tmp_path / name, "int32") as w:
            for i in range(documents):
                w.add([1000 * (ord(name) - 96) + i] * 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "BLOCK", 1000)
    return tmp_path


A, B = Source("a", None), Source("b", None)


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        ("a", [A]),
        ("a b", [A, B]),
        (["a"], [A]),
        (["a", "b"], [A, B]),
        (["a.bin", "./b.idx"], [A, B]),
        ([0.3, "a", 0.7, "b"], [Source("a", 0.3), Source("b", 0.7)]),
        (["30", "a", "1e2", "b"], [Source("a", 30), Source("b", 100)]),
        ("0.3 a\n0.7 b", [Source("a", 0.3), Source("b", 0.7)]),
        ([1, "a", 0, "b"], [Source("a", 1), Source("b", 0)]),
        ([["a", "b"], [3, 1]], [Source("a", 3), Source("b", 1)]),
        ([["a", "b"], None], [A, B]),
    ],
)
def test_forms_of_a_blend(value: object, sources: list[Source], folder: Path) -> None:
    for key in ("blend", "data_paths"):
        assert read_blend(DatasetConfig(**{key: value})) == sources
    (folder / "args.txt").write_text(value if isinstance(value, str) else "a")
    assert read_blend(DatasetConfig(data_args_path="args.txt")) == (sources if isinstance(value, str) else [A])
    (folder / "blend.json").write_text(json.dumps({"train": value, "valid": ["b"], "test": []}))
    for config in (
        DatasetConfig(per_split_data_args_path="blend.json"),
        DatasetConfig(blend_per_split=[value, ["b"], None]),
        DatasetConfig(train_data_path=value, valid_data_path="b"),
    ):
        assert read_blend(config) == {"train": sources, "valid": [B], "test": []}


def test_paths_beside_the_json_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "blend.json").write_text(json.dumps({"train": ["a"], "valid": ["b"], "test": "c"}))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    found = read_blend(DatasetConfig(per_split_data_args_path=str(folder / "blend.json")))
    assert found["train"] == [Source(str(folder / "a"), None)]


SLIPS = [
    ([0.3, "a", 0.7], "3 items, and item 2, 0.7, is out of place"),
    ([0.3, "a", "b"], "item 2, 'b', is out of place"),
    (["a", 0.3, "b", 0.7], "item 0, 'a', is out of place"),
    ([0.3, 0.7], "item 1, 0.7, is out of place"),
    ("0.3 a b 0.7", "item 2, 'b', is out of place"),
    ([0.3, "a", -0.1, "b"], "the weight -0.1 of b must be"),
    ([float("nan"), "a", 1, "b"], "the weight nan of a must be"),
    (["inf", "a"], "the weight inf of a must be"),
    ([0, "a", 0.0, "b"], "all weights are 0"),
    ([1, "a", 1, "./a"], "a is listed twice"),
    (["a", "a.bin"], "a is listed twice"),
    ("nothing", "nothing.idx: no such file"),
    (["a", "gone/b"], "gone/b.idx: no such file"),
    ([], "is empty"),
    ("", "is empty"),
    (7, "is int 7"),
    ({"a": 1}, "is dict"),
    ([["a", "b"], [1]], "2 paths need as many weights"),
    ([["a"], ["x"]], "expected"),
    ([["a"], [float("nan")]], "the weight nan of a"),
    ([["a"], "b", "c"], "item 0 is"),
    ([True, "a"], "item 0 is True"),
    ([1, None], "item 1 is None"),
    ([1, ""], "item 1 is ''"),
    ([{}, "a"], "item 0 is {}"),
]


@pytest.mark.parametrize(("value", "message"), SLIPS)
def test_slips_are_refused_by_name(value: object, message: str, folder: Path) -> None:
    (folder / "blend.json").write_text(json.dumps({"train": value, "valid": ["b"], "test": []}))
    cases = [(DatasetConfig(blend=value), "dataset.blend"), (DatasetConfig(train_data_path=value), "train_data_path")]
    if value not in ([], ""):  # nothing for a split is found out when that split is needed
        cases += [
            (DatasetConfig(per_split_data_args_path="blend.json"), 'blend.json: "train"'),
            (DatasetConfig(blend_per_split=[value, "b", None]), "dataset.blend_per_split: train"),
        ]
    for config, name in cases:
        with pytest.raises(UserError) as error:
            read_blend(config)
        assert message in str(error.value)
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\x00\x01", "not valid JSON"),
        ("[]", "expected an object with the keys train, valid and test, not list"),
        ('"a"', "not str"),
        ("{}", "the keys train, valid, test must be there"),
        ('{"train": ["a"], "test": []}', "the key valid must be there"),
        ('{"train": ["a"], "validation": [], "test": []}', "did you mean 'validation' to be 'valid'?"),
        ('{"train": 1, "valid": [], "test": []}', '"train" is int 1'),
        ('{"train": ["a"], "valid": {"a": 1}, "test": []}', '"valid" is dict'),
        ('{"train": ["a"], "valid": [], "test": ["nope"]}', '"test": nope.idx: no such file'),
    ],
)
def test_json_that_is_no_blend(text: str, message: str, folder: Path) -> None:
    (folder / "blend.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_blend(DatasetConfig(per_split_data_args_path="blend.json"))
    assert str(error.value).startswith("dataset.per_split_data_args_path=blend.json: ")
    assert message in str(error.value)


def test_files_of_settings_that_cannot_be_read(folder: Path) -> None:
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    for key in ("data_args_path", "per_split_data_args_path"):
        for path in ("nowhere", "binary", str(folder)):
            with pytest.raises(UserError, match=f"dataset.{key}={path}: cannot be read as text"):
                read_blend(DatasetConfig(**{key: path}))


def test_a_missing_half_and_a_near_name(folder: Path) -> None:
    (folder / "c.bin").unlink()
    with pytest.raises(UserError, match=r"c\.bin: no such file"):
        read_blend(DatasetConfig(blend="c"))
    (folder / "wiki_text_document.idx").touch()
    with pytest.raises(UserError, match="did you mean wiki_text_document"):
        read_blend(DatasetConfig(blend="wiki_text_documents"))


def test_one_form_at_a_time(folder: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.blend and dataset\.train_data_path each name"):
        read_blend(DatasetConfig(blend="a", train_data_path="b"))
    with pytest.raises(UserError, match=r"valid_data_path needs dataset\.train_data_path"):
        read_blend(DatasetConfig(valid_data_path="b"))
    with pytest.raises(UserError, match="expected three blends"):
        read_blend(DatasetConfig(blend_per_split=["a", "b"]))


# --- the data set


def load(valid: bool = True, vocab_size: int = 4000, **settings) -> module.BlendedDataset:
    return load_blend(DatasetConfig(seq_length=32, **settings), seed=1, vocab_size=vocab_size, valid=valid)


def origin(data: module.BlendedDataset, split: str, n: int) -> np.ndarray:
    """Of the first n samples, how many came from a, b and c."""
    return np.bincount([data.sample(split, i)[0] // 1000 - 1 for i in range(n)], minlength=3)


def test_samples_come_in_proportion(folder: Path) -> None:
    assert origin(load(blend=[1, "a", 3, "b"], split="1,1"), "train", 400).tolist() == [100, 300, 0]
    assert origin(load(blend=[3, "a", 0, "b", 1, "c"], split="1,1"), "train", 400).tolist() == [300, 0, 100]
    unweighted = origin(load(blend=["a", "b", "c"], split="1,1"), "train", 450)
    assert np.abs(unweighted - [100, 300, 50]).max() <= 1  # as large as they are


def test_splits_do_not_meet(folder: Path) -> None:
    data = load(blend="b", split="200,100")
    assert max(data.sample("train", i).max() for i in range(200)) == 2199
    seen = np.concatenate([data.sample("valid", i) for i in range(100)])
    assert (seen.min(), seen.max()) == (2200, 2299)


def test_validation_is_the_same_text_in_every_run(folder: Path) -> None:
    one, two = (load_blend(DatasetConfig(blend="b", split="1,1"), s, 4000, True) for s in (1, 2))
    assert np.array_equal(one.sample("valid", 3), two.sample("valid", 3))
    assert not np.array_equal(one.sample("train", 3), two.sample("train", 3))


def test_boundaries_are_where_the_document_changes(folder: Path) -> None:
    data = load(blend=[1, "a", 1, "b"], split="1,1")
    for i in range(50):
        ids = data.sample("train", i)[:-1]
        assert data.boundaries("train", i).tolist() == [0, *(np.flatnonzero(np.diff(ids)) + 1)]


def test_what_cannot_be_trained_on_is_refused_at_load(folder: Path) -> None:
    with pytest.raises(UserError, match=r"a\.idx has 100 documents, of which dataset\.split=9999,8,2 leaves none for"):
        load(blend="a")
    load(blend="a", valid=False)
    with pytest.raises(UserError, match="the blend names no valid data"):
        load(train_data_path="a")
    with pytest.raises(UserError, match=r"b\.bin: .* outside model\.vocab_size=2000"):
        load(blend=["a", "b"], vocab_size=2000, valid=False)
    with IndexedWriter("empty", "int32"):
        pass
    with pytest.raises(UserError, match=r"empty\.idx holds no document; leave it out"):
        load(train_data_path=["a", "empty"], valid=False)
    Path("b.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"b\.bin: has 3 bytes"):
        load(blend=["a", "b"], valid=False)


# --- from the command line to batches


def test_the_command_of_nvidias_page(folder: Path) -> None:
    (folder / "blend.json").write_text(json.dumps({"train": ["0.3", "a", "0.7", "b"], "valid": "c", "test": "c"}))
    flags = ["--mode", "pretrain", "--per-split-data-args-path=blend.json", "--seq-length=32"]
    config, _ = resolve(parser().parse_args([*flags, "model.vocab_size=4096", "dataset.path_to_cache=cache"]))
    assert tokenizer_name(config) == "none"
    data = load_dataset(config, load_tokenizer("none", 4096))
    assert origin(data, "train", 100).tolist() == [30, 70, 0]
    assert origin(data, "valid", 10).tolist() == [0, 0, 10]
    assert (folder / "cache").is_dir()
    assert not (folder / "nano3_index").exists()
    whole = torch.cat([b.tokens for b in micro_batches(data, "train", 16, Place(8, 8))])
    parts = [b.tokens for r in range(4) for b in micro_batches(data, "train", 16, Place(8, 1, r, 4))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("first", "ranks", "micro", "workers"), [(17, 1, 3, 0), (20, 2, 2, 2), (33, 4, 3, 0), (39, 12, 1, 0)]
)
def test_a_run_goes_on_in_any_block_and_epoch_on_other_ranks(
    first: int, ranks: int, micro: int, workers: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that begins late, with nothing in memory, gives what one from the beginning gives there."""
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(sampling, "SMALL", 0)  # epochs come from the cache too

    def batches(start: int, place: Callable[[int], Place], ranks: int, workers: int = 0) -> list[torch.Tensor]:
        each = [
            stream(load(blend=[2, "a", 5, "b", 3, "c"], split="1,1"), "train", 12 * start, place(r), workers)
            for r in range(ranks)
        ]
        return [torch.cat([b.tokens for rows in each for b in next(rows)]) for _ in range(start, 42)]

    whole = batches(0, lambda r: Place(12, 12), 1)
    late = batches(first, lambda r: Place(12, micro, r, ranks), ranks, workers)
    assert all(torch.equal(a, b) for a, b in zip(whole[first:], late, strict=True))


@pytest.mark.parametrize(
    ("override", "sources"),
    [
        ("dataset.blend=[0.3,a,0.7,b]", [Source("a", 0.3), Source("b", 0.7)]),
        ("dataset.blend=[[a,b],[3,1]]", [Source("a", 3), Source("b", 1)]),
        ("dataset.blend=a", [A]),
        ("dataset.data_paths=[a,b]", [A, B]),
        ("dataset.data_paths=a b", [A, B]),
    ],
)
def test_overrides(override: str, sources: list[Source], folder: Path) -> None:
    config, _ = resolve(parser().parse_args(["--mode", "pretrain", override, "dataset.split=99,1"]))
    assert read_blend(config.dataset) == sources
    assert config.dataset.split == "99,1"


def test_files_are_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(module, "IndexedDataset", lambda prefix: opened.append(prefix) or IndexedDataset(prefix))
    load(blend=["a", "b"], split="1,1")
    assert opened == ["a", "b"]

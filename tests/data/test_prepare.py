"""Text becomes files whose ids decode to it; a kill costs one piece; every broken record is named by its place."""

import base64
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nano3.config import DatasetConfig, UserError
from nano3.data import sources
from nano3.data.blend import load_blend, read_blend
from nano3.data.indexed import IndexedDataset
from nano3.data.prepare import Job, convert, parser, prepare
from nano3.data.sources import Piece, Read, RecordError, cut, documents, find_inputs
from nano3.data.tokenizer import ByteTokenizer
from tests.conftest import ROOT

TEXTS = [f"document {i}: " + "naïve 日本語 🙂 \n\t"[: i % 17] + "x" * (i * 37 % 91) for i in range(500)]


def jsonl(path: Path, texts: list[str] = TEXTS, key: str = "text") -> Path:
    raw = "".join(json.dumps({"id": i, key: t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def run(folder: Path, *inputs: str | Path, more: tuple[str, ...] = (), say: list | None = None) -> dict[str, list[str]]:
    """The texts of each split, in the files' order."""
    args = ["--input", *map(str, inputs), "--output-prefix", str(folder / "out" / "x"), "--tokenizer-model", "bytes"]
    path = prepare(parser().parse_args([*args, "--workers", "1", *more]), (say if say is not None else []).append)
    return read_back(path)


def read_back(path: Path) -> dict[str, list[str]]:
    out = {}
    for split, listed in read_blend(DatasetConfig(per_split_data_args_path=str(path))).items():
        out[split] = []
        for source in listed:
            data = IndexedDataset(source.prefix)
            assert source.weight == data.tokens.size
            out[split] += [bytes(data[i].astype(np.uint8)).decode() for i in range(len(data))]
    return out


# --- reading


def read(path: Path, size: int = 1 << 30, **settings: str) -> list[str | RecordError]:
    how = Read(**settings)
    return [text for piece in cut(str(path), size, how) for _, text in documents(piece, how)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "A.NDJSON"])
def test_lines(name: str, tmp_path: Path) -> None:
    assert read(jsonl(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 12_345])
def test_a_line_belongs_to_one_piece(size: int, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS[:60])
    assert read(path, size) == TEXTS[:60]
    path.write_bytes(path.read_bytes().removesuffix(b"\n").replace(b"\n", b"\r\n\n  \n"))
    assert read(path, size) == TEXTS[:60]


def test_byte_order_mark_and_other_key(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", key="content")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path, key="content") == TEXTS


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "c.md").write_text("")
    assert [read(tmp_path / n) for n in ("a.txt", "b.txt.gz", "c.md")] == [["one\n\ntwo"], ["three"], []]


@pytest.mark.parametrize("size", [1, 1 << 30])
def test_parquet(size: int, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": TEXTS, "n": range(len(TEXTS))}), tmp_path / "a.parquet", row_group_size=60)
    assert len(cut(str(tmp_path / "a.parquet"), size, Read())) == (9 if size == 1 else 1)
    assert read(tmp_path / "a.parquet", size) == TEXTS
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    assert str(read(tmp_path / "b.parquet")[1]).endswith('b.parquet: row 1: "text" is null, not a string')
    with pytest.raises(UserError, match=r'no column "body"; it has text, n \(--json-key NAME\)'):
        read(tmp_path / "a.parquet", key="body")


def test_data_sets_by_id(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    jsonl(tmp_path / "train.jsonl")  # a folder is an id that needs no network
    assert [t for p in cut(f"datasets:{tmp_path}", 1, Read()) for t in _texts(p)] == TEXTS
    with pytest.raises(UserError, match=r"cannot load it, split 'dev'"):
        cut(f"datasets:{tmp_path}", 1, Read(hub_split="dev"))


def test_zst_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        read(tmp_path / "a.jsonl.zst")


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    raw = jsonl(tmp_path / "a.jsonl").read_bytes()
    frames = [zstandard.compress(raw[:1000]), zstandard.compress(raw[1000:])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "b.jsonl.zst") == TEXTS


def test_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    for name in ("b.jsonl", "a.txt", "d/c.parquet", "d/e/a.jsonl.gz", "d/notes.doc"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert find_inputs(["*.jsonl", "d", "b.jsonl", "datasets:x/y"]) == [
        "b.jsonl",
        "d/c.parquet",
        "d/e/a.jsonl.gz",
        "datasets:x/y",
    ]
    for bad, message in [("nope.jsonl", "no such file"), ("*.zip", "no such file"), ("d/notes.doc", "not known")]:
        with pytest.raises(UserError, match=message):
            find_inputs([bad])


# --- the whole command


def test_documents_come_back_and_the_blend_trains(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl")
    texts = run(tmp_path, path, more=("--append-eod", "--split", "80,15,5"))
    assert sorted(t for split in texts.values() for t in split) == sorted(t + "\0" for t in TEXTS)
    assert [0.7, 0.1, 0.02] < [len(t) / 500 for t in texts.values()] < [0.9, 0.2, 0.09]
    data = load_blend(DatasetConfig(seq_length=64, per_split_data_args_path=str(tmp_path / "out/x.json")), 1, 256, True)
    assert "document" in bytes(data.sample("train", 0).astype(np.uint8)).decode(errors="replace")


class Letters:
    """A tokenizer whose ids need 4 bytes: code points."""

    vocab_size, eod, stop_ids = 0x110001, 0x110000, ()

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))


@pytest.mark.parametrize("eod", [True, False])
def test_ids_are_the_tokenizers(eod: bool, tmp_path: Path) -> None:
    job = Job(str(tmp_path / "out"), "", Read(), eod, "1", False)
    job.record(0).parent.mkdir()
    convert(job, 0, Piece("jsonl", str(jsonl(tmp_path / "a.jsonl"))), Letters())
    data = IndexedDataset(job.shard(0, "train"))
    assert data.dtype == np.int32
    assert [data[i].tolist() for i in range(500)] == [[*map(ord, t), *[Letters.eod] * eod] for t in TEXTS]


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path) -> None:
    texts = run(tmp_path, jsonl(tmp_path / "a.jsonl", TEXTS * 3), more=("--split", "50,50"))
    assert len(texts["train"]) + len(texts["valid"]) == 1500
    assert not set(texts["train"]) & set(texts["valid"])


def test_several_workers_and_pieces_write_what_one_does(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"{i}.jsonl", [f"{i} {t}" for t in TEXTS]) for i in range(5)]
    one = run(tmp_path / "1", *files)
    assert run(tmp_path / "2", *files, more=("--workers", "2")) == one
    assert sum(map(len, one.values())) == 2500
    names = sorted(p.name for p in (tmp_path / "2" / "out").iterdir() if p.suffix == ".bin")
    assert len(names) == len(set(names)) == 10


def test_finished_pieces_are_not_done_again(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"{i}.jsonl", [f"{i} {t}" for t in TEXTS]) for i in range(4)]
    truth = run(tmp_path, *files)
    out = tmp_path / "out"
    (out / "x-00001_train.bin").write_bytes(b"cut")
    (out / "x.parts" / "00003.json").unlink()
    (out / ".x-00003_train.bin.1.tmp").write_bytes(b"left by a killed run")
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.bin")}
    said = []
    assert run(tmp_path, *files, say=said) == truth
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.bin")}
    assert {k[:7] for k in before if before[k] != after[k]} == {"x-00001", "x-00003"}
    assert said[0] == "2 of 4 pieces were finished before"
    assert not list(out.glob(".*"))
    with pytest.raises(UserError, match="work of another command, which differs in append_eod"):
        run(tmp_path, *files, more=("--append-eod",))
    jsonl(files[0], TEXTS)
    with pytest.raises(UserError, match="differs in inputs"):
        run(tmp_path, *files)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [f"{i} " + "words " * 2000 for i in range(1000)])  # 12 MB
    out = tmp_path / "out"
    command = [sys.executable, "-m", "nano3.data.prepare", "--input", str(path), "--output-prefix", str(out / "x")]
    command += ["--tokenizer-model", "bytes", "--shard-mb", "1", "--workers"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "2"], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("x.parts/0*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "x.json").exists()
    for idx in out.glob("x-*.idx"):
        IndexedDataset(idx.with_suffix(""))  # whatever has a name is whole
    done = subprocess.run([*command, "1"], env=env, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "of 13 pieces were finished before" in done
    texts = read_back(out / "x.json")
    assert sorted(texts["train"] + texts["valid"]) == sorted(f"{i} " + "words " * 2000 for i in range(1000))


def test_a_temporary_that_goes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a killed run may still name its file while the next run looks for what was left behind."""
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda p: [*listed(p), p / ".x-00000_train.bin.123.tmp", p / ".0.json.1.tmp"])
    assert sum(map(len, run(tmp_path, jsonl(tmp_path / "a.jsonl")).values())) == len(TEXTS)


def test_a_vocabulary_is_read_with_the_settings_that_train_reads_it_with(tmp_path: Path) -> None:
    """A file of bytes alone, whose pattern must be said, in this process and in workers."""
    vocabulary = tmp_path / "bytes.tiktoken"
    vocabulary.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    files = [jsonl(tmp_path / f"{i}.jsonl", TEXTS[i::2]) for i in range(2)]
    tokens = ["--tokenizer-special-tokens", "<a>", "<end>"]

    def ids(name: str, *more: str) -> list[int]:
        args = ["--input", *map(str, files), "--output-prefix", str(tmp_path / name), "--append-eod", "--split", "1"]
        path = prepare(parser().parse_args([*args, "--tokenizer-model", str(vocabulary), *more]), lambda line: None)
        listed = read_blend(DatasetConfig(per_split_data_args_path=str(path)))["train"]
        return [int(i) for s in listed for i in IndexedDataset(s.prefix).tokens]

    for workers in ("1", "2"):
        found = ids(workers, "--workers", workers, "--tokenizer-pattern", "gpt2", *tokens)
        assert (max(found), found.count(256)) == (256, len(TEXTS))  # <a> ends a document
        assert ids(workers, "--workers", workers, "--tokenizer-pattern", "gpt2", *tokens) == found  # the same command
        with pytest.raises(UserError, match="work of another command, which differs in tokenizer"):
            ids(workers, "--workers", workers, "--tokenizer-pattern", "v2", *tokens)
        with pytest.raises(UserError, match=r"^--tokenizer-model=.*set --tokenizer-pattern to one of"):
            ids("none", "--workers", workers)
        with pytest.raises(UserError, match=r"^--tokenizer-num-special-tokens=5 is for NVIDIA's"):
            ids("none", "--workers", workers, "--tokenizer-num-special-tokens", "5")


def test_only_its_own_temporaries_are_removed(tmp_path: Path) -> None:
    """Another command may be writing to a prefix that begins like this one."""
    (tmp_path / "out").mkdir()
    mine, theirs = (tmp_path / "out" / f".{name}-00000_train.bin.123.tmp" for name in ("x", "x-2"))
    for path in (mine, theirs):
        path.touch()
    path = jsonl(tmp_path / "a.jsonl")
    prepare(
        parser().parse_args(
            ["--input", str(path), "--output-prefix", f"{tmp_path}/out/x", "--tokenizer-model", "bytes"]
        )
    )
    assert (mine.exists(), theirs.exists()) == (False, True)


def test_slips_on_the_command_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "file").touch()
    for args, message in [
        (("--split", "a"), "--split a: expected"),
        (("--workers", "0"), "--workers 0 must be"),
        (("--shard-mb", "0"), "--shard-mb 0 must be"),
        (("--output-prefix", str(tmp_path / "file" / "x")), "--output-prefix .*check the folder"),
        (("--input", str(tmp_path / "empty.jsonl")), "every file is empty"),
        (("--json-key", "body"), r'a\.jsonl: line 1 \(byte 0\): no key "body"; it has \'id\', \'text\''),
    ]:
        with pytest.raises(UserError, match=message):
            run(tmp_path, path, more=args)
    with pytest.raises(UserError, match="no document is left for training"):
        run(tmp_path / "2", path, more=("--split", "0,1"))


# --- broken records

GOOD = '{"text": "héllo wörld"}'.encode()


def broken_lines() -> dict[str, bytes]:
    """Lines of which none is a document, by a name that says why."""
    rng = np.random.default_rng(0)
    lines = {f"cut at {i}": GOOD[:i] for i in range(1, len(GOOD))}
    lines |= {f"byte {b:#x}": b'{"text": "a' + bytes([b]) + b'b"}' for b in range(0x80, 0x100)}
    lines |= {f"control {b:#x}": b'{"text": "a' + bytes([b]) + b'b"}' for b in range(0x20) if b != 10}
    lines |= {f"surrogate {c:#x}": f'{{"text": "a\\u{c:04x} b"}}'.encode() for c in range(0xD800, 0xE000, 16)}
    lines |= {f"key {i}": json.dumps({f"text{i}": "a", "Text": "b"}).encode() for i in range(100)}
    values = [None, True, False, 0, -1, 1.5, 1e300, [], ["a"], {}, {"text": "a"}, [["a"]]]
    lines |= {f"value {v}": json.dumps({"text": v}).encode() for v in values}
    lines |= {f"top {v}": json.dumps(v).encode() for v in [*values[:10], "text", "a"]}
    lines |= {f"tail {t}": GOOD + t.encode() for t in ("x", "{}", "}", ",", GOOD.decode(), "]", '"')}
    lines |= {"deep": b"[" * 100_000, "digits": b'{"text": ' + b"9" * 5000 + b"}"}
    lines |= {"nothing": b"{}", "two bytes a letter": b"\xff\xfe{"}
    for i in range(300):
        noise = rng.integers(0, 256, rng.integers(4, 60), dtype=np.uint8).tobytes()
        lines[f"random {i}"] = noise.replace(b"\n", b"") + b"\xff"
    return lines


BROKEN = broken_lines()


def test_every_broken_line_is_named_by_its_place(tmp_path: Path) -> None:
    """Together with the .idx and .bin files of test_indexed.py, far more than 1,000 malformed inputs."""
    assert len(BROKEN) > 700
    path, job = tmp_path / "bad.jsonl", Job(str(tmp_path / "out"), "bytes", Read(), False, "99,1", False)
    job.record(0).parent.mkdir()
    for name, line in BROKEN.items():
        path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
        with pytest.raises(UserError) as error:
            convert(job, 0, Piece("jsonl", str(path), 0, None), ByteTokenizer())
        message = str(error.value)
        assert message.startswith(f"{path}: line 2 (byte {len(GOOD) + 1}): "), name
        assert "--on-error skip" in message
        assert len(message) < 500
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "out.parts"]  # nothing half-written
    assert os.listdir(tmp_path / "out.parts") == []


@pytest.mark.parametrize("size", [500, 1 << 30])
def test_broken_lines_can_be_left_out(size: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join(GOOD + b"\n" + line + b"\n" for line in BROKEN.values()))
    found = read(path, size)
    errors = [str(t) for t in found if isinstance(t, RecordError)]
    assert len(errors) == len(BROKEN)
    assert [t for t in found if isinstance(t, str)] == ["héllo wörld"] * len(BROKEN)
    lines = path.read_bytes().split(b"\n")
    for i, e in enumerate(errors):  # the line's number and byte are right from whatever piece it was read
        assert e.startswith(f"{path}: line {2 * i + 2} (byte {sum(map(len, lines[: 2 * i + 1])) + 2 * i + 1}): ")


def _texts(piece: Piece) -> list[str | RecordError]:
    return [t for _, t in documents(piece, Read())]


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"".join(GOOD + b"\n" + line + b"\n" for line in BROKEN.values()))
    said = []
    texts = run(tmp_path, tmp_path / "bad.jsonl", more=("--on-error", "skip", "--split", "1"), say=said)
    assert texts["train"] == ["héllo wörld"] * len(BROKEN)
    expected = f"{len(BROKEN):,} broken records were left out\n  {tmp_path}/bad.jsonl: line 2 (byte {len(GOOD) + 1})"
    assert any(text.startswith(expected) for text in said)


def test_a_broken_record_ends_the_command_without_a_blend(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(GOOD + b"\n\xff\n")
    with pytest.raises(UserError, match=r"b\.jsonl: line 2 \(byte 26\): not UTF-8 at byte 0 of the line \(0xff\)"):
        run(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert "x.json" not in names
    assert not [n for n in names if n.startswith("x-00001") or n.endswith(".tmp")]


@pytest.mark.parametrize("cut_at", [0, 1, 12, 30, 200, -9, -1])
def test_a_damaged_gz_is_named(cut_at: int, tmp_path: Path) -> None:
    raw = jsonl(tmp_path / "a.jsonl.gz").read_bytes()
    for damaged in (raw[:cut_at], raw[:cut_at] + b"\x55\xaa" + raw[cut_at:][2:]):
        (tmp_path / "b.jsonl.gz").write_bytes(damaged)
        if damaged:
            last = _texts(Piece("jsonl", str(tmp_path / "b.jsonl.gz")))[-1]
            assert isinstance(last, RecordError), (cut_at, last)
            assert "b.jsonl.gz: line" in str(last)


def test_text_and_parquet_that_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    assert str(read(tmp_path / "a.txt")[0]) == f"{tmp_path}/a.txt: byte 5: not UTF-8 (0xff)"
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    assert "compressed file is damaged" in str(read(tmp_path / "b.txt.gz")[0])
    pytest.importorskip("pyarrow")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        read(tmp_path / "c.parquet")


def test_reading_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(sources, "BATCH", 10)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    (piece,) = cut(str(tmp_path / "a.parquet"), 1 << 30, Read())
    stream = documents(piece, Read())
    assert [next(stream)[1] for _ in range(25)] == TEXTS[:25]

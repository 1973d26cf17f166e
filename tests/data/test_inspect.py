"""inspect prints what the model sees; pack writes it once for many runs."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from nano3.cli import parser, resolve
from nano3.data import inspect, pack
from nano3.data.corpus import load_dataset, open_tokenizer
from nano3.data.indexed import IndexedWriter
from nano3.data.loader import Place, micro_batches
from nano3.data.packing import row_of
from nano3.data.row import IGNORE, Row
from nano3.data.supervised import Tally, prompt_answer
from nano3.data.tokenizer import ByteTokenizer


def row() -> Row:
    made = [prompt_answer(ByteTokenizer(), q, a, 99, Tally()) for q, a in (("1+1=", "2"), ("Hi,", "é"))]
    return row_of(made, 16, 0)


def test_documents_carry_what_is_learnt() -> None:
    first, second = inspect.documents(row())
    assert first.ids.tolist() == [*b"1+1= 2", 0]
    assert first.learnt.tolist() == [False] * 4 + [True] * 3
    assert second.ids.tolist() == [*"Hi, é".encode(), 0]
    text = Row(np.array([5, 6, 7, 8]), np.array([6, IGNORE, 8, 9]), np.array([0, 0, 1, 1]))
    assert [d.ids.tolist() for d in inspect.documents(text)] == [[5, 6], [7, 8, 9]]
    assert [d.learnt.tolist() for d in inspect.documents(text)] == [[False, True], [False, True, True]]
    assert len(inspect.documents(Row(text.tokens, text.tokens))) == 1


def test_colours_and_brackets() -> None:
    first, second = inspect.documents(row())
    text = inspect.shown(first, ByteTokenizer())
    assert text.plain == "1+1= 2⟨end⟩"
    styles = {text.plain[s.start : s.end]: s.style for s in text.spans}
    assert styles == {"1+1=": "default", " 2": "green", "⟨end⟩": "green"}
    assert inspect.shown(second, ByteTokenizer(), ("«", "»")).plain == "Hi,« é⟨end⟩»"
    out = io.StringIO()
    inspect.show_row(row(), ByteTokenizer(), "train 0", Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert "train 0: 2 documents in 12 of 16 tokens" in lines[0]
    assert lines[1:] == [
        "── document 1: 7 tokens, 3 learnt",
        "1+1=« 2⟨end⟩»",
        "── document 2: 7 tokens, 4 learnt",
        "Hi,« é⟨end⟩»",
        "── padding: 4 tokens",
    ]
    out = io.StringIO()
    inspect.show_row(row(), ByteTokenizer(), "train 0", Console(file=out, force_terminal=True, color_system="standard"))
    assert "1+1=\x1b[0m\x1b[32m 2\x1b[0m\x1b[32m⟨end⟩\x1b[0m" in out.getvalue()


def test_a_histogram() -> None:
    lines = inspect.histogram(np.array([4, 5, 7, 8, 16, 16]))
    assert [line.split()[:4] for line in lines] == [
        ["4", "to", "7", "3"],
        ["8", "to", "15", "1"],
        ["16", "to", "31", "2"],
    ]
    assert [line.count("█") for line in lines] == [40, 13, 27]
    assert inspect.histogram(np.array([])) == []


def test_the_command_shows_a_blend(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, letter in (("a", b"a"), ("b", b"b")):
        with IndexedWriter(tmp_path / name, np.uint8) as w:
            for _ in range(30):
                w.add([*letter * 9, 0])
    blend = f"dataset.blend=[3,{tmp_path}/a,1,{tmp_path}/b]"
    args = ["--mode", "pretrain", "--preset", "tiny", "--tokenizer-model", "bytes", "dataset.seq_length=16"]
    assert inspect.main([*args, blend, "dataset.split=8,2", "--samples", "1", "--rows", "40"]) == 0
    said = capsys.readouterr().out
    assert f"75.000% of samples,  75.000% asked for  {tmp_path}/a" in said
    assert f"25.000% of samples,  25.000% asked for  {tmp_path}/b" in said
    assert "40 rows: 640 of 640 tokens real (100.0%)" in said
    assert "⟨end⟩»" in said
    assert inspect.main([*args, blend, "--rows", "0"]) == 2
    assert "--rows 0 must be at least 1" in capsys.readouterr().err


def test_packed_files_train_as_packing_on_the_fly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [{"input": f"{i} + {i} =", "output": str(2 * i) * (i % 5 + 1)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = ["--mode", "finetune", "--preset", "tiny", "dataset.seq_length=64"]
    fly = [*args, "--packed-sequence", f"dataset.path={tmp_path}/sums.jsonl"]
    assert pack.main([*fly, "--output", str(tmp_path / "packed")]) == 0
    assert "of them real" in capsys.readouterr().out
    batches = []
    for given in (fly, [*args, f"dataset.packed_path={tmp_path}/packed", "tokenizer.tokenizer_model=bytes"]):
        config, _ = resolve(parser().parse_args(given))
        data = load_dataset(config, open_tokenizer(config))
        batches.append(
            [b for s in ("train", "valid") for i in range(9) for b in micro_batches(data, s, 4 * i, Place(4, 4))]
        )
    for one, two in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None)
    rows = (tmp_path / "packed" / "training.parquet").read_bytes()
    assert pack.main([*fly, "validation.eval_iters=0", "--output", str(tmp_path / "packed")]) == 0
    assert "validation.parquet: removed" in capsys.readouterr().out  # and what is trained on stays the same
    assert [p.name for p in (tmp_path / "packed").iterdir()] == ["training.parquet"]
    assert (tmp_path / "packed" / "training.parquet").read_bytes() == rows
    assert pack.main([*args, "dataset=mock", "--output", str(tmp_path / "no")]) == 2
    assert "needs supervised data" in capsys.readouterr().err

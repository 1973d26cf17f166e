"""SQuAD, prompts with answers and conversations as samples: what is learnt, what is cut, what is refused and where."""

import copy
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nano3.config import UserError
from nano3.data.records import RecordError
from nano3.data.squad import squad_file
from nano3.data.supervised import (
    IGNORE,
    Reader,
    Sample,
    SupervisedOptions,
    Tally,
    hold_out,
    load_supervised,
    open_file,
)
from nano3.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from tests.data.chat_cases import CASES, NEMOTRON, said, trained_tokenizer, user

BYTES = ByteTokenizer()
ANSWERS = {"text": ["Denver Broncos", "Broncos"], "answer_start": [177, 184]}
ROW = {"id": "1", "title": "Super Bowl", "context": "The Broncos won.", "question": "Who won?", "answers": ANSWERS}
PROMPT = "Context: The Broncos won. Question: Who won? Answer:"


def learnt(sample: Sample, tokenizer: Tokenizer = BYTES) -> str:
    return tokenizer.decode(sample.labels[sample.labels != IGNORE].tolist())


def whole(sample: Sample) -> list[int]:
    """The document's ids, from tokens and the last label; labels must be the tokens that follow."""
    ids = [*sample.tokens.tolist(), int(sample.labels[-1])]
    real = sample.labels != IGNORE
    assert real[-1]
    assert np.array_equal(sample.labels[real], np.array(ids[1:])[real])
    return ids


def one(record: dict, seq_length: int = 4096, tokenizer: Tokenizer = BYTES, **options: object) -> tuple[Sample, Tally]:
    tally = Tally()
    return Reader(tokenizer, seq_length, SupervisedOptions(**options)).sample(record, "here", tally), tally


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    trained_tokenizer(NEMOTRON).save_pretrained(path)
    return load_tokenizer(str(path), 1024)


def test_squad_is_asked_and_learnt_as_nvidia_does() -> None:
    sample, _ = one(ROW)
    assert bytes(whole(sample)) == PROMPT.encode() + b" Denver Broncos\0"  # no bos; the first answer; eod
    assert bytes(sample.labels[sample.labels != IGNORE].astype(np.uint8)) == b" Denver Broncos\0"
    assert (sample.labels[: len(PROMPT) - 1] == IGNORE).all()
    assert sample.labels[len(PROMPT) - 1] == ord(" ")


def test_squads_own_file(tmp_path: Path) -> None:
    questions = [
        {"id": "1", "question": "Who won?", "answers": [{"text": "Denver Broncos", "answer_start": 4}, {"text": "x"}]},
        {"id": "2", "question": "Who lost?", "answers": [], "is_impossible": True},
    ]
    data = {"version": "2.0", "data": [{"title": "t", "paragraphs": [{"context": ROW["context"], "qas": questions}]}]}
    path = tmp_path / "train-v2.0.json"
    path.write_text(json.dumps(data))
    records = list(squad_file(path))
    assert records[0] == (
        f"{path}: article 0, paragraph 0, question 0",
        {"input": PROMPT, "output": "Denver Broncos"},
    )
    tally = Tally()
    samples = list(Reader(BYTES, 512, SupervisedOptions()).read(open_file(path), tally))
    assert [learnt(s) for s in samples] == [" Denver Broncos"]
    assert (tally.read, tally.kept, tally.nothing_to_learn) == (2, 1, 1)
    assert tally.report() == "1 samples of 2 records; dropped 1 with nothing to learn"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d["data"].append(3), r"article 1 has no list of 'paragraphs'"),
        (lambda d: d["data"][0]["paragraphs"].append({}), r"article 0, paragraph 1 has no list of questions"),
        (lambda d: d["data"][0]["paragraphs"][0].pop("context"), r"paragraph 0, question 0: expected 'context'"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"].append("x"), r"question 1: expected 'context'"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(answers=3), r"'answers' must be a list, found int"),
        (
            lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(answers=[3]),
            r"first answer must be text, found int",
        ),
    ],
    ids=["article", "paragraph", "context", "question", "answers", "answer"],
)
def test_damaged_squad_names_the_question(tmp_path: Path, damage: Callable[[dict], object], message: str) -> None:
    question = {"question": "Who won?", "answers": [{"text": "Broncos"}]}
    data = {"data": [{"paragraphs": [{"context": "c", "qas": [question]}]}]}
    damage(data)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(RecordError, match=message):
        list(Reader(BYTES, 512, SupervisedOptions()).read(open_file(path), Tally()))
    tally = Tally()
    list(Reader(BYTES, 512, SupervisedOptions(on_error="skip")).read(open_file(path), tally))
    assert tally.malformed == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"data": 3}', b"\xff\xfe", b'{"data"'])
def test_a_json_file_that_is_not_squad(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.path=.*x\.json is not SQuAD's JSON"):
        list(open_file(tmp_path / "x.json"))


def test_input_and_output() -> None:
    sample, _ = one({"input": "2 + 2 =", "output": "4"})
    assert bytes(whole(sample)) == b"2 + 2 = 4\0"
    assert learnt(sample) == " 4"
    renamed, _ = one({"q": "2 + 2 =", "a": "4", "output": "no"}, columns={"input": "q", "output": "a"})
    assert np.array_equal(renamed.tokens, sample.tokens)
    with pytest.raises(RecordError, match=r"here: no column 'q', which dataset\.columns names; there are 'a'"):
        one({"a": "4"}, columns={"input": "q"})


def test_columns_say_which_form_a_record_has(chat_tokenizer: Tokenizer) -> None:
    chat = [user("Hi"), said("Hello.")]
    record = {**ROW, "messages": chat, "conversations": chat, "input": "i", "output": "o", "q": "2 + 2 =", "a": "4"}
    record["chat"] = [user("Bye"), said("Goodbye.")]
    for columns, expected in (
        ({}, "Hello.<|im_end|>"),
        ({"input": "q", "output": "a"}, " 4</s>"),
        ({"output": "a"}, " 4</s>"),
        ({"messages": "chat"}, "Goodbye.<|im_end|>"),
    ):
        sample, _ = one(record, tokenizer=chat_tokenizer, columns=columns)
        assert learnt(sample, chat_tokenizer) == expected
    with pytest.raises(RecordError, match="here: no field 'input'"):  # SQuAD's columns must not fill it in
        one({**ROW, "a": "4"}, columns={"output": "a"})
    with pytest.raises(RecordError, match="here: expected 'messages'"):
        one({"input": "i", "output": "o", "t": []}, tokenizer=chat_tokenizer, columns={"tools": "t"})


def test_control_tokens_in_a_prompt_are_text(chat_tokenizer: Tokenizer) -> None:
    sample, _ = one({"input": "<|im_end|>", "output": "</s> <think>"}, tokenizer=chat_tokenizer)
    ids = whole(sample)
    assert chat_tokenizer.decode(ids) == "<|im_end|> </s> <think></s>"
    assert [i for i in ids if i in chat_tokenizer.specials.values()] == [chat_tokenizer.eod]


@pytest.mark.parametrize("seq_length", range(1, 20))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_prompt_is_cut_and_the_answer_never(seq_length: int, side: str) -> None:
    """The document is "abcdefghij" + " xyz" + eod: 15 ids, of which seq_length + 1 fit."""
    sample, tally = one({"input": "abcdefghij", "output": "xyz"}, seq_length, truncation=side)
    room = seq_length + 1 - len(b" xyz\0")
    if room < 1:
        assert sample is None
        assert tally.answers_too_long == 1
        return
    kept = b"abcdefghij"[:room] if side == "right" else b"abcdefghij"[-room:]
    assert bytes(whole(sample)) == kept + b" xyz\0"
    assert len(sample.tokens) == min(seq_length, 14)
    assert bytes(sample.labels[sample.labels != IGNORE].astype(np.uint8)) == b" xyz\0"
    assert tally.prompts_cut == (room < 10)


@pytest.mark.parametrize("name", CASES)
def test_conversations_are_cut_between_turns(chat_tokenizer: Tokenizer, name: str) -> None:
    """At many lengths: the turns learnt are the first ones, each whole, and the tally says if one is missing."""
    messages, tools, turns = CASES[name]
    record = {"messages": messages, "tools": tools}
    full, _ = one(record, tokenizer=chat_tokenizer)
    ends = [t + "<|im_end|>" for t in turns]
    assert learnt(full, chat_tokenizer) == "".join(ends)
    allowed = {"".join(ends[:k]): k for k in range(len(ends) + 1)}
    reader, seen = Reader(chat_tokenizer, 0, SupervisedOptions()), set()
    for seq_length in (*range(1, len(full.tokens), 3), len(full.tokens)):
        reader.seq_length, tally = seq_length, Tally()
        sample = reader.sample(record, "here", tally)
        if sample is None:
            assert tally.answers_too_long == 1
            continue
        count = allowed[learnt(sample, chat_tokenizer)]
        seen.add(count)
        assert len(sample.tokens) <= seq_length
        assert whole(sample) == whole(full)[: len(sample.tokens) + 1]
        assert tally.turns_cut == (count < len(ends))
    assert min(seen) == 1
    assert max(seen) == len(ends)


def test_nothing_to_learn_is_counted(chat_tokenizer: Tokenizer) -> None:
    for record in ({"messages": [user("Hi")]}, {"input": "a", "output": " \n"}, {**ROW, "answers": {"text": []}}):
        sample, tally = one(record, tokenizer=chat_tokenizer)
        assert sample is None
        assert tally.nothing_to_learn == 1
    sample, tally = one(
        {"messages": [user("a"), said("b"), user("c")]}, tokenizer=chat_tokenizer, loss_mode="last_turn"
    )
    assert (sample, tally.nothing_to_learn) == (None, 1)


def test_full_mode_learns_everything_and_cuts_anywhere(chat_tokenizer: Tokenizer) -> None:
    record = {"messages": [user("Hello, what is 2 + 2?"), said("It is 4.")]}
    sample, _ = one(record, tokenizer=chat_tokenizer, loss_mode="full")
    assert (sample.labels != IGNORE).all()
    cut, tally = one(record, 12, chat_tokenizer, loss_mode="full")
    assert whole(cut) == whole(sample)[:13]
    assert tally.turns_cut == 1


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_folder_with_nvidias_names_and_mixed_records(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    records = [{"input": f"{i} + 1 =", "output": str(i + 1)} for i in range(20)]
    write(tmp_path / "training.jsonl", [*records, {"messages": [user("Hi"), said("Hello.")]}, ROW])
    lines: list[str] = []
    found = load_supervised(chat_tokenizer, 128, SupervisedOptions(path=str(tmp_path), seed=3), lines.append)
    assert {k: len(v) for k, v in found.items()} == {"train": 20, "valid": 2}
    texts = [learnt(s, chat_tokenizer) for part in found.values() for s in part]
    assert sorted(texts) == sorted([*(f" {i + 1}</s>" for i in range(20)), "Hello.<|im_end|>", " Denver Broncos</s>"])
    assert lines[0] == "train: 22 samples of 22 records"
    write(tmp_path / "validation.jsonl", records[:3])
    found = load_supervised(chat_tokenizer, 128, SupervisedOptions(path=str(tmp_path)), lines.append)
    assert {k: len(v) for k, v in found.items()} == {"train": 22, "valid": 3}
    assert [len(s.tokens) for s in found["valid"]] == found["valid"].lengths.tolist()


def test_hold_out_is_a_function_of_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"input": "a", "output": str(i)} for i in range(50)])
    found = [
        load_supervised(BYTES, 64, SupervisedOptions(path=str(path), seed=s), lambda line: None)["valid"]
        for s in (1, 1, 2)
    ]
    texts = [[learnt(s) for s in part] for part in found]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 5
    train, valid = hold_out(found[0], 0.0, 1)
    assert (len(train), len(valid)) == (5, 0)


@pytest.mark.parametrize(("share", "own", "left"), [(0.2, False, 40), (0.0, False, 50), (0.2, True, 50)])
def test_what_is_trained_on_does_not_depend_on_whether_a_run_evaluates(
    tmp_path: Path, share: float, own: bool, left: int
) -> None:
    write(tmp_path / "training.jsonl", [{"input": "a", "output": str(i)} for i in range(50)])
    if own:
        write(tmp_path / "validation.jsonl", [{"input": "a", "output": "b"}])
    options = SupervisedOptions(path=str(tmp_path), val_proportion=share)
    both, alone = (load_supervised(BYTES, 64, options, lambda line: None, valid) for valid in (True, False))
    assert [learnt(s) for s in both["train"]] == [learnt(s) for s in alone["train"]]
    assert (len(alone["train"]), list(alone)) == (left, ["train"])


BAD_LINES = [
    (b"\x00\x01\xff", "not UTF-8 text"),
    (b"{", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "expected an object with named fields, found list"),
    (b"3", "found int"),
    (b"{}", "expected 'input' and 'output', or 'messages', or SQuAD's fields; there are none"),
    (b'{"text": "a"}', "there are 'text'"),
    (b'{"input": "a"}', "no field 'output'"),
    (b'{"input": "a", "output": 3}', "the field 'output' must be text, found int"),
    (b'{"input": null, "output": "b"}', "the field 'input' must be text, found NoneType"),
    (b'{"input": "\\ud800", "output": "b"}', "half of a surrogate pair"),
    (b'{"messages": []}', "expected 'messages'"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_malformed_line_is_named_or_skipped(
    tmp_path: Path, chat_tokenizer: Tokenizer, line: bytes, message: str
) -> None:
    path = tmp_path / "chat.jsonl"
    good = b'{"input": "a", "output": "b"}\n'
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(RecordError, match=rf"chat\.jsonl:3: .*{message}.*dataset\.on_error=skip"):
        list(Reader(chat_tokenizer, 64, SupervisedOptions()).read(open_file(path), Tally()))
    tally = Tally()
    kept = list(Reader(chat_tokenizer, 64, SupervisedOptions(on_error="skip")).read(open_file(path), tally))
    assert (len(kept), tally.read, tally.malformed) == (2, 3, 1)
    assert "chat.jsonl:3" in tally.report()


def test_settings_are_checked(tmp_path: Path) -> None:
    for options, message in (
        ({"truncation": "middle"}, r"dataset\.truncation=middle"),
        ({"on_error": "ignore"}, r"dataset\.on_error=ignore"),
        ({"val_proportion": 1.0}, r"dataset\.val_proportion=1\.0"),
        ({"columns": {"prompt": "q"}}, r"dataset\.columns has the unknown fields \['prompt'\]"),
        ({"columns": {"input": None}}, r"dataset\.columns\.input=None names no column"),
        ({"columns": {"output": ""}}, r"dataset\.columns\.output='' names no column"),
        ({"columns": {"input": "q", "messages": "m"}}, "maps both prompts .* and conversations"),
        ({"path": "/nowhere.jsonl"}, r"dataset\.path=/nowhere\.jsonl does not exist"),
        ({"path": str(tmp_path)}, "neither training.jsonl nor"),
        ({"path": str(write(tmp_path / "a.txt", []))}, "must end in .jsonl"),
        ({"path": str(write(tmp_path / "a.jsonl", []))}, "no sample is left for train"),
        ({"path": str(write(tmp_path / "b.jsonl", [{"input": "a", "output": "bcdefghi"}]))}, "1 with answers too long"),
    ):
        with pytest.raises(UserError, match=message):
            load_supervised(BYTES, 4, SupervisedOptions(**options), lambda line: None)
    with pytest.raises(UserError, match="needs a tokenizer"):
        Reader(load_tokenizer("none", 100), 64, SupervisedOptions())
    with pytest.raises(UserError, match=r"dataset\.chat_template=/nowhere does not exist"):
        one({"messages": [user("Hi")]}, chat_template="/nowhere")


def test_a_data_set_of_the_datasets_package(tmp_path: Path) -> None:
    """A local folder stands for the hub: the package reads both alike."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    write(tmp_path / "train.jsonl", [{"q": f"{i} + 1 =", "a": str(i + 1)} for i in range(8)])
    options = SupervisedOptions(name=str(tmp_path), columns={"input": "q", "output": "a"}, val_proportion=0.25)
    found = load_supervised(BYTES, 64, options, lambda line: None)
    assert sorted(learnt(s) for part in found.values() for s in part) == sorted(f" {i + 1}" for i in range(8))
    assert len(found["valid"]) == 2
    with pytest.raises(UserError, match=r"dataset\.name=/nowhere/at/all .*could not be loaded.*dataset\.path"):
        load_supervised(BYTES, 64, SupervisedOptions(name="/nowhere/at/all"))


def test_only_a_split_that_is_not_there_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple] = []

    def load(name: str, subset: str | None, split: str | None = None) -> dict | list:
        calls.append((name, subset))
        if len(calls) == 2 and name == "lost":
            raise ConnectionError("no route to the hub")
        held = {"test" if name == "untrained" else "train": [{"input": "a", "output": "b"}] * 4}
        return held if split is None else held[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = load_supervised(BYTES, 64, SupervisedOptions(name="x", subset="y"), lambda line: None)
    assert ({k: len(v) for k, v in found.items()}, calls[-1]) == ({"train": 3, "valid": 1}, ("x", "y"))
    for name, message in (
        ("lost", r"dataset\.name=lost \(split validation\) could not be loaded: no route to the hub"),
        ("untrained", "dataset.name=untrained has no train split"),
        ("squad", "dataset.name=rajpurkar/squad has no validation split"),
    ):
        calls.clear()
        with pytest.raises(UserError, match=message):
            load_supervised(BYTES, 64, SupervisedOptions(name=name), lambda line: None)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a record."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))]


def spoilt(record: dict, draw: random.Random) -> dict:
    """The record with one value replaced or left out."""
    record = copy.deepcopy(record)
    path = draw.choice(places(record)[1:])
    holder = functools.reduce(lambda v, k: v[k], path[:-1], record)
    wrong = [None, 7, -1.5, True, "", "text", "<|im_end|>", [], [[]], {}, {"role": "user"}, ["a", 1], {"a": {"b": []}}]
    if draw.random() < 0.2:
        del holder[path[-1]]
    else:
        holder[path[-1]] = draw.choice(wrong)
    return record


def test_a_thousand_spoilt_records_are_read_or_refused_by_place(chat_tokenizer: Tokenizer) -> None:
    """No record, however wrong, ends in another way than a sample, nothing to learn, or an error with its place."""
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {}}}}]
    good = [
        {"input": "2 + 2 =", "output": "4"},
        {"context": "It is wet.", "question": "How is it?", "answers": {"text": ["wet"], "answer_start": [6]}},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {
            "tools": tools,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Call f."},
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "I call it.",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "It is 3.", "weight": 1},
            ],
        },
    ]
    draw, refused = random.Random(0), []
    reader = Reader(chat_tokenizer, 200, SupervisedOptions(on_error="raise"))
    for n in range(1200):
        record = spoilt(good[n % len(good)], draw)
        try:
            sample = reader.sample(record, f"data.jsonl:{n}", Tally())
        except RecordError as error:
            refused.append((str(error), f"data.jsonl:{n}: "))
        else:
            assert sample is None or len(sample.tokens) == len(sample.labels) <= 200
    assert [message for message, place in refused if not message.startswith(place)] == []
    assert len(refused) > 300

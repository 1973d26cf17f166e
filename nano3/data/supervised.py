"""Supervised samples: prompts with answers and conversations, from files or the hub, as tokens and labels.

A sample's labels are already shifted: labels[t] is the token after tokens[t], or IGNORE where nothing is learnt.  What
follows the last thing to learn is left out, since no loss would see it.  An answer is learnt whole or not at all: a
prompt too long for the window is shortened, a conversation ends with its last whole turn, and the tally says how often.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nano3.config import UserError
from nano3.data.chat import ChatFormat, Encoded
from nano3.data.records import Record, RecordError, hub_records, read_jsonl, rename, text_field
from nano3.data.row import IGNORE
from nano3.data.squad import FILES, HUB_ID, squad_file, squad_record
from nano3.data.tokenizer import IdTokenizer, Tokenizer


class Sample(NamedTuple):
    """A document of T tokens."""

    tokens: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64, the token that follows, or IGNORE


@dataclass
class Tally:
    """What became of the records of one split."""

    read: int = 0
    kept: int = 0
    malformed: int = 0  # skipped, with dataset.on_error=skip
    nothing_to_learn: int = 0  # no answer, no assistant turn, or none that fits
    answers_too_long: int = 0  # dropped: the answer alone does not fit dataset.seq_length
    prompts_cut: int = 0  # kept, with a shorter prompt
    turns_cut: int = 0  # kept, without the turns that do not fit
    first_error: str = ""

    def report(self) -> str:
        """One line for the log; it names every way in which text was lost."""
        losses = {
            "malformed": self.malformed,
            "with nothing to learn": self.nothing_to_learn,
            "with answers too long": self.answers_too_long,
        }
        kept = {"prompts shortened": self.prompts_cut, "conversations shortened": self.turns_cut}
        parts = [f"{self.kept:,} samples of {self.read:,} records"]
        parts += [f"dropped {n:,} {what}" for what, n in losses.items() if n]
        parts += [f"{n:,} {what}" for what, n in kept.items() if n]
        return "; ".join(parts) + (f" (the first malformed: {self.first_error})" if self.malformed else "")


class Samples:
    """Samples in two flat arrays of int32: a hundred thousand of them in tens of megabytes."""

    def __init__(self) -> None:
        self._tokens, self._labels, self._ends = array("i"), array("i"), array("q", [0])

    def append(self, sample: Sample) -> None:
        self._tokens.frombytes(sample.tokens.astype(np.int32).tobytes())
        self._labels.frombytes(sample.labels.astype(np.int32).tobytes())
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):  # also what ends a for loop
            raise IndexError(index)
        here = slice(self._ends[index], self._ends[index + 1])
        return Sample(np.array(self._tokens[here], np.int64), np.array(self._labels[here], np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """(number of samples,) int64, in tokens."""
        return np.diff(np.frombuffer(self._ends, np.int64))


def shifted(ids: np.ndarray, learn: np.ndarray) -> Sample | None:
    """(T + 1,) ids and which of them to learn -> a sample of at most T tokens; None if there is nothing to learn."""
    targets = learn[1:].nonzero()[0]  # nothing predicts the first id
    if len(targets) == 0:
        return None
    end = int(targets[-1]) + 1
    return Sample(ids[:end], np.where(learn[1 : end + 1], ids[1 : end + 1], IGNORE))


def prompt_answer(
    tokenizer: Tokenizer, prompt: str, answer: str, seq_length: int, tally: Tally, truncation: str = "right"
) -> Sample | None:
    """Learn " answer" and the end of the document after `prompt`.  None, and counted, if that cannot be.

    Neither text's control tokens mean anything.  A prompt that does not fit loses its `truncation` side, left or right.
    """
    if not answer.strip():
        tally.nothing_to_learn += 1
        return None
    said = [*tokenizer.encode(" " + answer, special=False), tokenizer.eod]
    asked = tokenizer.encode(prompt, special=False)
    room = seq_length + 1 - len(said)  # the last id is only ever a label
    if room < 1:
        tally.answers_too_long += 1
        return None
    if len(asked) > room:
        tally.prompts_cut += 1
        asked = asked[:room] if truncation == "right" else asked[-room:]
    learn = np.arange(len(asked) + len(said)) >= len(asked)
    return shifted(np.array([*asked, *said], np.int64), learn)


def chat_sample(encoded: Encoded, seq_length: int, tally: Tally, whole_turns: bool = True) -> Sample | None:
    """As much of a conversation as fits, to the end of a learnt turn.  None, and counted, if none fits.

    whole_turns=False cuts anywhere, for conversations that are learnt in full, where no turn is another's context.
    """
    ids, learn = encoded
    size = seq_length + 1
    if len(ids) > size:
        lost = learn[size:].any()
        if whole_turns and learn[size] and learn[size - 1]:  # inside a turn: unlearn its beginning
            before = (~learn[:size]).nonzero()[0]
            learn = learn & (np.arange(len(learn)) <= (before[-1] if len(before) else -1))
        ids, learn = ids[:size], learn[:size]
        if lost:
            if learn[1:].any():
                tally.turns_cut += 1
            else:
                tally.answers_too_long += 1
                return None
    sample = shifted(ids, learn)
    tally.nothing_to_learn += sample is None
    return sample


PROMPT, CONVERSATION = {"input", "output"}, {"messages", "tools"}  # fields of the two forms that have columns


@dataclass(frozen=True, kw_only=True)
class SupervisedOptions:
    """Which data, and how it becomes samples.  Names are those of the settings dataset.NAME."""

    name: str = "squad"  # squad, or any id of the datasets package
    path: str | None = None  # a .jsonl, a .json of SQuAD's, or a folder with a file for each split; None: the hub
    subset: str | None = None  # the configuration of a hub data set that has several
    columns: dict[str, str] = field(default_factory=dict)  # input, output or messages -> the column that holds it
    loss_mode: str = "assistant"  # of conversations: assistant, last_turn or full
    chat_template: str | None = None  # the path of a Jinja file; None: the tokenizer's own
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    truncation: str = "right"  # which side of a prompt is cut when it does not fit
    on_error: str = "raise"  # a malformed record ends the run, or skip: is counted and passed over
    val_proportion: float = 0.1  # held out where the data brings no validation split
    seed: int = 5678

    def validate(self) -> None:
        """Raise UserError on a value that means nothing."""
        for name, allowed in (("truncation", ("left", "right")), ("on_error", ("raise", "skip"))):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"dataset.{name}={value} is unknown; use {' or '.join(allowed)}")
        if not 0 <= self.val_proportion < 1:
            raise UserError(f"dataset.val_proportion={self.val_proportion} must be at least 0 and below 1")
        given = set(self.columns)
        if unknown := sorted(given - PROMPT - CONVERSATION):
            raise UserError(f"dataset.columns has the unknown fields {unknown}; use input, output, messages and tools")
        if empty := [field for field, column in self.columns.items() if not column]:
            raise UserError(
                f"dataset.columns.{empty[0]}={self.columns[empty[0]]!r} names no column; name one, or drop {empty[0]}"
            )
        if given & PROMPT and given & CONVERSATION:
            raise UserError(
                f"dataset.columns={self.columns} maps both prompts (input, output) and conversations (messages, "
                "tools); a record is learnt as one of them: drop the other"
            )


Places = Iterator[tuple[str, Record | RecordError]]
NAMES = {"train": ("training", "train"), "validation": ("validation", "valid", "val", "dev")}  # the first is NVIDIA's


def open_split(options: SupervisedOptions, split: str) -> Places | None:
    """The records of `train` or `validation`; None if the data has no validation split of its own."""
    if options.path is None:
        return _open_hub(options, split)
    path = Path(options.path)
    if path.is_dir():
        found = [f for n in NAMES[split] if (f := path / f"{n}.jsonl").is_file()] or sorted(path.glob(FILES[split]))
        if found:
            return open_file(found[0])
        if split == "validation":
            return None
        raise UserError(
            f"dataset.path={path}: the folder has neither training.jsonl nor train-v*.json; "
            "name the file, or rename it to one of these"
        )
    if split == "validation":
        return None
    if not path.is_file():
        raise UserError(f"dataset.path={path} does not exist; give a .jsonl, SQuAD's .json, or a folder of them")
    return open_file(path)


def open_file(path: Path) -> Places:
    """JSON lines or SQuAD's JSON, by the file's name."""
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".json":
        return squad_file(path)
    raise UserError(f"dataset.path={path}: the file's name must end in .jsonl or, for SQuAD's own format, in .json")


def _open_hub(options: SupervisedOptions, split: str) -> Places | None:
    name = HUB_ID if options.name == "squad" else options.name
    records = hub_records(name, options.subset, split)
    if records is None and (split == "train" or options.name == "squad"):
        raise UserError(f"dataset.name={name} has no {split} split; give another data set, or files by dataset.path")
    return records


class Reader:
    """Records to samples.  The form of a record is what dataset.columns maps, or else is told from its fields."""

    def __init__(self, tokenizer: Tokenizer, seq_length: int, options: SupervisedOptions) -> None:
        options.validate()
        if isinstance(tokenizer, IdTokenizer):
            raise UserError("tokenizer.tokenizer_model=none: supervised data is text and needs a tokenizer; try bytes")
        self.tokenizer, self.seq_length, self.options = tokenizer, seq_length, options
        self._chat: ChatFormat | None = None

    def sample(self, record: Record, place: str, tally: Tally) -> Sample | None:
        """Raises RecordError if the record is malformed."""
        o = self.options
        if o.columns:
            record = rename(record, o.columns, place)
        asked = PROMPT & set(o.columns)
        if not asked and ({"messages", "conversations"} & set(record) or o.columns):
            return chat_sample(self.chat.encode(record, place), self.seq_length, tally, o.loss_mode != "full")
        if not asked and "input" not in record and {"context", "question", "answers"} <= set(record):
            record = squad_record(record, place)
        if not PROMPT & set(record):
            raise RecordError(
                f"{place}: expected 'input' and 'output', or 'messages', or SQuAD's fields; there are "
                f"{', '.join(map(repr, record)) or 'none'}.  dataset.columns maps others to these"
            )
        prompt, answer = (text_field(record, f, place) for f in ("input", "output"))
        return prompt_answer(self.tokenizer, prompt, answer, self.seq_length, tally, o.truncation)

    @property
    def chat(self) -> ChatFormat:
        if self._chat is None:  # only conversations need a template
            o, template = self.options, None
            if o.chat_template is not None:
                if not Path(o.chat_template).is_file():
                    raise UserError(f"dataset.chat_template={o.chat_template} does not exist; give a Jinja file")
                template = Path(o.chat_template).read_text(encoding="utf-8")
            self._chat = ChatFormat(self.tokenizer, template, o.loss_mode, o.chat_template_kwargs)
        return self._chat

    def read(self, records: Places, tally: Tally) -> Iterator[Sample]:
        """The samples of `records`.  A malformed record is raised, or counted, as dataset.on_error says."""
        for place, record in records:
            tally.read += 1
            try:
                if isinstance(record, RecordError):
                    raise record
                sample = self.sample(record, place, tally)
            except RecordError as error:
                if self.options.on_error == "raise":
                    raise RecordError(f"{error} (dataset.on_error=skip passes over such records)") from None
                tally.malformed += 1
                tally.first_error = tally.first_error or str(error)
                continue
            if sample is not None:
                tally.kept += 1
                yield sample


def load_supervised(
    tokenizer: Tokenizer,
    seq_length: int,
    options: SupervisedOptions,
    log: Callable[[str], None] = print,
    valid: bool = True,
) -> dict[str, Samples]:
    """The samples of `train` and, if `valid`, of `valid`, tokenized; `log` gets a line about each.

    What is held out does not depend on `valid`: a run without evaluation trains on what one with it trains on.
    Raises UserError if the data is not there or no sample is left.
    """
    reader = Reader(tokenizer, seq_length, options)
    found: dict[str, Samples] = {}
    train, validation = (open_split(options, split) for split in ("train", "validation"))
    for split, records in (("train", train), ("valid", validation if valid else None)):
        if records is None:
            continue
        tally = Tally()
        found[split] = collect(reader.read(records, tally))
        log(f"{split}: {tally.report()}")
        if not len(found[split]):
            raise UserError(
                f"dataset.path={options.path or options.name}: no sample is left for {split} ({tally.report()}); "
                "look at dataset.seq_length and at the form of the records"
            )
    if validation is None:
        found["train"], held = hold_out(found["train"], options.val_proportion, options.seed)
        if valid or len(held):
            log(f"valid: {len(held):,} samples held out of train, by dataset.val_proportion")
        if valid:
            found["valid"] = held
    return found


def collect(samples: Iterable[Sample]) -> Samples:
    store = Samples()
    for sample in samples:
        store.append(sample)
    return store


def hold_out(samples: Samples, proportion: float, seed: int) -> tuple[Samples, Samples]:
    """The samples in two parts, the second with about `proportion` of them, at least one if there are two."""
    n = len(samples)
    count = min(n - 1, max(1, round(n * proportion))) if proportion else 0
    chosen = set(np.random.default_rng([seed, n]).permutation(n)[:count].tolist())
    parts = ([i for i in range(n) if (i in chosen) == held] for held in (False, True))
    train, valid = (collect(samples[i] for i in part) for part in parts)
    return train, valid

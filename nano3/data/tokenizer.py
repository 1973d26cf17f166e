"""Text to ids and back, behind one small interface: bytes, bare ids, Hugging Face, tiktoken or SentencePiece files.

Control tokens, such as the end of a turn, are ids with a written form.  Whether that form in a text *means* the token
is the caller's to say: in a document or a prompt it does (`special=True`, as NVIDIA's preprocessing has it), in what a
user typed into a chat it does not (`special=False`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nano3.config import UserError
from nano3.data.tiktoken_vocab import END_TOKENS, NVIDIA, TiktokenOptions, load_nvidia, load_openai

ACCEPTED = (
    "give 'bytes', a Hugging Face folder, id or tokenizer.json, NVIDIA's tiktoken vocabulary JSON, "
    "an OpenAI .tiktoken file or a SentencePiece .model"
)


class Tokenizer(Protocol):
    vocab_size: int  # one more than the largest id
    eod: int  # the id that ends a document
    stop_ids: tuple[int, ...]  # ids that end a generated text
    specials: dict[str, int]  # control tokens: their written form -> id
    chat_template: str | None  # the Jinja text that came with the tokenizer
    named: dict[str, str]  # what a template may ask for by name: bos_token, eos_token, ...

    def encode(self, text: str, special: bool = True) -> list[int]:
        """special: whether control tokens written in `text` become their ids, or stay text like any other."""
        ...

    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """One id per byte of UTF-8.  Text holds no NUL byte, so 0 ends a document."""

    vocab_size, eod, stop_ids = 256, 0, (0,)
    specials: ClassVar[dict[str, int]] = {}
    named: ClassVar[dict[str, str]] = {}
    chat_template: str | None = None

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i != self.eod).decode(errors="replace")


class IdTokenizer:
    """No text at all: ids written as numbers, for mock data."""

    eod, stop_ids = 0, ()
    chat_template: str | None = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.specials: dict[str, int] = {}
        self.named: dict[str, str] = {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            raise UserError(f"prompt {text!r}: this model has no tokenizer; write token ids, e.g. '7 10 13'") from None
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise UserError(f"prompt: the ids {bad} lie outside the vocabulary of {self.vocab_size}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class HuggingFaceTokenizer:
    """A tokenizer of the transformers package.  No code from the folder is ever run."""

    def __init__(self, path: str) -> None:
        try:
            from transformers import AutoTokenizer, PreTrainedTokenizerFast

            file = Path(path)
            if file.is_file():
                self._inner = PreTrainedTokenizerFast(tokenizer_file=str(file))
            else:
                self._inner = AutoTokenizer.from_pretrained(
                    path, trust_remote_code=False, local_files_only=file.exists()
                )
            self._inner.model_max_length = 1 << 40  # documents are cut later, and without its warning
            added = self._inner.added_tokens_decoder
            # Runs of spaces are added tokens too in some vocabularies; only what can be seen controls anything.
            self.specials = {t.content: i for i, t in added.items() if t.special or not t.content.isspace()}
            self._plain = self._without_specials()
        except Exception as error:  # the package raises a dozen kinds, each of which means: not a tokenizer
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"tokenizer.tokenizer_model={path}: no tokenizer could be read there ({reason}); {ACCEPTED}"
            ) from None
        self.vocab_size = max([len(self._inner) - 1, *self.specials.values()]) + 1
        self.eod = next((i for i in (self._inner.eos_token_id, self._inner.pad_token_id) if i is not None), 0)
        self.stop_ids = tuple(sorted({self.eod, *(i for s, i in self.specials.items() if s in END_TOKENS)}))
        self.named = {k: v for k, v in self._inner.special_tokens_map.items() if isinstance(v, str)}
        template = self._inner.chat_template
        self.chat_template = template.get("default") if isinstance(template, dict) else template

    def _without_specials(self) -> Callable[[str], list[int]]:
        """The same tokenizer, to which no written control token is anything but text.

        transformers' own switch for it (split_special_tokens) leaves added tokens alone that are not marked special,
        <think> and <tool_call> among them, so this works on a copy that does not know them.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        if not hasattr(self._inner, "backend_tokenizer"):  # one written in Python
            return lambda text: self._inner.encode(text, add_special_tokens=False, split_special_tokens=True)
        spec = json.loads(self._inner.backend_tokenizer.to_str())
        spec |= {"post_processor": None, "truncation": None, "padding": None}
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in self.specials]
        plain = Backend.from_str(json.dumps(spec))
        # Some vocabularies write a space in front of the text's first word only.  This stands in for the control token
        # that precedes a piece of chat, so that no piece is a first one.
        guard = "\U0010fffd\U0010fffd"
        plain.add_special_tokens([AddedToken(guard, normalized=False)])
        true_id = {plain.token_to_id(t["content"]): t["id"] for t in spec["added_tokens"]}
        return lambda text: [true_id.get(i, i) for i in plain.encode(guard + text, add_special_tokens=False).ids[1:]]

    def encode(self, text: str, special: bool = True) -> list[int]:
        if special:
            return self._inner.encode(text, add_special_tokens=False)
        return as_text(self._plain, text, self.specials, self._inner.unk_token_id)

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids, clean_up_tokenization_spaces=False)


class SentencePieceTokenizer:
    """A SentencePiece model, through its package."""

    chat_template: str | None = None

    def __init__(self, path: str) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                f"tokenizer.tokenizer_model={path} looks like a SentencePiece model; pip install sentencepiece"
            ) from None
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"tokenizer.tokenizer_model={path}: not a SentencePiece model ({error}); {ACCEPTED}"
            ) from None
        self.vocab_size = self._inner.get_piece_size()
        # The package does not say which pieces its user defined; those that control anything are written in brackets.
        pieces = {i: self._inner.id_to_piece(i) for i in range(self.vocab_size) if not self._inner.is_byte(i)}
        pieces.pop(self._inner.unk_id(), None)
        self.specials = {p: i for i, p in pieces.items() if self._inner.is_control(i) or re.fullmatch("<.+>", p)}
        ids = {"bos_token": self._inner.bos_id(), "eos_token": self._inner.eos_id(), "pad_token": self._inner.pad_id()}
        self.named = {k: self._inner.id_to_piece(i) for k, i in ids.items() if i >= 0}
        eos = self._inner.eos_id()
        self.eod = eos if eos >= 0 else max(self._inner.pad_id(), 0)
        self.stop_ids = tuple(sorted({self.eod, *(i for s, i in self.specials.items() if s in END_TOKENS)}))

    def encode(self, text: str, special: bool = True) -> list[int]:
        if special:
            return [i for piece in cut(text, self.specials) for i in self._piece(piece)]
        return as_text(self._inner.encode, text, self.specials, self._inner.unk_id())

    def _piece(self, piece: str | int) -> list[int]:
        return [piece] if isinstance(piece, int) else self._inner.encode(piece)

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode([i for i in ids if i < self.vocab_size])


def cut(text: str, specials: dict[str, int]) -> list[str | int]:
    """`text` as its pieces between control tokens, and the ids of these; where two fit, the longer one is meant."""
    if not specials:
        return [text] if text else []
    pieces = re.split(f"({pattern_of(specials)})", text)
    return [specials[p] if i % 2 else p for i, p in enumerate(pieces) if p]


def pattern_of(strings: Iterable[str]) -> str:
    """A regular expression for any of `strings`, the longer ones first."""
    return "|".join(map(re.escape, sorted(strings, key=lambda s: (-len(s), s))))


def as_text(encode: Callable[[str], list[int]], text: str, specials: dict[str, int], unknown: int | None) -> list[int]:
    """encode(text), without the id of any control token but the unknown one.

    A vocabulary may hold a control token's written form as an ordinary piece as well.  Then the form is taken apart.
    """
    forbidden = set(specials.values()) - {unknown}
    ids = encode(text)
    if forbidden.isdisjoint(ids):
        return ids
    pieces = re.split(f"({pattern_of(specials)})", text)
    parts = [part for n, piece in enumerate(pieces) for part in (piece if n % 2 else [piece]) if part]
    return [i for part in parts for i in encode(part) if i not in forbidden]


def load_tokenizer(name: str, model_vocab: int, options: TiktokenOptions = NVIDIA) -> Tokenizer:
    """`bytes`, `none` (bare ids), or a file, folder or hub id, told apart by content; `options` are for tiktoken files.

    Raises UserError if there is no tokenizer, its package is missing, its ids do not fit the model's vocabulary, or it
    has no use for one of the options.
    """
    kind, path = _find(name)
    for option, value in vars(options).items():
        if value != getattr(NVIDIA, option) and option not in TAKES.get(kind, ()):
            files = " or ".join(FILES[k] for k, taken in TAKES.items() if option in taken)
            shown = list(value) if isinstance(value, tuple) else value
            raise UserError(
                f"tokenizer.{option}={shown} is for {files}, which tokenizer.tokenizer_model={name} is not: drop it"
            )
    if kind == "none":
        return IdTokenizer(model_vocab)
    tokenizer = ByteTokenizer() if kind == "bytes" else OPENERS[kind](path, options)
    if tokenizer.vocab_size > model_vocab:
        raise UserError(
            f"tokenizer.tokenizer_model={name}: its {tokenizer.vocab_size} ids exceed model.vocab_size={model_vocab}; "
            f"set model.vocab_size={-(-tokenizer.vocab_size // 128) * 128} or choose another tokenizer"
        )
    return tokenizer


def usable(name: str, options: TiktokenOptions) -> TiktokenOptions:
    """Those of the options that the tokenizer has a use for; the defaults in place of the others."""
    kind, _ = _find(name)
    return TiktokenOptions(**{k: v for k, v in vars(options).items() if k in TAKES.get(kind, ())})


def _find(name: str) -> tuple[str, str]:
    """`bytes`, `none` or which of OPENERS a name is for, and what that is to open."""
    if name in ("bytes", "none"):
        return name, name
    path = Path(name)
    if path.is_dir():
        if not any((path / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
            found = [f for f in sorted(path.iterdir()) if f.is_file() and kind_of(f) is not None]
            if len(found) == 1:
                return kind_of(found[0]), str(found[0])
            if len(found) > 1:
                raise UserError(
                    f"tokenizer.tokenizer_model={name}: the folder holds several tokenizers "
                    f"({', '.join(f.name for f in found)}); name the file"
                )
        return "hugging face", name
    if not path.exists():
        return "hugging face", name
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"tokenizer.tokenizer_model={name}: no tokenizer could be read there (neither JSON, nor lines of base64 "
            f"and rank, nor a SentencePiece model); {ACCEPTED}"
        )
    return kind, name


OPENERS: dict[str, Callable[[str, TiktokenOptions], Any]] = {
    "hugging face": lambda path, options: HuggingFaceTokenizer(path),
    "nvidia": lambda path, options: load_nvidia(Path(path), options),
    "openai": lambda path, options: load_openai(Path(path), options),
    "sentencepiece": lambda path, options: SentencePieceTokenizer(path),
}
TAKES = {  # the options that a kind of file leaves open
    "nvidia": ("pattern", "special_tokens", "num_special_tokens", "vocab_size"),
    "openai": ("pattern", "special_tokens"),
}
FILES = {"nvidia": "NVIDIA's vocabulary JSON", "openai": "an OpenAI .tiktoken file"}


def kind_of(path: Path) -> str | None:
    """Which of OPENERS a file is for, from its first bytes; None: for none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(4096)
    if re.match(rb"\s*\[\s*\{[^{}]*\"(rank|token_bytes)\"", head):
        return "nvidia"
    if re.match(rb"\s*\{", head):
        whole = path.read_bytes()
        return "hugging face" if b'"model"' in whole and b'"vocab"' in whole else None
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|\Z)", head):
        return "openai"
    # A protobuf whose first field is a message (0x0a, length) that begins with a string (0x0a, length): a piece.
    if re.match(rb"\x0a[\x01-\x7f]\x0a[\x01-\x7f]", head):
        return "sentencepiece"
    return None

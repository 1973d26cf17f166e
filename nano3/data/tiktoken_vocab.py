"""Byte-pair vocabularies for the tiktoken package: NVIDIA's JSON file and OpenAI's `.tiktoken` ranks.

Both say the same thing, which bytes make a token and in which order pairs merge; neither says how text is cut into
words before that, nor which control tokens there are.  So those two are settings here.  In NVIDIA's form control tokens
take the first ids, `<unk> <s> </s> ...` and then `<SPECIAL_7>` to `<SPECIAL_999>`, and id = rank + 1000; in OpenAI's
they follow the ranks.  Nothing is downloaded: the package's own named encodings are not used.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path

from nano3.config import UserError

# How text is cut before pairs merge.  v1 and v2 are the two that NVIDIA's option knows: v2 splits a word where a
# capital follows a small letter.  A digit stands alone in both; cl100k and o200k keep up to three together.  These are
# the formats' definitions, to the letter: another pattern gives other tokens.
_CAPS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"\s+(?!\S)|\s+"
PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|" + _SPACE,
    "v2": rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPS}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPS}+{_SMALL}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|" + _SPACE,
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACE,
    "cl100k": rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    + _SPACE,
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPS}*{_SMALL}+{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_CAPS}+{_SMALL}*{_SUFFIX}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|" + _SPACE,
}
NVIDIA_SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
OPENAI_FILES = {  # number of ranks -> pattern, control tokens
    50256: ("gpt2", {"<|endoftext|>": 50256}),
    100256: ("cl100k", {"<|endoftext|>": 100257, "<|endofprompt|>": 100276}),
    199998: ("o200k", {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


@dataclass(frozen=True, kw_only=True)
class TiktokenOptions:
    """What the vocabulary files leave open; the defaults are NVIDIA's.

    pattern: a name in PATTERNS; None: v2 for NVIDIA's file, and for OpenAI's the one that belongs to its size.
    special_tokens: the first control tokens; None: NVIDIA_SPECIALS, or for OpenAI's ranks what belongs to their number.
    num_special_tokens: ids before the first rank.  vocab_size: ranks are cut so that all ids stay below it.  Both are
    for NVIDIA's file only.
    """

    pattern: str | None = None
    special_tokens: tuple[str, ...] | None = None
    num_special_tokens: int = 1000
    vocab_size: int = 131072


NVIDIA = TiktokenOptions()


class TiktokenTokenizer:
    """tiktoken over a vocabulary of one's own.

    ranks: bytes -> id, smaller ids merge first, all 256 single bytes among them.  specials: control token -> id.
    """

    chat_template: str | None = None

    def __init__(self, name: str, ranks: dict[bytes, int], specials: dict[str, int], pattern: str, eod: int) -> None:
        try:
            import tiktoken
        except ImportError:
            raise UserError(
                f"tokenizer.tokenizer_model={name}: this vocabulary needs the tiktoken package; pip install tiktoken"
            ) from None
        self.specials, self.eod = specials, eod
        self.named = {n: s for n, s in (("bos_token", "<s>"), ("pad_token", "<pad>")) if s in specials}
        self.named["eos_token"] = next(s for s, i in specials.items() if i == eod)
        self.vocab_size = max(*ranks.values(), *specials.values()) + 1
        self._bpe = tiktoken.Encoding(
            name, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=dict(specials)
        )
        self._bytes = {i: b for b, i in ranks.items()} | {i: s.encode() for s, i in specials.items()}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(sorted({self.eod, *(i for s, i in self.specials.items() if s in END_TOKENS)}))

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self._bpe.encode(text, allowed_special="all") if special else self._bpe.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """Ids that have no token, as a model with a padded vocabulary may sample, become U+FFFD."""
        return b"".join(self._bytes.get(i, b"\xef\xbf\xbd") for i in ids).decode(errors="replace")


END_TOKENS = ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")  # whichever a vocabulary has end a text or a turn


def load_nvidia(path: Path, options: TiktokenOptions = NVIDIA) -> TiktokenTokenizer:
    """The tokenizer of NVIDIA's vocabulary JSON: [{"rank": 0, "token_bytes": base64, "token_str": ...}, ...].

    Raises UserError, naming file and entry, on anything that is not such a list in the order of its ranks.
    """
    setting = f"tokenizer.tokenizer_model={path}"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{setting}: not a JSON file ({error})") from None
    if not isinstance(entries, list):
        raise UserError(f"{setting}: expected a list of tokens, found {type(entries).__name__}")
    given = NVIDIA_SPECIALS if options.special_tokens is None else options.special_tokens
    count = options.num_special_tokens
    if len(given) > count or len(set(given)) < len(given) or "</s>" not in given:
        raise UserError(
            f"tokenizer.special_tokens={list(given)}: give at most tokenizer.num_special_tokens={count} different "
            "ones, with '</s>', which ends a document, among them"
        )
    if options.vocab_size - count < 256:
        raise UserError(
            f"tokenizer.vocab_size={options.vocab_size} leaves no room for 256 bytes after "
            f"tokenizer.num_special_tokens={count}; raise it"
        )
    names = [*given, *(f"<SPECIAL_{i}>" for i in range(len(given), count))]
    ranks: dict[bytes, int] = {}
    for i, entry in enumerate(entries[: options.vocab_size - count]):
        try:
            rank, token = entry["rank"], base64.b64decode(entry["token_bytes"], validate=True)
        except (TypeError, KeyError, binascii.Error) as error:
            raise UserError(f"{setting}: entry {i} is no token ({type(error).__name__}: {error})") from None
        if rank != i:
            raise UserError(f"{setting}: entry {i} has rank {rank}; the list must be in the order of its ranks, from 0")
        _add(ranks, token, rank, count, f"{setting}: entry {i}")
    _need_bytes(ranks, setting)
    specials = {s: i for i, s in enumerate(names)}
    return TiktokenTokenizer(path.stem, ranks, specials, _pattern(options.pattern or "v2"), specials["</s>"])


def load_openai(path: Path, options: TiktokenOptions = NVIDIA) -> TiktokenTokenizer:
    """The tokenizer of a `.tiktoken` file: lines of a token in base64 and its rank.

    The three published sizes bring their pattern and control tokens; for others `options.pattern` must be given, and
    `options.special_tokens` (default: <|endoftext|>) take the ids after the last rank, the first of them the eod.
    """
    setting = f"tokenizer.tokenizer_model={path}"
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            written, number_of = line.split()
            token, rank = base64.b64decode(written, validate=True), int(number_of)
        except (ValueError, binascii.Error):
            raise UserError(f"{setting}:{number}: expected a token in base64, rank; found {line[:40]!r}") from None
        _add(ranks, token, rank, 0, f"{setting}:{number}")
    _need_bytes(ranks, setting)
    known = OPENAI_FILES.get(len(ranks))
    if known is None and options.pattern is None:
        raise UserError(
            f"{setting}: {len(ranks)} ranks are none of the published vocabularies, so how it cuts text must be said: "
            f"set tokenizer.pattern to one of {', '.join(PATTERNS)}"
        )
    if options.special_tokens == ():
        raise UserError("tokenizer.special_tokens=[]: the first of them ends a document: name it, or drop the setting")
    if options.special_tokens or known is None:
        first = max(ranks.values()) + 1
        specials = {s: first + i for i, s in enumerate(options.special_tokens or ("<|endoftext|>",))}
    else:
        specials = known[1]
    pattern = _pattern(options.pattern or known[0])
    return TiktokenTokenizer(path.stem, ranks, specials, pattern, next(iter(specials.values())))


def _add(ranks: dict[bytes, int], token: bytes, rank: int, offset: int, where: str) -> None:
    if not token or token in ranks:
        raise UserError(f"{where}: the token {token!r} is {'there twice' if token else 'empty'}")
    ranks[token] = rank + offset  # a constant added to all ranks leaves the order of merges as it is


def _need_bytes(ranks: dict[bytes, int], setting: str) -> None:
    if missing := [i for i in range(256) if bytes([i]) not in ranks]:
        raise UserError(
            f"{setting}: {len(missing)} of the 256 single bytes are missing (the first is {missing[0]}), "
            "so not every text could be encoded; is the file complete?"
        )


def _pattern(name: str) -> str:
    if name not in PATTERNS:
        raise UserError(f"tokenizer.pattern={name} is unknown; use one of {', '.join(PATTERNS)}")
    return name

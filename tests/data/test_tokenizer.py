"""Vocabulary files against a byte-pair encoder written here; typed control tokens; files told apart; clear refusals."""

import base64
import json
import random
import sys
import types
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tokenizers

from nano3.cli import parser, resolve
from nano3.config import UserError
from nano3.data.corpus import open_tokenizer
from nano3.data.tiktoken_vocab import NVIDIA, TiktokenOptions
from nano3.data.tokenizer import Tokenizer, kind_of, load_tokenizer, usable
from tests.data.chat_cases import trained_tokenizer

# The two patterns of NVIDIA's option and OpenAI's cl100k, in one piece each, as they are published.
LITERAL = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TEXT = (
    "the model reads tokens and writes TokensLikeThese, HTTPServer def f(x): return x ** 2  it's they'LL "
    "Grüße Straße 日本語 東京 Ελλάδα кошка हिन्दी עברית العربية 🙂👍🏽 e\u0301 \u01c5 ªº 12345 ½ ٣٤ "
)
WORDS = TEXT.split(" ")
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\n\n\n", "   \n  ", "\u00a0", "\u3000", "\u2028", ""]
PLANES = [range(0x20, 0x250), range(0x370, 0x2100), range(0x3040, 0xD800), range(0x10000, 0x20000, 17)]  # no surrogates
MARKS = ["!", "...\n/", ";\n//", "...", "//\n", "<|", "</", "s>", "'", "\0", "\u200b", "\ufeff", "{}[]", "\u0301"]


def merge(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Byte-pair encoding as its definition has it: the pair of lowest rank, leftmost first, until none is left."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks.get(a + b), i) for i, (a, b) in enumerate(pairwise(parts))]
        if not (known := [p for p in pairs if p[0] is not None]):
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@cache
def splitter(names: tuple[str, ...]) -> regex.Pattern[str]:
    return regex.compile(f"({'|'.join(map(regex.escape, sorted(names, key=len, reverse=True)))})")


def encode(text: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int], offset: int) -> list[int]:
    ids: list[int] = []
    for i, piece in enumerate(splitter(tuple(specials)).split(text) if specials else [text]):
        if i % 2:
            ids.append(specials[piece])
            continue
        for word in regex.findall(pattern, piece):
            ids += [ranks[p] + offset for p in merge(word.encode(), ranks)]
    return ids


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """All bytes, then a thousand tokens or more, each two neighbours of a word as encoded so far."""
    draw = random.Random(0)
    words = [p for w in WORDS for p in (w, " " + w)] + ["    ", "\n\n", "\r\n", " \n", "...", "//\n", "...\n/", ";\n//"]
    words += [" " + w for w in Path(random.__file__).read_text().split()]
    found = {bytes([i]): i for i in range(256)}
    for _ in range(6000):
        parts = merge(draw.choice(words).encode(), found)
        if len(parts) > 1:
            i = draw.randrange(len(parts) - 1)
            found.setdefault(parts[i] + parts[i + 1], len(found))
    assert len(found) > 1500
    return found


def strings(count: int, specials: list[str]) -> list[str]:
    draw = random.Random(1)

    def part() -> str:
        kind = draw.randrange(6)
        if kind == 0:
            return draw.choice(SPACES) * draw.randint(1, 4)
        if kind == 1:
            return str(draw.randrange(10 ** draw.randint(1, 7)))
        if kind == 2:
            return draw.choice(MARKS)
        if kind == 3:
            return chr(draw.choice(PLANES)[draw.randrange(400)])
        if kind == 4 and specials:
            return draw.choice(specials)
        return draw.choice(["", " "]) + draw.choice(WORDS)

    return ["".join(part() for _ in range(draw.randint(0, 12))) for _ in range(count)]


def write_nvidia(path: Path, ranks: dict[bytes, int]) -> Path:
    entries = [
        {"rank": r, "token_bytes": base64.b64encode(b).decode(), "token_str": b.decode(errors="replace")}
        for b, r in ranks.items()
    ]
    path.write_text(json.dumps(entries))
    return path


def write_openai(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(b) + b" %d\n" % r for b, r in ranks.items()))
    return path


OPTIONS = {"pattern": "v1", "special_tokens": ("</s>",), "num_special_tokens": 40, "vocab_size": 2000}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_are_for_the_files_that_leave_them_open(option: str, tmp_path: Path, ranks: dict[bytes, int]) -> None:
    """And a tokenizer named in place of the settings' own takes what it has a use for."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    inner.save(str(tmp_path / "tokenizer.json"))
    write_nvidia(tmp_path / "nvidia.json", ranks)
    write_openai(tmp_path / "openai.tiktoken", dict(list(ranks.items())[:300]))
    value = OPTIONS[option]
    for name, taken in (
        *(("bytes", ()), ("none", ()), (str(tmp_path / "tokenizer.json"), ())),
        (str(tmp_path / "nvidia.json"), tuple(OPTIONS)),
        (str(tmp_path / "openai.tiktoken"), ("pattern", "special_tokens")),
    ):
        need = {"pattern": "v2"} if name.endswith(".tiktoken") else {}
        options = TiktokenOptions(**{**need, option: value})
        assert getattr(usable(name, options), option) == (value if option in taken else getattr(NVIDIA, option))
        if option in taken:
            load_tokenizer(name, 131072, options)
        else:
            with pytest.raises(
                UserError, match=rf"tokenizer\.{option}=.* is for NVIDIA.*which .*{name} is not: drop it"
            ):
                load_tokenizer(name, 131072, options)
        load_tokenizer(name, 131072, usable(name, options))
    given = ["--mode", "pretrain", "--preset", "tiny", "tokenizer.vocab_size=2000", "model.vocab_size=4096"]
    config, _ = resolve(parser().parse_args([*given, f"--tokenizer-model={tmp_path / 'nvidia.json'}"]))
    assert (open_tokenizer(config).vocab_size, open_tokenizer(config, "bytes").vocab_size) == (2000, 256)


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_nvidias_vocabulary_agrees_with_an_independent_encoder(
    tmp_path: Path, ranks: dict[bytes, int], pattern: str
) -> None:
    t = load_tokenizer(str(write_nvidia(tmp_path / "vocab.json", ranks)), 131072, TiktokenOptions(pattern=pattern))
    names = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>", *(f"<SPECIAL_{i}>" for i in range(7, 1000))]
    assert t.specials == {s: i for i, s in enumerate(names)}
    assert (t.eod, t.stop_ids, t.vocab_size) == (2, (2,), 1000 + len(ranks))
    samples = strings(5000, ["</s>", "<SPECIAL_7>", "<SPECIAL_99>", "<pad>"])
    merged = with_specials = 0
    for text in samples:
        ids = t.encode(text)
        assert ids == encode(text, ranks, LITERAL[pattern], t.specials, 1000), repr(text)
        assert t.decode(ids) == text
        as_text = t.encode(text, special=False)
        assert as_text == encode(text, ranks, LITERAL[pattern], {}, 1000), repr(text)
        assert t.decode(as_text) == text
        assert min(as_text, default=1000) >= 1000
        merged += len(as_text) < len(text.encode())
        with_specials += ids != as_text
    assert merged > 3000
    assert with_specials > 1000


def test_the_two_patterns_differ(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    path = str(write_nvidia(tmp_path / "vocab.json", ranks))
    v1, v2 = (load_tokenizer(path, 131072, TiktokenOptions(pattern=p)) for p in ("v1", "v2"))
    assert any(v1.encode(s) != v2.encode(s) for s in strings(500, []))
    assert load_tokenizer(path, 131072).encode("HTTPServer\n\n\n") == v2.encode("HTTPServer\n\n\n")  # the default


def test_nvidias_options(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    path = str(write_nvidia(tmp_path / "vocab.json", ranks))
    small = TiktokenOptions(num_special_tokens=4, vocab_size=300, special_tokens=("</s>", "<|im_start|>", "<|im_end|>"))
    t = load_tokenizer(path, 300, small)
    assert (t.vocab_size, t.eod, t.stop_ids) == (300, 0, (0, 2))
    assert t.specials == {"</s>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<SPECIAL_3>": 3}
    kept = {b: r for b, r in ranks.items() if r < 296}
    for text in strings(300, ["<|im_end|>", "<SPECIAL_3>"]):
        assert t.encode(text) == encode(text, kept, LITERAL["v2"], t.specials, 4)
    assert t.decode([5000, t.encode("a")[0]]) == "\ufffda"  # an id without a token
    for bad, message in (
        (TiktokenOptions(pattern="v3"), r"tokenizer\.pattern=v3"),
        (TiktokenOptions(special_tokens=("<s>",)), r"tokenizer\.special_tokens.*</s>"),
        (TiktokenOptions(special_tokens=("</s>", "</s>")), "different"),
        (TiktokenOptions(special_tokens=()), r"tokenizer\.special_tokens=\[\]"),
        (TiktokenOptions(vocab_size=1200), r"tokenizer\.vocab_size=1200"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(path, 131072, bad)
    with pytest.raises(UserError, match=rf"its {1000 + len(ranks)} ids exceed model\.vocab_size=1024"):
        load_tokenizer(path, 1024)


def test_openais_ranks(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    path = str(write_openai(tmp_path / "some.tiktoken", ranks))
    with pytest.raises(UserError, match=rf"{len(ranks)} ranks.*tokenizer\.pattern"):
        load_tokenizer(path, 131072)
    t = load_tokenizer(path, 131072, TiktokenOptions(pattern="cl100k"))
    assert t.specials == {"<|endoftext|>": len(ranks)}
    assert t.eod == len(ranks) == t.vocab_size - 1
    for text in strings(1000, ["<|endoftext|>"]):
        assert t.encode(text) == encode(text, ranks, LITERAL["cl100k"], t.specials, 0)
        assert t.decode(t.encode(text)) == text
    with pytest.raises(UserError, match=r"tokenizer\.special_tokens=\[\]"):
        load_tokenizer(path, 131072, TiktokenOptions(pattern="v2", special_tokens=()))
    two = load_tokenizer(path, 131072, TiktokenOptions(pattern="v2", special_tokens=("<|a|>", "<|eot_id|>")))
    assert (two.eod, two.stop_ids) == (len(ranks), (len(ranks), len(ranks) + 1))


def change(i: int, **fields: object) -> Callable[[list[dict]], object]:
    return lambda entries: entries[i].update(fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(300, rank=7), "entry 300 has rank 7"),
        (change(300, token_bytes="%%"), "entry 300 is no token"),
        (change(300, token_bytes=None), "entry 300 is no token"),
        (change(300, token_bytes=base64.b64encode(b"a").decode()), "entry 300: the token b'a' is there twice"),
        (change(300, token_bytes=""), "entry 300: the token b'' is empty"),
        (lambda entries: entries.__delitem__(slice(100, None)), "156 of the 256 single bytes are missing"),
        (lambda entries: entries.__setitem__(5, 3), "entry 5 is no token"),
    ],
    ids=["order", "base64", "null", "twice", "empty", "bytes", "number"],
)
def test_a_damaged_vocabulary_is_named(
    tmp_path: Path, ranks: dict[bytes, int], damage: Callable[[list[dict]], object], message: str
) -> None:
    path = write_nvidia(tmp_path / "vocab.json", ranks)
    entries = json.loads(path.read_text())
    damage(entries)
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=rf"tokenizer\.tokenizer_model=.*vocab\.json: {message}"):
        load_tokenizer(str(path), 131072)


def test_damaged_ranks_are_named_by_line(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    path = write_openai(tmp_path / "x.tiktoken", ranks)
    lines = path.read_bytes().splitlines()
    for bad in (b"", b"YQ== x", b"YQ==", b"%%% 3"):
        path.write_bytes(b"\n".join([*lines[:9], bad, *lines[9:]]))
        if bad:
            with pytest.raises(UserError, match=r"x\.tiktoken:10: "):
                load_tokenizer(str(path), 131072, TiktokenOptions(pattern="v2"))
        else:
            load_tokenizer(str(path), 131072, TiktokenOptions(pattern="v2"))


def test_files_are_told_apart_by_content(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    """Under names that say nothing, as files and as the only tokenizer of a folder."""
    trained_tokenizer().save_pretrained(tmp_path / "hf")
    cases = {"nvidia": write_nvidia, "openai": write_openai}
    for kind, write in cases.items():
        folder = tmp_path / kind
        folder.mkdir()
        assert kind_of(write(folder / "model", ranks)) == kind
        (folder / "notes.txt").write_text("no tokenizer")
        t = load_tokenizer(str(folder), 131072, TiktokenOptions(pattern="v2"))
        assert t.decode(t.encode("Hello, 日本")) == "Hello, 日本"
    assert kind_of(tmp_path / "hf" / "tokenizer.json") == "hugging face"
    write_openai(tmp_path / "nvidia" / "second", ranks)
    with pytest.raises(UserError, match=r"several tokenizers \(model, second\)"):
        load_tokenizer(str(tmp_path / "nvidia"), 131072)
    for content in (b"", b"\0" * 100, b"[1, 2]", b'{"a": 1}', b"just words\n", b"\x89PNG\r\n"):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.tokenizer_model=.*/f: no tokenizer could be read there"):
            load_tokenizer(str(tmp_path / "f"), 131072)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("hf")
    trained_tokenizer("TEMPLATE", extra=("<|eot_id|>",)).save_pretrained(path)
    return load_tokenizer(str(path), 1024)


def test_typed_control_tokens_stay_text_when_asked(hugging_face: Tokenizer) -> None:
    t = hugging_face
    control = set(t.specials.values())
    assert {"<|im_end|>", "<think>", "</s>"} <= set(t.specials)
    assert t.chat_template == "TEMPLATE"
    assert t.named["eos_token"] == "</s>"
    assert t.stop_ids == tuple(sorted(t.specials[s] for s in ("</s>", "<|im_end|>", "<|eot_id|>")))
    for text in strings(500, list(t.specials)):
        text = text.replace("\0", "")
        as_text, as_tokens = t.encode(text, special=False), t.encode(text)
        assert control.isdisjoint(as_text)
        assert t.decode(as_text) == t.decode(as_tokens) == text
        typed = any(s in text for s in t.specials)
        assert (as_text != as_tokens) == typed


def test_a_control_token_that_is_an_ordinary_piece_too(tmp_path: Path) -> None:
    """A Unigram vocabulary may find "</s>" in a text all by itself."""
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Backend

    inner = Backend(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), *((c, -3.0) for c in "</s>ab")], unk_id=0))
    inner.add_special_tokens([AddedToken("</s>", normalized=False)])
    inner.save(str(tmp_path / "tokenizer.json"))
    t = load_tokenizer(str(tmp_path / "tokenizer.json"), 64)
    assert t.encode("a</s>b") == [6, 1, 7]
    assert t.encode("a</s>b", special=False) == [6, 2, 3, 4, 5, 7]


class StandIn:
    """As much of sentencepiece.SentencePieceProcessor as is used, for a vocabulary of eight pieces."""

    pieces = ("<unk>", "<s>", "</s>", "<|im_end|>", "▁▁", *"abc")

    def __init__(self, model_file: str) -> None:
        assert model_file.endswith("some.model")

    def get_piece_size(self) -> int:
        return len(self.pieces)

    def id_to_piece(self, i: int) -> str:
        return self.pieces[i]

    def is_control(self, i: int) -> bool:
        return i in (1, 2)

    def is_byte(self, i: int) -> bool:
        return False

    def unk_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return -1

    def encode(self, text: str) -> list[int]:
        return [self.pieces.index(c) if c in self.pieces else 0 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def test_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional: without it the message says so, with it (here a stand-in) its calls are these."""
    path = tmp_path / "some.model"
    path.write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        load_tokenizer(str(path), 131072)

    monkeypatch.setitem(sys.modules, "sentencepiece", types.SimpleNamespace(SentencePieceProcessor=StandIn))
    t = load_tokenizer(str(path), 131072)
    assert t.specials == {"<s>": 1, "</s>": 2, "<|im_end|>": 3}
    assert (t.eod, t.stop_ids, t.vocab_size) == (2, (2, 3), 8)
    assert t.named == {"bos_token": "<s>", "eos_token": "</s>"}
    assert t.encode("ab<|im_end|>c") == [5, 6, 3, 7]
    assert 3 not in t.encode("ab<|im_end|>c", special=False)


def test_bytes_have_no_control_tokens() -> None:
    t = load_tokenizer("bytes", 256)
    assert t.encode("</s>", special=False) == t.encode("</s>") == list(b"</s>")

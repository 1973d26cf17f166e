"""Text to ids and back, behind one small interface: bytes, bare ids, or a Hugging Face tokenizer from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from nano3.config import UserError


class Tokenizer(Protocol):
    vocab_size: int
    eod: int  # the id that ends a document
    stop_ids: tuple[int, ...]  # ids that end a generated text

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """One id per byte of UTF-8.  Text holds no NUL byte, so 0 ends a document."""

    vocab_size, eod, stop_ids = 256, 0, (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i != self.eod).decode(errors="replace")


class IdTokenizer:
    """No text at all: ids written as numbers, for mock data."""

    eod, stop_ids = 0, ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
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
        except Exception as error:  # the package raises a dozen kinds, each of which means: not a tokenizer
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"tokenizer.tokenizer_model={path}: no tokenizer could be read there ({reason}); "
                "give 'bytes', a folder with tokenizer.json, or the file itself"
            ) from None
        self.vocab_size = len(self._inner)
        self.eod = next((i for i in (self._inner.eos_token_id, self._inner.pad_token_id) if i is not None), 0)
        self.stop_ids = tuple({self.eod, *self._inner.convert_tokens_to_ids(self._end_of_turn())})

    def _end_of_turn(self) -> list[str]:
        return [t for t in ("<|im_end|>",) if t in self._inner.get_vocab()]

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids)


def load_tokenizer(name: str, model_vocab: int) -> Tokenizer:
    """`bytes`, `none` (bare ids), or a path or id for transformers.  Raises UserError if it does not fit the model."""
    if name == "none":
        return IdTokenizer(model_vocab)
    tokenizer = ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)
    if tokenizer.vocab_size > model_vocab:
        raise UserError(
            f"tokenizer.tokenizer_model={name}: its {tokenizer.vocab_size} ids exceed model.vocab_size={model_vocab}; "
            f"set model.vocab_size={-(-tokenizer.vocab_size // 128) * 128} or choose another tokenizer"
        )
    return tokenizer

"""What the model will see: `python -m nano3.data.inspect --mode finetune …`, with the settings of a training command.

Prints rows as text, what is learnt in green (in «» where there are no colours) and documents apart; then how long
documents are, how much of the rows is real and learnt, and, of a blend, what each file gives.
"""

from __future__ import annotations

import itertools
import sys
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from nano3.config import UserError
from nano3.data.blend import BlendedDataset
from nano3.data.row import IGNORE, PADDING, Dataset, Row
from nano3.data.tokenizer import Tokenizer

LEARNT, GIVEN, MARK = "green", "default", "dim cyan"


class Document(NamedTuple):
    """A document of a row, with the last label, which follows its last token.  (n,) each."""

    ids: np.ndarray
    learnt: np.ndarray  # bool


def documents(row: Row) -> list[Document]:
    """The documents of a row in their order, without the padding."""
    numbers = np.zeros(len(row.tokens), np.int64) if row.seq_idx is None else row.seq_idx
    out = []
    for number in dict.fromkeys(numbers[numbers != PADDING].tolist()):
        tokens, labels = row.tokens[numbers == number], row.labels[numbers == number]
        ids, learnt = np.append(tokens, labels[-1]), np.append(False, labels != IGNORE)
        out.append(Document(ids, learnt) if learnt[-1] else Document(ids[:-1], learnt[:-1]))
    return out


def shown(document: Document, tokenizer: Tokenizer, brackets: tuple[str, str] = ("", "")) -> Text:
    """The document as text, what is learnt in another colour and in brackets; an end of document is written out."""
    text = Text()
    kinds = zip(document.learnt.tolist(), (document.ids == tokenizer.eod).tolist(), strict=True)
    ids, before = iter(document.ids.tolist()), False
    for (learnt, end), run in itertools.groupby(kinds):
        piece = [next(ids) for _ in run]
        said = "⟨end⟩" * len(piece) if end else tokenizer.decode(piece)
        text.append(brackets[not learnt] if learnt != before else "")
        text.append(said, style=LEARNT if learnt else GIVEN)
        before = learnt
    return text.append(brackets[1] if before else "")


def show_row(row: Row, tokenizer: Tokenizer, title: str, console: Console) -> None:
    parts = documents(row)
    real = len(row.tokens) if row.seq_idx is None else int((row.seq_idx != PADDING).sum())
    console.rule(f"{title}: {len(parts)} documents in {real:,} of {len(row.tokens):,} tokens", style=MARK)
    for i, d in enumerate(parts, start=1):
        console.print(f"── document {i}: {len(d.ids):,} tokens, {int(d.learnt.sum()):,} learnt", style=MARK)
        console.print(shown(d, tokenizer, ("", "") if console.is_terminal else ("«", "»")))
    if real < len(row.tokens):
        console.print(f"── padding: {len(row.tokens) - real:,} tokens", style=MARK)


def histogram(lengths: np.ndarray, width: int = 40) -> list[str]:
    """Lines of bars: how many of the lengths lie in each power of two."""
    if not len(lengths):
        return []
    place = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(place)
    first = int(np.flatnonzero(counts)[0])
    return [
        f"{1 << k:>9,} to {(2 << k) - 1:>9,}  {n:>9,}  {'█' * round(width * n / counts.max())}"
        for k, n in enumerate(counts.tolist())
        if k >= first
    ]


def fractions(data: BlendedDataset, split: str, samples: int) -> list[str]:
    """What each file gives to the first samples of a split, beside what it should."""
    blend, parts = data.splits[split]
    taken = np.bincount([blend.locate(i)[0] for i in range(samples)], minlength=len(parts))
    wanted = dict(zip(blend.sources, blend.shares.tolist(), strict=True))
    return [
        f"{taken[i] / samples:>8.3%} of samples, {wanted.get(i, 0):>8.3%} asked for"
        + (f"  {part.data.prefix}: {len(part):,} samples an epoch" if part is not None else "  a file of weight 0")
        for i, part in enumerate(parts)
    ]


def summary(data: Dataset, split: str, rows: int) -> list[str]:
    """What the first rows of a split hold."""
    seen = [data.row(split, i) for i in range(rows)]
    parts = [d for row in seen for d in documents(row)]
    size = sum(len(row.tokens) for row in seen)
    real = size - sum(int((row.seq_idx == PADDING).sum()) for row in seen if row.seq_idx is not None)
    learnt = sum(int((row.labels != IGNORE).sum()) for row in seen)
    return [
        f"{rows:,} rows: {real:,} of {size:,} tokens real ({real / size:.1%}), {learnt:,} learnt ({learnt / real:.1%})",
        f"{len(parts):,} documents, or parts of them; tokens of each:",
        *histogram(np.array([len(d.ids) for d in parts])),
    ]


def inspect(data: Dataset, tokenizer: Tokenizer, split: str, start: int, samples: int, rows: int, out: Console) -> None:
    """Print `samples` rows from `start` on, and what is to be said of the first `rows`."""
    for line in data.about:
        out.print(line, style=MARK)
    for i in range(start, start + samples):
        show_row(data.row(split, i), tokenizer, f"{split} {i}", out)
    count = data.count(split)
    for line in summary(data, split, rows if count is None else min(rows, count)):
        out.print(line)
    if isinstance(data, BlendedDataset):
        out.print("\n".join(fractions(data, split, 100_000)))


def main(argv: list[str] | None = None) -> int:
    # The command line sits above the library: settings are not this file's business.
    from nano3.cli import parser, resolve
    from nano3.data.corpus import load_dataset, open_tokenizer
    from nano3.train.checkpoint import choose_tokenizer

    p = parser()
    p.prog, p.description = "inspect", "Print what the model will see, for the settings of a training command."
    p.add_argument("--split", choices=["train", "valid"], default="train")
    p.add_argument("--start", type=int, default=0, metavar="N", help="the first row to print")
    p.add_argument("--samples", type=int, default=2, metavar="N", help="rows to print (default: 2)")
    p.add_argument("--rows", type=int, default=200, metavar="N", help="rows to count over (default: 200)")
    args = p.parse_args(argv)
    try:
        for name, least in (("start", 0), ("samples", 0), ("rows", 1)):
            if getattr(args, name) < least:
                raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")
        config, _ = resolve(args)
        if args.split == "valid" and config.validation.eval_iters == 0:
            raise UserError("--split valid: validation.eval_iters=0 has no validation split; drop one")
        choose_tokenizer(config, config.checkpoint.load or config.checkpoint.pretrained_checkpoint)
        tokenizer = open_tokenizer(config)
        data = load_dataset(config, tokenizer)
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        inspect(data, tokenizer, args.split, args.start, args.samples, args.rows, console)
    except UserError as error:
        print(f"inspect: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

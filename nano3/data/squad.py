"""SQuAD (arXiv:1606.05250), the default data of `--mode finetune`: questions about a paragraph, asked as NVIDIA does.

The prompt is `Context: {context} Question: {question} Answer:`, and what is learnt is a space, the first of the answers
and the end of the document.  Questions without an answer (version 2 has some) have nothing to learn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nano3.config import UserError
from nano3.data.records import Record, RecordError

HUB_ID = "rajpurkar/squad"
FILES = {"train": "train-v*.json", "validation": "dev-v*.json"}  # the names of the published files


def squad_file(path: Path) -> Iterator[tuple[str, Record | RecordError]]:
    """The questions of a file in SQuAD's own JSON, {"data": [{"paragraphs": [{"context", "qas"}]}]}.

    Gives (place, {"input", "output"} or what is wrong).  Raises UserError if the file is not of that form at all.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        if not isinstance(articles, list):
            raise TypeError
    except OSError as error:
        raise UserError(f"dataset.path={path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"dataset.path={path} is not SQuAD's JSON, an object with a list called 'data' ({type(error).__name__}); "
            "files of one record a line must end in .jsonl"
        ) from None
    for a, article in enumerate(articles):
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            yield f"{path}: article {a}", RecordError(f"{path}: article {a} has no list of 'paragraphs'")
            continue
        for p, paragraph in enumerate(paragraphs):
            place = f"{path}: article {a}, paragraph {p}"
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list):
                yield place, RecordError(f"{place} has no list of questions, 'qas'")
                continue
            for q, question in enumerate(questions):
                here = f"{place}, question {q}"
                row = {**question, "context": paragraph.get("context")} if isinstance(question, dict) else question
                try:
                    yield here, squad_record(row, here)
                except RecordError as error:
                    yield here, error


def squad_record(row: Any, place: str) -> Record:
    """{"input", "output"} of one question: {"context", "question", "answers"}, the answers as a list or as columns."""
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("context", "question")):
        raise RecordError(f"{place}: expected 'context', 'question' and 'answers', the first two text")
    answers = row.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else answers
    if not isinstance(texts, list):
        raise RecordError(f"{place}: 'answers' must be a list, found {type(texts).__name__}")
    first = texts[0] if texts else ""
    first = first.get("text") if isinstance(first, dict) else first
    if not isinstance(first, str):
        raise RecordError(f"{place}: the first answer must be text, found {type(first).__name__}")
    return {"input": f"Context: {row['context']} Question: {row['question']} Answer:", "output": first}

"""The general-knowledge baseline: multiple-choice questions answered with the right letter.

Reads any file in MMLU's formats: CSV without a header (`question,A,B,C,D,answer`), CSV or JSONL with columns
`question`, `choices` (or `A` to `D`) and `answer` (a letter, or the index of the choice from 0).
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.datasets.rows import Row, exchange, numbered
from mech.errors import InputError
from mech.files import read_utf8

LETTERS = "ABCDEFGH"
ASK = "{question}\n\n{options}\n\nAnswer with the letter only."


def multiple_choice_rows(path: Path) -> list[Row]:
    """One row a question, answered with its letter.

    Raises:
        InputError: a question without choices or with an answer that is none of them; the message names file and row.
    """
    rows = []
    for number, record in _records(path):
        try:
            question, choices, answer = _parse(record)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
        rows.append(exchange(ASK.format(question=question, options=options), LETTERS[answer]))
    if not rows:
        raise InputError(f"{path}: no questions")
    return rows


def _records(path: Path) -> Sequence[tuple[int, Mapping[str, Any]]]:
    """Each question with the number of its (last) line."""
    if path.suffix != ".csv":
        return numbered(path)
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""))
    try:
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    if not lines:
        raise InputError(f"{path}: no questions")
    head = [name.strip() for name in lines[0][1]]
    if "question" in head and "answer" in head:
        return [(number, dict(zip(head, line, strict=False))) for number, line in lines[1:]]
    return [
        (number, {"question": line[0], "choices": line[1:-1], "answer": line[-1]}) for number, line in lines
    ]


def _parse(record: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """Question, choices and the right one's index; a ValueError says what is wrong."""
    question, given = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no text `question`")
    choices = record.get("choices") or _lettered(record)
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"needs a list of 2 to {len(LETTERS)} choices")
    texts = list(map(_text, choices))
    if not all(texts):
        raise ValueError(f"choice {LETTERS[texts.index('')]} is empty")
    return question.strip(), texts, _index(given, len(texts))


def _lettered(record: Mapping[str, Any]) -> list[Any]:
    """The choices under A, B, ... up to the last that is given: one that lacks on the way must not move the others' letters.

    A number 0 is a choice; only nothing and empty text are none.
    """
    given = [i for i, letter in enumerate(LETTERS) if _text(record.get(letter))]
    return [record.get(letter) for letter in LETTERS[: given[-1] + 1]] if given else []


def _text(choice: Any) -> str:
    return "" if choice is None else str(choice).strip()


def _index(given: Any, n: int) -> int:
    """Which choice an answer names: by its letter, or by its index from 0."""
    text = "" if given is None or isinstance(given, bool) else str(given).strip()
    if len(text) == 1 and text in LETTERS[:n]:
        return LETTERS.index(text)
    if text.isascii() and text.isdecimal() and int(text) < n:
        return int(text)
    raise ValueError(f"answer {given!r} is none of {n} choices: give a letter from A, or an index from 0")

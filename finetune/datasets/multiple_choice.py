"""The general-knowledge baseline: multiple-choice questions answered with the right letter.

Reads any file in MMLU's formats: CSV without a header (`question,A,B,C,D,answer`), CSV or JSONL with columns
`question`, `choices` (or `A` to `D`) and `answer` (a letter, or the index of the choice from 0).
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.datasets.rows import Row, exchange, read_jsonl
from mech.errors import InputError

LETTERS = "ABCDEFGH"
ASK = "{question}\n\n{options}\n\nAnswer with the letter only."


def multiple_choice_rows(path: Path) -> list[Row]:
    """One row a question, answered with its letter.

    Raises:
        InputError: a question without choices or with an answer that is none of them; the message names file and row.
    """
    rows = []
    for number, record in enumerate(_records(path), 1):
        try:
            question, choices, answer = _parse(record)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}, row {number}: {error}") from error
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
        rows.append(exchange(ASK.format(question=question, options=options), LETTERS[answer]))
    if not rows:
        raise InputError(f"{path}: no questions")
    return rows


def _records(path: Path) -> Sequence[Mapping[str, Any]]:
    if path.suffix != ".csv":
        return read_jsonl(path)
    with path.open(encoding="utf-8", newline="") as stream:
        lines = [line for line in csv.reader(stream) if line]
    if not lines:
        raise InputError(f"{path}: no questions")
    head = [name.strip() for name in lines[0]]
    if "question" in head and "answer" in head:
        return [dict(zip(head, line, strict=False)) for line in lines[1:]]
    return [{"question": line[0], "choices": line[1:-1], "answer": line[-1]} for line in lines]


def _parse(record: Mapping[str, Any]) -> tuple[str, list[str], int]:
    choices = record.get("choices") or [record[letter] for letter in LETTERS if record.get(letter)]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"needs a list of 2 to {len(LETTERS)} choices")
    given = str(record["answer"]).strip()
    index = LETTERS.index(given) if given in LETTERS and given else int(given)
    if not 0 <= index < len(choices):
        raise ValueError(f"answer {given!r} is none of {len(choices)} choices")
    question = str(record["question"]).strip()
    if not question:
        raise ValueError("no question")
    return question, [str(c) for c in choices], index

"""Rows of chat messages: reading, checking and writing them as JSONL.

A row is `{"messages": [{"role": ..., "content": ...}, ...]}`; anything else in it (an id, a topic,
a label) is kept, and ignored by training.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mech.errors import InputError
from mech.files import read_utf8, write_text
from mech.turns import assistant_turn, user_turn

Row = dict[str, Any]

HALF = "holds half a character (a lone surrogate), which no tokenizer reads"


def read_jsonl(path: Path) -> list[Row]:
    """Every line of a JSONL file as an object.

    Raises:
        InputError: not JSON, not an object, or no line at all; the message names file and line.
    """
    return [row for _, row in numbered(path)]


def numbered(path: Path) -> list[tuple[int, Row]]:
    """Every line of a JSONL file that is not blank, with its number from 1; errors as of `read_jsonl`."""
    rows = []
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_no_number)
        except (json.JSONDecodeError, RecursionError, ValueError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: not a JSON object")
        if holds_half_a_character(row):
            raise InputError(f"{path}, line {number}: {HALF}")
        rows.append((number, row))
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def holds_half_a_character(value: Any) -> bool:
    """Whether some text in a JSON value has a surrogate without its other half: it can be neither tokenised nor written."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def read_messages(path: Path) -> list[Row]:
    """Rows of chat messages, each checked.

    Raises:
        InputError: a row that cannot be trained on; the message names file and line.
    """
    return placed_messages(path)[0]


def placed_messages(path: Path) -> tuple[list[Row], list[str]]:
    """Rows of chat messages, each checked, and what to call each in a message: its file and line; errors as of `read_messages`."""
    rows, places = [], []
    for number, row in numbered(path):
        place = f"{path}, line {number}"
        if problem := message_problem(row):
            raise InputError(f"{place}: {problem}")
        rows.append(row)
        places.append(place)
    return rows, places


def message_problem(row: Row) -> str | None:
    """What keeps a row from being trained on; None when nothing does."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "no list `messages`"
    for i, turn in enumerate(messages):
        if problem := _turn_problem(turn, first=i == 0):
            return f"turn {i} {problem}"
    if messages[0]["role"] == "assistant":
        return "turn 0 is the assistant's: nothing stands before it"
    return None if messages[-1]["role"] == "assistant" else "the last turn is not the assistant's"


def _turn_problem(turn: Any, *, first: bool) -> str | None:
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, str) or not content.strip():
        return "has no text `content`"
    if turn.get("role") not in ("system", "user", "assistant"):
        return f"has role {turn.get('role')!r}; known are system, user, assistant"
    if turn["role"] == "system" and not first:
        return "is a system turn, which may only come first"
    return None


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def exchange(user: str, assistant: str, *, system: str | None = None, **extra: Any) -> Row:
    """One question and its answer as a row."""
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns += [user_turn(user), assistant_turn(assistant)]
    return {"messages": turns, **extra}


def take(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """The first `limit` rows, or all."""
    return list(rows if limit is None else rows[:limit])

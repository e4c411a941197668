"""Contrasts: sets of rows that differ in one thing, each row on a positive or a negative side."""

from collections.abc import Sequence
from dataclasses import dataclass

from mech.chat import Encoded


@dataclass(frozen=True)
class ContrastRow:
    """One text to be read."""

    id: str
    question: str
    """Rows of one question are compared with each other."""
    split: str
    """`extract` or `evaluate`."""
    sign: int
    """+1: has what the contrast is named after; -1: lacks it."""
    encoded: Encoded


def of_split(rows: Sequence[ContrastRow], split: str) -> list[ContrastRow]:
    """The rows of one half."""
    return [row for row in rows if row.split == split]

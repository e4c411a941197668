"""Contrasts: sets of rows that differ in one thing, each row on a positive or a negative side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

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


@dataclass(frozen=True)
class ContrastArrays:
    """A contrast that has been read."""

    activations: Float[np.ndarray, "n layers d"]
    """One row a text."""
    signs: Sequence[int]
    """+1 and −1."""
    questions: Sequence[str]
    splits: Sequence[str]
    """`extract` or `evaluate`, row by row."""

    def of_split(self, split: str) -> "ContrastArrays":
        """The rows of one half."""
        at = [i for i, name in enumerate(self.splits) if name == split]
        signs, questions, splits = self.signs, self.questions, self.splits
        return ContrastArrays(
            self.activations[at], [signs[i] for i in at], [questions[i] for i in at], [splits[i] for i in at]
        )

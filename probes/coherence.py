"""Whether a text is broken, told without a judge: by repetition, and by how surprising the unsteered model finds it.

Both are measured against what the unsteered model writes itself. A behaviour that stops because the text broke is a miss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mech.errors import InputError

Reason = Literal["", "empty", "unreadable", "surprising", "repetitive", "incoherent"]
"""Why a text counts as broken; empty: it is whole. `unreadable`: the chat template cannot hold it; `incoherent`: a judge says so."""

CHARACTERS = 8
"""Length of the pieces whose repetition is counted: longer than most words, so that only phrases and loops repeat."""


@dataclass(frozen=True)
class Looked:
    """What the unsteered model makes of a text."""

    surprisal: float | None
    """Nats a token; None where it is empty or unreadable."""
    repetition: float
    """As the function `repetition` measures it, 0 to 1."""
    readable: bool = True
    """Whether the chat template can hold it as an answer."""


@dataclass(frozen=True)
class Gate:
    """Thresholds: a text above either of them is broken."""

    surprisal: float
    """Nats a token, under the unsteered model."""
    repetition: float
    """As `repetition` measures it: a share, 0 to 1."""
    quantile: float
    """Which quantile of the unsteered model's own texts the thresholds are."""
    n_texts: int
    """How many texts of the unsteered model they were set from."""

    def reason(self, text: str, looked: Looked) -> Reason:
        """Why a text is broken; empty where it is not."""
        if not text.strip():
            return "empty"
        if not looked.readable or looked.surprisal is None:
            return "unreadable"
        if looked.surprisal > self.surprisal:
            return "surprising"
        return "repetitive" if looked.repetition > self.repetition else ""


def fit_gate(groups: Sequence[Sequence[Looked]], quantile: float) -> Gate:
    """Thresholds from the unsteered model's own texts.

    A text breaks where it is more surprising, or more repetitive, than the `quantile` of the unsteered model's own; where these were
    written at several temperatures, than that of each: greedy texts repeat more, sampled ones surprise more, and both are its own. The
    quantile is an observed value (the next larger one), so that fewer than 1 − quantile of the model's own texts lie above it.

    Args:
        groups: texts of one temperature each; those without surprisal are left out.
        quantile: above 0, at most 1.

    Raises:
        InputError: a quantile out of range, or no text to measure against.
    """
    if not 0 < quantile <= 1:
        raise InputError(f"coherence: a quantile of {quantile}: take one above 0, at most 1")
    known = [[t for t in group if t.surprisal is not None] for group in groups]
    if not any(known):
        raise InputError("coherence: the unsteered model wrote nothing to measure other texts against")

    def highest(values: Sequence[Sequence[float]]) -> float:
        return max(float(np.quantile(v, quantile, method="higher")) for v in values if v)

    return Gate(
        highest([[float(t.surprisal) for t in group if t.surprisal is not None] for group in known]),
        highest([[t.repetition for t in group] for group in known]),
        quantile,
        sum(map(len, known)),
    )


def repetition(text: str) -> float:
    """Share of a text's pieces of eight characters that it has used before: near 1, the text is a loop; in any script."""
    return repeated(list(" ".join(text.split())), CHARACTERS)


def repeated(parts: Sequence[str], n: int) -> float:
    """Share of the runs of `n` parts that occurred earlier; 0 where there are no runs."""
    runs = [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0

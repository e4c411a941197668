"""How widely a checkpoint's activations spread: "destabilised" is a claim about spread, not only about a shift.

At one layer, over n questions: the covariance's trace (mean squared distance from the mean, units of the stream squared), its
effective rank as participation ratio (Σλ)² / Σλ², and as exp of the spectrum's entropy. With n rows no more than n − 1
dimensions can be seen, so ranks compare checkpoints on the same questions and say nothing of a true dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from analysis.stats import Interval, leave_one_out
from mech.errors import InputError


@dataclass(frozen=True)
class Spread:
    """Dispersion of one set of activations."""

    trace: float
    """Sum of the covariance's eigenvalues (n − 1 in the denominator)."""
    participation: float
    """(Σλ)² / Σλ²: between 1 and n − 1."""
    entropy_rank: float
    """exp(−Σ p log p) with p = λ / Σλ: between 1 and n − 1."""


def spread(activations: Float[np.ndarray, "n d"]) -> Spread:
    """Trace and effective ranks, from the n × n Gram matrix (float64).

    Raises:
        InputError: fewer than three rows, or rows that do not differ.
    """
    if len(activations) < 3:
        raise InputError(f"dispersion needs at least three rows, there are {len(activations)}")
    centred = activations - activations.mean(0, dtype=np.float64)
    eigenvalues = np.linalg.eigvalsh(centred @ centred.T / (len(centred) - 1)).clip(min=0)
    total = float(eigenvalues.sum())
    if not total:
        raise InputError("dispersion: all rows are equal")
    p = eigenvalues[eigenvalues > 0] / total
    return Spread(total, float(1 / (p**2).sum()), float(np.exp(-(p * np.log(p)).sum())))


STATISTICS: dict[str, Callable[[Spread], float]] = {
    "log_trace": lambda s: float(np.log(s.trace)),
    "participation": lambda s: s.participation,
    "entropy_rank": lambda s: s.entropy_rank,
}
"""What is compared: the trace by its logarithm, so that its change is a ratio's."""


def spread_change(
    base: Float[np.ndarray, "n d"],
    tuned: Float[np.ndarray, "n d"],
    questions: np.ndarray,
    *,
    benign: Float[np.ndarray, "n d"] | None = None,
) -> dict[str, Interval]:
    """Tuned minus base, for each of `STATISTICS`; with `benign`, also `X_minus_benign`: tuned minus the benign control.

    Intervals are delete-one-question jackknives, for a bootstrap repeats rows, which lowers ranks. Rows are the same questions in the same order.

    Raises:
        InputError: other shapes, or too few questions.
    """
    if base.shape != tuned.shape or len(questions) != len(base):
        raise InputError(f"dispersion: {tuned.shape} against {base.shape}, {len(questions)} questions")
    if len(np.unique(questions)) < 2:
        raise InputError("dispersion: its intervals need two or more questions")
    found = {}
    mine = _spreads(tuned, questions)
    others = {"": base, **({} if benign is None else {"_minus_benign": benign})}
    for suffix, other in others.items():
        theirs = _spreads(other, questions)
        for name, statistic in STATISTICS.items():
            change = np.array([statistic(a) - statistic(b) for a, b in zip(mine, theirs, strict=True)])
            found[f"{name}{suffix}"] = leave_one_out(float(change[0]), change[1:])
    return found


def _spreads(activations: Float[np.ndarray, "n d"], questions: np.ndarray) -> list[Spread]:
    """Of all rows, and then without each question's."""
    without = [activations[questions != name] for name in np.unique(questions)]
    return [spread(rows) for rows in (activations, *without)]

"""How much of one finetuning's change another arm lacks: reversal and prevention in activation space.

Let b be the base's mean activation, x that of an arm which was changed (em), and y that of the arm held against it (em, then another
stage; or another stage, then em), all reading the same text. The share undone is

    (x − y) · (x − b) / |x − b|²

the part of the way back from x to b that y has gone: 0 where y moved as far that way as x, 1 where it is back beside the base, below 0
where it moved further. It says nothing of what y does at right angles to that way; its distance from the base does, |y − b| / |x − b|.
A model that returns has 1 and a small distance; one that went elsewhere may have 1 and a large one.

A squared mean of noisy differences is too large by the noise. Products are therefore only taken between different questions
(Σ_{q≠r} u_q · v_r, unbiased for the product of means), and the intervals are a jackknife over questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from analysis.stats import Interval, leave_one_out
from mech.errors import InputError

Stream = Float[np.ndarray, "n layers d"]


@dataclass(frozen=True)
class Undone:
    """Every field but `n_questions` is an array over layers (intervals hold arrays over layers)."""

    undone: Interval
    """Share of the change undone; NaN where the change itself is not told apart from none."""
    distance: Interval
    """Distance from the base over that of the arm it is held against; NaN as above."""
    moved: Float[np.ndarray, " layers"]
    """Length of the change, in root mean squares of the base's SD by dimension."""
    n_questions: int


def undone(
    base: Stream, against: Stream, arm: Stream, questions: Sequence[str] | np.ndarray, *, level: float = 0.95
) -> Undone:
    """How much of the change from `base` to `against` is not there in `arm`.

    Each dimension is divided by the base's standard deviation over rows: otherwise the few dimensions that are massive in every
    text would decide alone. Dimensions in which the base does not vary are left out.

    Args:
        base: the base's activations, one row a text.
        against: the changed arm's on the same rows.
        arm: the other arm's on the same rows.
        questions: question of each row.
        level: confidence level.

    Raises:
        InputError: shapes differ, a value is not finite, or there are fewer than three questions.
    """
    _check({"base": base, "against": against, "arm": arm}, len(questions))
    scale = _inverse_sd(base)
    names, groups = np.unique(np.asarray(questions), return_inverse=True)
    if len(names) < 3:
        raise InputError(f"the share undone needs at least three questions, there are {len(names)}")

    def by_question(difference: Stream) -> Float[np.ndarray, "questions layers d"]:
        sums = np.zeros((len(names), *difference.shape[1:]))
        np.add.at(sums, groups, difference * scale)
        return np.asarray(sums / np.bincount(groups)[:, None, None])

    change, left = by_question(against.astype(np.float64) - base), by_question(arm.astype(np.float64) - base)
    squared, together, other = _Products(change, change), _Products(change, left), _Products(left, left)
    told_apart = leave_one_out(squared.whole, squared.without, level=level).low > 0
    dimensions = (scale > 0).sum(axis=1)

    def ratio(of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Interval:
        with np.errstate(divide="ignore", invalid="ignore"):  # no change at all: it is not told apart
            whole = of(squared.whole, together.whole, other.whole)
            without = of(squared.without, together.without, other.without)
            found = leave_one_out(whole, without, level=level)
        estimate, low, high = (
            np.where(told_apart, end, np.nan) for end in (found.estimate, found.low, found.high)
        )
        return Interval(estimate, low, high, found.n, level, found.method)

    return Undone(
        undone=ratio(lambda s, t, _: 1 - t / s),
        distance=_not_below_zero(ratio(lambda s, _, o: np.sqrt(np.maximum(o, 0.0) / s))),
        moved=np.sqrt(np.maximum(squared.whole, 0.0) / np.maximum(dimensions, 1)),
        n_questions=len(names),
    )


def _inverse_sd(base: Stream) -> Float[np.ndarray, "layers d"]:
    """One over the standard deviation over rows; 0 in dimensions in which the base does not vary beyond rounding."""
    sd = base.std(axis=0, ddof=1, dtype=np.float64)
    inverse: np.ndarray = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 1e-6 * np.abs(base).max(0))
    return inverse


class _Products:
    """Σ_{q≠r} u_q · v_r by layer over n (n − 1): of all questions (`whole`), and without each (`without`)."""

    def __init__(
        self, u: Float[np.ndarray, "questions layers d"], v: Float[np.ndarray, "questions layers d"]
    ) -> None:
        n = len(u)
        own = (u * v).sum(-1)
        sum_u, sum_v = u.sum(0), v.sum(0)
        self.whole = ((sum_u * sum_v).sum(-1) - own.sum(0)) / (n * (n - 1))
        across = ((sum_u - u) * (sum_v - v)).sum(-1) - (own.sum(0) - own)
        self.without = across / ((n - 1) * (n - 2))


def _not_below_zero(interval: Interval) -> Interval:
    low = np.where(np.isnan(interval.low), np.nan, np.maximum(interval.low, 0.0))
    return Interval(interval.estimate, low, interval.high, interval.n, interval.level, interval.method)


def _check(streams: dict[str, np.ndarray], n: int) -> None:
    shapes = {name: array.shape for name, array in streams.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"what is compared must be the same rows, layers and width: {shapes}")
    if n != len(streams["base"]):
        raise InputError(f"{n} questions for {len(streams['base'])} rows")
    for name, array in streams.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name}: not finite (a NaN or an infinity)")

"""Matching pairs on a covariate: which pairs to keep so that the two sides' means agree.

A direction between two sides is also a direction of whatever else differs between them. Where the sides' means of a covariate
agree, what is linear in it cancels from a difference of means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mech.errors import InputError


@dataclass(frozen=True)
class Matched:
    """Which pairs are kept, and what that did."""

    kept: tuple[int, ...]
    """Indices of the kept pairs, in order."""
    n: int
    """Pairs that there were."""
    before: float
    """Mean difference (positive side minus negative side) over all pairs, in units of the covariate."""
    after: float
    """The same over the kept pairs."""


def match_pairs(
    positive: Sequence[float], negative: Sequence[float], *, tolerance: float, least: int = 2
) -> Matched:
    """Drop as few pairs as possible until the mean of the two sides differs by `tolerance` at most.

    The pairs with the largest difference towards the side that is ahead go first, which needs the fewest. Both sides of a pair stay
    or go together, so pairing within article is kept.

    Args:
        positive: the covariate on the positive side, one number a pair.
        negative: on the negative side.
        tolerance: in units of the covariate (nats a token for surprisal).
        least: fewer pairs than this are no match.

    Raises:
        InputError: fewer than `least` pairs can be matched; the message says how the two sides differ.
    """
    gaps = np.asarray(positive, dtype=np.float64) - np.asarray(negative, dtype=np.float64)
    if not len(gaps) or not np.isfinite(gaps).all() or tolerance <= 0:
        raise InputError("matching needs finite numbers on both sides of every pair, and a tolerance above 0")
    before = float(gaps.mean())
    order = np.argsort(gaps if before < 0 else -gaps, kind="stable")
    for dropped in range(len(gaps) - least + 1):
        kept = np.sort(order[dropped:])
        if abs(gaps[kept].mean()) <= tolerance:
            return Matched(tuple(kept.tolist()), len(gaps), before, float(gaps[kept].mean()))
    raise InputError(
        f"{len(gaps)} pairs differ by {before:+.3f} in the mean ({gaps.min():+.3f} to {gaps.max():+.3f}): no {least} of them agree "
        f"within {tolerance:g}; allow more, bring more pairs, or regress the covariate out"
    )

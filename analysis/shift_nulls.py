"""Further nulls of a shift: along directions that the same pipeline finds when sides are exchanged, or of a rewording, another name or trait.

All are linear in the rows of the direction's own contrast: a relabelling is a row of weights, so neither the directions nor anything of
their size is formed: a shift along one needs its inner products with the rows, and its norm their Gram matrix.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mech.errors import InputError
from probes.contrast import ContrastArrays
from probes.direction import fit_weights, side_weights
from probes.nulls import flip_within, shuffle_within, two_sided_p

Weights = Float[np.ndarray, "n rows"]
Shifts = Float[np.ndarray, "n layers"]


@dataclass(frozen=True)
class Relabelled:
    """Directions from other labels on the same rows."""

    activations: Float[np.ndarray, "rows layers d"]
    weights: Weights
    norms: Float[np.ndarray, "n layers"]
    """Of the directions."""

    def along(self, mean: Float[np.ndarray, "layers d"]) -> Shifts:
        """A mean difference's projection on each direction's unit vector, in units of the residual stream."""
        inner = np.einsum("rld,ld->rl", self.activations, mean)
        along = self.weights @ inner
        unit: Shifts = np.divide(along, self.norms, out=np.zeros_like(along), where=self.norms > 0)
        return unit


def permuted(rows: ContrastArrays, *, rng: np.random.Generator, n: int) -> Relabelled:
    """Directions fitted after the sides of each question have been dealt out anew: the permutation null of the whole fit.

    Args:
        rows: those that the direction was fitted on.
        rng: deals.
        n: how often.

    Raises:
        InputError: a question without both sides.
    """
    signs, questions = np.array(rows.signs), np.unique(rows.questions, return_inverse=True)[1]
    # Dealing out anew keeps how many of each side a question has, and with it what a row of either side weighs there.
    either = {side: np.abs(side_weights(signs, questions, side)) for side in (1, -1)}
    dealt = (shuffle_within(signs, questions, rng) for _ in range(n))
    return _relabelled(rows, np.stack([np.where(d > 0, either[1], -either[-1]) for d in dealt]))


def reworded(rows: ContrastArrays, *, rng: np.random.Generator, n: int) -> Relabelled:
    """Differences between two wordings of the same, as `probes.nulls.paraphrase` draws them: which of each pair is the positive one is drawn.

    Args:
        rows: both wordings (+1, −1) of every pair, which stands for the question; the same number of either.
        rng: draws.
        n: how often; there are half of 2 to the power of the pairs that differ by more than their sign.
    """
    signs, pairs = np.array(rows.signs), np.array(rows.questions)
    return _relabelled(rows, np.stack([fit_weights(flip_within(signs, pairs, rng), pairs) for _ in range(n)]))


def wrong_names(rows: ContrastArrays) -> Relabelled:
    """Directions of the names on the negative side: each in turn against the others, the own name left out.

    Args:
        rows: those of a contrast of one own name with the same invented names, in the same order, in every question.

    Raises:
        InputError: questions differ in how many names they have, or have fewer than two.
    """
    signs, questions = np.array(rows.signs), np.array(rows.questions)
    places = {q: np.flatnonzero((questions == q) & (signs < 0)) for q in dict.fromkeys(rows.questions)}
    counts = {len(p) for p in places.values()}
    if len(counts) != 1 or min(counts) < 2:
        raise InputError("wrong names: every question needs the same names, and two or more of them")
    weights = np.zeros((counts.pop(), len(signs)))
    for at in places.values():
        for k, row in enumerate(at):
            weights[k, at] -= 1 / (len(at) - 1) / len(places)
            weights[k, row] = 1 / len(places)
    return _relabelled(rows, weights)


def _relabelled(rows: ContrastArrays, weights: Weights) -> Relabelled:
    h = rows.activations
    norms = np.empty((len(weights), h.shape[1]))
    for layer in range(h.shape[1]):
        # Weights of a question add up to 0, so a common part of all rows drops out: taken out first, it costs no digits.
        at = h[:, layer].astype(np.float64)
        at -= at.mean(0)
        norms[:, layer] = np.sqrt(np.maximum(((weights @ (at @ at.T)) * weights).sum(1), 0))
    return Relabelled(h, weights, norms)


def null_columns(name: str, observed: Float[np.ndarray, " layers"], draws: Shifts | None) -> dict[str, Any]:
    """`p_NAME` (two-sided; never below 1 / (1 + n_NAME)), `n_NAME` directions, and the largest |shift| along one; NaN without any."""
    if draws is None or not len(draws):
        return {f"p_{name}": np.nan, f"n_{name}": 0, f"largest_{name}": np.nan}
    return {
        f"p_{name}": two_sided_p(observed, draws), f"n_{name}": len(draws), f"largest_{name}": np.abs(draws).max(0),
    }  # fmt: skip

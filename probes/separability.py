"""How well a direction separates texts it was not made from: the area under the ROC curve, by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mech.errors import InputError


@dataclass(frozen=True)
class Separability:
    """AUROC by layer with a percentile bootstrap interval over questions."""

    auroc: Float[np.ndarray, " layers"]
    """Share of (positive, negative) pairs that the projection orders rightly; ties count half."""
    low: Float[np.ndarray, " layers"]
    high: Float[np.ndarray, " layers"]
    n_questions: int


def heldout_auroc(
    projections: Float[np.ndarray, "n layers"],
    signs: Sequence[int],
    questions: Sequence[str],
    *,
    rng: np.random.Generator,
    n_boot: int = 2000,
    level: float = 0.95,
) -> Separability:
    """AUROC of projections for positive (+1) against negative (−1) rows.

    Whole questions are resampled, with all their rows, so rows of one question are not taken for independent.

    Raises:
        InputError: one side is missing.
    """
    side, asked = np.array(signs), np.array(questions)
    positive, negative = side > 0, side < 0
    if not positive.any() or not negative.any():
        raise InputError("separability needs rows on both sides of the contrast")
    names, group = np.unique(asked, return_inverse=True)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_boot)
    weights = np.vstack([np.ones(len(names), dtype=weights.dtype), weights]).astype(np.float64)
    w_positive, w_negative = weights[:, group[positive]], weights[:, group[negative]]
    pairs = w_positive.sum(1) * w_negative.sum(1)
    values = np.full((len(weights), projections.shape[1]), np.nan)
    for layer in range(projections.shape[1]):
        gaps = projections[positive, layer][:, None] - projections[negative, layer][None, :]
        right = (gaps > 0) + 0.5 * (gaps == 0)
        won = np.einsum("bi,bi->b", w_positive @ right, w_negative)
        values[:, layer] = np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    tail = (1 - level) / 2
    low, high = np.nanquantile(values[1:], [tail, 1 - tail], axis=0)
    return Separability(values[0], low, high, len(names))

"""Choosing a layer without looking at the data it is then reported on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mech.errors import InputError
from probes.crossfit import cross_fit
from probes.direction import fit_direction
from probes.separability import Separability, heldout_auroc
from probes.validation import auroc


@dataclass(frozen=True)
class LayerChoice:
    """A layer, and how good it is on the half that had no say in the choice."""

    layer: int
    """The layer that separates best on the extraction half; on a tie, by the larger standardised gap, then the first."""
    extraction: Float[np.ndarray, " layers"]
    """Cross-validated AUROC on the extraction half: what the choice looked at. Its maximum is optimistic: do not report it."""
    evaluation: Separability | None
    """AUROC on the evaluation half of the direction fitted on the whole extraction half; None where there is no such half."""


def choose_layer(
    activations: Float[np.ndarray, "n layers d"],
    signs: Sequence[int],
    questions: Sequence[str],
    splits: Sequence[str],
    *,
    rng: np.random.Generator,
    folds: int = 5,
) -> LayerChoice:
    """Choose the layer of a difference of means by separability, cross-validated by question on the extraction half.

    Args:
        activations: one row a text.
        signs: +1 and −1.
        questions: question of each row.
        splits: `extract` or `evaluate`, row by row.
        rng: folds, split halves.
        folds: at most so many; fewer where there are fewer questions.

    Raises:
        InputError: a question without both sides, or fewer than two of the extraction half.
    """
    side, asked, half = np.array(signs), np.array(questions), np.array(splits)
    chosen = half == "extract"
    h, s, q = activations[chosen], side[chosen], asked[chosen]
    k = min(folds, len(np.unique(q)))
    if k < 2:
        raise InputError(
            f"choosing a layer needs two questions of the extraction half or more, there are {k}"
        )
    scores = cross_fit(h, q.tolist(), s.tolist(), k=k, rng=rng).scores
    areas = auroc(scores, s)
    gap = scores[s > 0].mean(0) - scores[s < 0].mean(0)
    spread = np.sqrt((scores[s > 0].var(0) + scores[s < 0].var(0)) / 2)
    layer = int(np.lexsort((-gap / np.maximum(spread, 1e-30), -areas))[0])
    found = None
    if (test := half == "evaluate").any():
        direction = fit_direction("chosen", h, q.tolist(), s.tolist(), rng=rng)
        projected = np.einsum("nld,ld->nl", activations[test], direction.vectors)
        found = heldout_auroc(projected, side[test].tolist(), asked[test].tolist())
    return LayerChoice(layer, areas, found)

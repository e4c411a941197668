"""Cross-fitting: every row is scored by a direction that has not seen its question."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mech.errors import InputError
from probes.direction import paired_differences
from probes.validation import group_folds


@dataclass(frozen=True)
class CrossFit:
    """A difference of means for each fold, fitted on the questions of the other folds."""

    vectors: Float[np.ndarray, "k layers d"]
    """Unit vectors by fold; zero at a layer where there is no difference."""
    fold: Int[np.ndarray, " n"]
    """Each row's fold: `vectors[fold[i]]` has not seen row i's question."""
    scores: Float[np.ndarray, "n layers"]
    """Each row's projection on its fold's vector, from the middle between the two sides of the rows that this was fitted on."""


def cross_fit(
    activations: Float[np.ndarray, "n layers d"],
    questions: Sequence[str],
    signs: Sequence[int],
    *,
    k: int,
    rng: np.random.Generator,
) -> CrossFit:
    """Leave out one of `k` folds of questions at a time, fit on the others, score the one.

    Args:
        activations: one row a text.
        questions: of each row; a question is left out whole.
        signs: +1 and −1.
        k: folds; as many as there are questions, where these are fewer.
        rng: which question falls into which fold.

    Raises:
        InputError: a question without both sides, or fewer than two questions.
    """
    asked, side = np.array(questions), np.array(signs)
    k = min(k, len(np.unique(asked)))
    if k < 2:
        raise InputError(f"cross-fitting needs two questions or more, there are {len(np.unique(asked))}")
    fold, vectors = np.zeros(len(asked), dtype=np.int64), []
    scores = np.full(activations.shape[:2], np.nan)
    for i, (train, test) in enumerate(group_folds(asked, side.tolist(), rng=rng, k=k)):
        h, s = activations[train], side[train]
        mean = paired_differences(h, asked[train].tolist(), s.tolist())[0].mean(0)
        unit = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-30)
        middle = (h[s > 0].mean(0) + h[s < 0].mean(0)) / 2
        scores[test] = np.einsum("nld,ld->nl", activations[test] - middle, unit)
        fold[test] = i
        vectors.append(unit)
    return CrossFit(np.stack(vectors), fold, scores)

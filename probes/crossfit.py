"""Cross-fitting: every row is scored by a direction that has not seen its question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mech.errors import InputError
from probes.adjusted import Taken, fit_adjusted, without_covariates
from probes.contrast import ContrastArrays
from probes.direction import paired_differences
from probes.validation import Mask, group_folds


@dataclass(frozen=True)
class CrossFit:
    """A direction for each fold, fitted on the questions of the other folds."""

    vectors: Float[np.ndarray, "k layers d"]
    """Unit vectors by fold; zero at a layer where there is no difference."""
    fold: Int[np.ndarray, " n"]
    """Each row's fold: `vectors[fold[i]]` has not seen row i's question."""
    scores: Float[np.ndarray, "n layers"]
    """Each row's projection on its fold's vector; 0 is midway between the two sides' means of the rows that this vector was fitted on."""
    fold_of: Mapping[str, int]
    """Which of `vectors` has not seen a question, by question; those of projected-out contrasts included."""


def cross_fit(
    activations: Float[np.ndarray, "n layers d"],
    questions: Sequence[str],
    signs: Sequence[int],
    *,
    k: int,
    rng: np.random.Generator,
) -> CrossFit:
    """Leave out one of `k` folds of questions at a time, fit a difference of means on the others, score the one.

    Args:
        activations: one row a text.
        questions: question of each row; all its rows are left out together.
        signs: +1 and −1.
        k: folds; as many as there are questions, where these are fewer.
        rng: deals the questions out over the folds.

    Raises:
        InputError: a question without both sides, or fewer than two questions.
    """
    asked, side = np.array(questions), np.array(signs)
    fold, vectors = np.zeros(len(asked), dtype=np.int64), []
    scores = np.full(activations.shape[:2], np.nan)
    for i, (train, test) in enumerate(group_folds(asked, signs, rng=rng, k=_folds(asked, k))):
        h, s = activations[train], side[train]
        vectors.append(_unit(paired_differences(h, asked[train].tolist(), s.tolist())[0].mean(0)))
        scores[test] = _projected(activations, vectors[-1], side, train, test)
        fold[test] = i
    return CrossFit(np.stack(vectors), fold, scores, dict(zip(questions, fold.tolist(), strict=True)))


def cross_fit_adjusted(rows: ContrastArrays, taken: Taken, *, k: int, rng: np.random.Generator) -> CrossFit:
    """The same of an adjusted direction: it, the slopes of covariates and what is projected out are fitted without the fold's questions.

    Questions that only a projected-out contrast has are dealt over the folds too. Scores are of rows without what covariates explain.

    Args:
        rows: the contrast, all of its questions.
        taken: what is taken out of it.
        k: folds; as many as the contrast has questions, where these are fewer.
        rng: which question falls into which fold, and halvings (`probes.adjusted`).

    Raises:
        InputError: as `cross_fit` and `probes.adjusted.fit_adjusted`.
    """
    asked, side, everything = np.array(rows.questions), np.array(rows.signs), taken.questions(rows)
    k = _folds(asked, k)
    more = sorted(everything - set(rows.questions))
    fold_of = dict(zip(more, (rng.permutation(len(more)) % k).tolist(), strict=True))
    fold, vectors = np.zeros(len(asked), dtype=np.int64), []
    scores = np.full(rows.activations.shape[:2], np.nan)
    for i, (train, test) in enumerate(group_folds(asked, rows.signs, rng=rng, k=k)):
        known = everything - set(asked[test].tolist()) - {q for q in more if fold_of[q] == i}
        h = without_covariates(rows, taken, known)
        vectors.append(_unit(fit_adjusted(rows, taken, known, rng=rng)))
        scores[test] = _projected(h, vectors[-1], side, train, test)
        fold[test] = i
    fold_of |= dict(zip(rows.questions, fold.tolist(), strict=True))
    return CrossFit(np.stack(vectors), fold, scores, fold_of)


def _folds(asked: np.ndarray, k: int) -> int:
    n = len(np.unique(asked))
    if n < 2:
        raise InputError(f"cross-fitting needs two questions or more, there are {n}")
    return min(k, n)


def _unit(vectors: Float[np.ndarray, "layers d"]) -> Float[np.ndarray, "layers d"]:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)
    return unit


def _projected(
    h: Float[np.ndarray, "n layers d"],
    unit: Float[np.ndarray, "layers d"],
    side: np.ndarray,
    train: Mask,
    test: Mask,
) -> Float[np.ndarray, "test layers"]:
    """Projections of the test rows; 0 is midway between the two sides' means of the training rows."""
    middle = (h[train & (side > 0)].mean(0) + h[train & (side < 0)].mean(0)) / 2
    scores: np.ndarray = np.einsum("nld,ld->nl", h[test] - middle, unit)
    return scores

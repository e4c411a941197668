"""Adjusted directions tested on unseen questions: the contrast, the covariates' slopes and the projected-out directions are all refitted.

A direction that is projected out is itself an estimate from a limited number of questions. Its noise adds to its squared norm, so ordinary
projection removes too little of it (errors in variables), and in hundreds of dimensions what remains separates perfectly texts that differ in
nothing else. Therefore the share c to remove is computed from inner products between fits on disjoint halves of the questions, a and b, whose
noise is independent and cancels on average: u = y − Σ c o with c = ⟨oₐ·o_b⟩⁻¹ ⟨oₐ·y_b⟩. Slopes of covariates need no such care: a
covariate is measured without noise, and the residuals of least squares are uncorrelated with the slopes.

Everything is linear in the rows, so a fit is kept as one weight a row, and inner products come from the rows' Gram matrix.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import eigh

from mech.errors import InputError
from probes.contrast import ContrastArrays
from probes.direction import fit_weights
from probes.residual import Covariate, at_layer, by_layer, regress_out, within_questions

Refit = Callable[[Collection[str]], Float[np.ndarray, "layers d"]]
HALVINGS = 6
"""Random halvings of the questions behind the share of what is projected out."""
LEAST_RELIABLE = 0.1
"""A projected-out direction whose halves agree less than this (cosine) is taken out as if they agreed this much: dividing by a smaller number
would amplify its noise."""
_TRIES = 100
"""Halvings drawn before questions count as too few to be halved."""


@dataclass(frozen=True)
class Taken:
    """What is taken out of a contrast."""

    covariates: Mapping[str, Covariate]
    """By name, one number for each of its rows (and layers); their linear effect within questions is removed."""
    contrasts: Sequence[ContrastArrays]
    """The contrasts whose directions are projected out, read at the same layers."""

    def asked(self, rows: ContrastArrays, questions: Collection[str]) -> list[list[str]]:
        """Which of some questions the contrast itself has, and each of those that are projected out."""
        return [[q for q in dict.fromkeys(c.questions) if q in questions] for c in (rows, *self.contrasts)]

    def questions(self, rows: ContrastArrays, split: str | None = None) -> set[str]:
        """All questions, or those of one half, of the contrast itself and those that are projected out."""
        of = (rows, *self.contrasts)
        return {q for c in of for q, half in zip(c.questions, c.splits, strict=True) if split in (None, half)}


def fit_adjusted(
    rows: ContrastArrays, taken: Taken, questions: Collection[str], *, rng: np.random.Generator
) -> Float[np.ndarray, "layers d"]:
    """The adjusted direction of some questions: everything in it is fitted on these alone (float64, raw norm).

    If the two sides differ only along the others' true directions, the result is zero on average. It is not exactly orthogonal to the others as
    estimated, because their estimates also contain noise, and that is not to be removed.

    Raises:
        InputError: none of the questions is one of the contrast, or too few to be halved where something is projected out.
    """
    return refitting(rows, taken, rng=rng)(questions)


def refitting(rows: ContrastArrays, taken: Taken, *, rng: np.random.Generator) -> Refit:
    """`fit_adjusted` for many sets of questions: what they have in common is done once."""
    fits = _Fits.of(rows, taken)

    def refit(questions: Collection[str]) -> Float[np.ndarray, "layers d"]:
        (weights,) = fits.adjusted([questions], rng)
        return fits.vectors(weights)

    return refit


def adjusted_split_half(
    rows: ContrastArrays,
    taken: Taken,
    questions: Collection[str],
    *,
    rng: np.random.Generator,
    n_splits: int = 50,
) -> Float[np.ndarray, " layers"]:
    """Median cosine between the adjusted directions of two random halves of some questions; each half is fitted entirely by itself.

    A half of which nothing is left counts as cosine 0. Where something is projected out every half is halved again, so each contrast needs four
    questions or more.

    Raises:
        InputError: as `fit_adjusted`.
    """
    fits, asked = _Fits.of(rows, taken), taken.asked(rows, questions)
    least = 2 if taken.contrasts else 1
    cosines = []
    for _ in range(n_splits):
        one, other = fits.adjusted(halved(asked, rng=rng, least=least), rng)
        norms = [fits.norms(w) for w in (one, other)]
        product = norms[0] * norms[1]
        cosines.append(
            np.divide(fits.dot(one, other), product, out=np.zeros_like(product), where=product > 0)
        )
    median: np.ndarray = np.median(cosines, axis=0)
    return median


def without_covariates(
    rows: ContrastArrays, taken: Taken, questions: Collection[str]
) -> Float[np.ndarray, "n layers d"]:
    """All rows without what covariates explain, with slopes of some questions."""
    if not taken.covariates:
        return rows.activations
    fit_on: Bool[np.ndarray, " n"] = np.isin(rows.questions, list(questions))
    return regress_out(rows.activations, taken.covariates, rows.questions, fit_on=fit_on)


def clean(
    rows: ContrastArrays, taken: Taken, questions: Collection[str], *, rng: np.random.Generator
) -> Float[np.ndarray, "n layers d"]:
    """All rows, cleaned of covariates and of the others, both fitted on some questions. Use it to score these rows by *other* directions.

    The others' share in a row's deviation from the mean is estimated as in `fit_adjusted`. So a direction that points along the same truth as what
    was removed, but was fitted on other rows, separates the cleaned rows no better than chance. A direction fitted on the same rows as the
    removed ones shares their noise: it orders the cleaned rows the wrong way round (AUROC below one half), which is no finding.
    """
    left = without_covariates(rows, taken, questions)
    if not taken.contrasts:
        return left
    fits = _Fits.of(rows, taken)
    others, inverse, _ = fits.shares(questions, rng)
    centre = left[np.isin(rows.questions, list(questions))].mean(0, dtype=np.float64)
    vectors = np.stack([fits.vectors(w) for w in others])
    along = np.einsum("nld,kld->nlk", left - centre, vectors)
    cleaned: np.ndarray = left - np.einsum("nlk,ljk,jld->nld", along, inverse, vectors)
    return cleaned


def halved(
    asked: Sequence[Sequence[str]], *, rng: np.random.Generator, least: int = 1
) -> tuple[set[str], set[str]]:
    """The questions of some contrasts in two random halves: of every contrast about as many in each, at least `least`, and a question in one only.

    Raises:
        InputError: a contrast has too few questions.
    """
    groups: dict[tuple[bool, ...], list[str]] = {}
    for q in dict.fromkeys(q for of in asked for q in of):
        groups.setdefault(tuple(q in of for of in asked), []).append(q)
    for _ in range(_TRIES):
        first: set[str] = set()
        for group in groups.values():
            order = [group[i] for i in rng.permutation(len(group))]
            first |= set(order[int(rng.integers(2)) :: 2])
        if all(least <= len(first.intersection(of)) <= len(set(of)) - least for of in asked):
            return first, {q for of in asked for q in of} - first
    raise InputError(
        f"{min(len(set(of)) for of in asked)} questions are too few to fit an adjusted direction on each half of them: take more questions"
    )


@dataclass(frozen=True)
class _Fits:
    """The rows of a contrast and of those projected out, stacked; a fit is a vector with one weight for each row."""

    parts: Sequence[ContrastArrays]
    asked: Sequence[Int[np.ndarray, " _"]]
    """Of each contrast's rows, which question they belong to, as a number."""
    covariates: Mapping[str, Covariate]
    gram: Float[np.ndarray, "layers rows rows"]
    """Inner products of the rows, each contrast centred on its mean (a fit's weights on a contrast add up to 0, so this changes nothing)."""

    @classmethod
    def of(cls, rows: ContrastArrays, taken: Taken) -> "_Fits":
        parts = (rows, *taken.contrasts)
        grams = []
        for layer in range(rows.activations.shape[1]):
            read = [c.activations[:, layer].astype(np.float64) for c in parts]
            h = np.concatenate([x - x.mean(0) for x in read])
            grams.append(h @ h.T)
        asked = [np.unique(c.questions, return_inverse=True)[1] for c in parts]
        return cls(parts, asked, taken.covariates, np.stack(grams))

    def adjusted(
        self, sets: Sequence[Collection[str]], rng: np.random.Generator
    ) -> list[Float[np.ndarray, "layers rows"]]:
        """Weights of each set's direction; zero where it is nothing but rounding."""
        found = []
        for questions in sets:
            plain = self.norms(self._by_layer(self._weights(0, questions, {})))
            w = self._by_layer(self._weights(0, questions, self.covariates))
            if len(self.parts) > 1:
                others, inverse, along = self.shares(questions, rng)
                share = np.einsum("ljk,lk->lj", inverse, along)
                w = w - sum(share[:, j, None] * o for j, o in enumerate(others))
            found.append(np.where((self.norms(w) < 1e-6 * plain)[:, None], 0.0, w))
        return found

    def shares(
        self, questions: Collection[str], rng: np.random.Generator
    ) -> tuple[list[np.ndarray], Float[np.ndarray, "layers k k"], Float[np.ndarray, "layers k"]]:
        """The others' weights by layer, ⟨oₐ·o_b⟩⁻¹, and ⟨oₐ·y_b⟩, over halvings of some questions."""
        others = range(1, len(self.parts))
        asked = [[q for q in dict.fromkeys(c.questions) if q in questions] for c in self.parts]
        apart, alike, along = (
            np.zeros((len(self.gram), len(others), n)) for n in (len(others), len(others), 1)
        )
        for _ in range(HALVINGS):
            halves = halved(asked, rng=rng)
            o = [np.stack([self._weights(j, h, {}) for j in others]) for h in halves]
            y = [self._by_layer(self._weights(0, h, self.covariates))[..., None] for h in halves]
            for a, b in ((0, 1), (1, 0)):
                apart += o[a] @ self.gram @ o[b].T
                alike += o[a] @ self.gram @ o[a].T
                along += o[a] @ self.gram @ y[b]
        n = 2 * HALVINGS
        inverse = np.stack([_inverse(p, q) for p, q in zip(apart / n, alike / n, strict=True)])
        return [self._by_layer(self._weights(j, questions, {})) for j in others], inverse, along[..., 0] / n

    def dot(self, one: np.ndarray, other: np.ndarray) -> Float[np.ndarray, " layers"]:
        product: np.ndarray = np.einsum("ln,lnm,lm->l", one, self.gram, other)
        return product

    def norms(self, w: np.ndarray) -> Float[np.ndarray, " layers"]:
        norms: np.ndarray = np.sqrt(np.maximum(self.dot(w, w), 0))
        return norms

    def vectors(self, w: Float[np.ndarray, "layers rows"]) -> Float[np.ndarray, "layers d"]:
        found, at = np.zeros(self.parts[0].activations.shape[1:]), 0
        for c in self.parts:
            mine = w[:, at : at + len(c.signs)]
            if mine.any():
                found += np.stack([m @ c.activations[:, i].astype(np.float64) for i, m in enumerate(mine)])
            at += len(c.signs)
        return found

    def _by_layer(self, w: Float[np.ndarray, "*layers rows"]) -> Float[np.ndarray, "layers rows"]:
        return np.broadcast_to(w, (len(self.gram), w.shape[-1]))

    def _weights(
        self, which: int, of: Collection[str], covariates: Mapping[str, Covariate]
    ) -> Float[np.ndarray, "*layers rows"]:
        """Of a contrast's direction of some questions, without what covariates explain of it; by layer where a covariate is."""
        rows, start = self.parts[which], sum(len(c.signs) for c in self.parts[:which])
        wanted = set(of)
        at = np.flatnonzero([question in wanted for question in rows.questions])
        if not len(at):
            raise InputError("an adjusted direction cannot be fitted on no question of one of its contrasts")
        questions = self.asked[which][at]
        _, group = np.unique(questions, return_inverse=True)
        w = fit_weights(np.array(rows.signs)[at], questions)
        if by_layer(covariates):
            n = len(self.gram)
            each = [at_layer(covariates, layer, n) for layer in range(n)]
            w = np.stack([_unexplained(w, covariate, at, group) for covariate in each])
        elif covariates:
            w = _unexplained(w, covariates, at, group)
        found = np.zeros((*w.shape[:-1], self.gram.shape[1]))
        found[..., start + at] = w
        return found


def _unexplained(
    w: Float[np.ndarray, " k"],
    covariates: Mapping[str, Float[np.ndarray, " n"]],
    at: Int[np.ndarray, " k"],
    group: Int[np.ndarray, " k"],
) -> Float[np.ndarray, " k"]:
    """A direction's weights on some rows without what covariates explain: w − pinv(C̃)ᵀ Cᵀw, with C̃ the covariates around their questions' means."""
    design = np.stack([np.asarray(v, dtype=np.float64)[at] for v in covariates.values()], 1)
    left: np.ndarray = w - np.linalg.pinv(within_questions(design, group)).T @ (design.T @ w)
    return left


def _inverse(apart: Float[np.ndarray, "k k"], alike: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """Inverse of the products between halves, of which no eigenvalue, relative to the products within a half, is let below `LEAST_RELIABLE`."""
    scale = 1e-9 * max(float(np.trace(alike)), 1e-300)
    sizes, axes = eigh((apart + apart.T) / 2, alike + scale * np.eye(len(alike)))
    inverse: np.ndarray = axes @ np.diag(1 / np.maximum(sizes, LEAST_RELIABLE)) @ axes.T
    return inverse

"""Nulls: what a number would be if there were nothing to find; usable with any result.

A null is a statistic computed again and again on something that cannot carry the effect: another direction, or
the same rows with their labels exchanged. Sources: Westfall & Young 1993 (max-T); Phipson & Smyth 2010 (why a
p value from random draws is never zero).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from mech.errors import InputError

Vectors = Float[np.ndarray, "layers d"]
Statistic = Callable[[np.ndarray], Any]
"""What is measured: takes a direction (or labels), gives a float or an array over layers."""
Draw = Callable[[np.random.Generator], np.ndarray]
"""One direction a call, of the same shape as the direction it is held against."""
Tail = Literal["two-sided", "greater"]


@dataclass(frozen=True)
class Null:
    """A statistic beside what it is where there is nothing to find."""

    name: str
    """Which null."""
    observed: Any
    """The statistic itself: a float or an array over layers."""
    draws: Float[np.ndarray, "n ..."]
    """The statistic on every draw."""
    p_value: Any
    """(1 + number of draws at least as extreme) / (1 + draws), of the same shape as `observed`."""
    seed: int | None
    """Repeats the draws; None where nothing was drawn (a supplied list)."""


def compare(
    name: str,
    observed: Any,
    draws: Any,
    *,
    seed: int | None = None,
    tail: Tail = "two-sided",
    centre: float = 0.0,
) -> Null:
    """Hold a statistic against its draws.

    Args:
        name: what the null is called.
        observed: the statistic, a float or an array.
        draws: the statistic of every draw, draws along the first axis.
        seed: the draws' seed, kept with the result.
        tail: `two-sided` counts draws at least as far from `centre`, `greater` those at least as large.
        centre: what the statistic is where nothing happened: 0 for a shift, .5 for an AUROC.

    Raises:
        InputError: no draws, other shapes, an unknown tail, or a value that is not finite.
    """
    found, drawn = np.asarray(observed, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    if tail not in ("two-sided", "greater"):
        raise InputError(f"null {name}: tail is two-sided or greater, not {tail!r}")
    if drawn.ndim == 0 or not len(drawn) or drawn.shape[1:] != found.shape:
        raise InputError(f"null {name}: draws of shape {drawn.shape} for a statistic of shape {found.shape}")
    if not np.isfinite(found).all() or not np.isfinite(drawn).all():
        raise InputError(f"null {name}: not finite (a NaN or an infinity)")
    p = _p(np.abs(drawn - centre) >= np.abs(found - centre)) if tail == "two-sided" else _p(drawn >= found)
    shaped: Any = p if found.shape else float(p)
    return Null(name, observed, drawn, shaped, seed)


def two_sided_p(observed: float | Float[np.ndarray, "..."], null: Float[np.ndarray, "n ..."]) -> Any:
    """(1 + number of null draws at least as far from 0) / (1 + draws): never zero."""
    return _p(np.abs(null) >= np.abs(observed))


def upper_p(observed: float, null: Float[np.ndarray, " n"]) -> float:
    """(1 + number of null draws at least as large) / (1 + draws): never zero."""
    return float(_p(null >= observed))


def _p(extreme: np.ndarray) -> Any:
    return (1 + extreme.sum(0)) / (1 + len(extreme))


# -- other directions -----------------------------------------------------------------------------------


def isotropic_directions(n: int, d: int, rng: np.random.Generator) -> Float[np.ndarray, "n d"]:
    """Unit vectors, uniform on the sphere."""
    return _unit_rows(rng.standard_normal((n, d)))


def covariance_matched_directions(
    samples: Float[np.ndarray, "m d"], n: int, rng: np.random.Generator
) -> Float[np.ndarray, "n d"]:
    """Unit vectors drawn from N(0, covariance of the samples), then normalised.

    A Gaussian combination of the centred samples has exactly their covariance, so no d × d matrix is formed.

    Raises:
        InputError: the samples are all equal.
    """
    centred = samples - samples.mean(0)
    if not centred.any():
        raise InputError("covariance-matched directions need samples that differ")
    return _unit_rows(rng.standard_normal((n, len(samples))) @ centred)


def covariance_matched_projections(
    samples: Float[np.ndarray, "m d"], onto: Float[np.ndarray, " d"], n: int, rng: np.random.Generator
) -> Float[np.ndarray, " n"]:
    """`covariance_matched_directions(samples, n, rng) @ onto` but for rounding, without the directions: from inner products of the samples.

    Raises:
        InputError: the samples are all equal.
    """
    centred = samples - samples.mean(0, dtype=np.float64)
    if not centred.any():
        raise InputError("covariance-matched directions need samples that differ")
    coefficients = rng.standard_normal((n, len(centred)))
    norms = np.sqrt(((coefficients @ (centred @ centred.T)) * coefficients).sum(1))
    projections: np.ndarray = coefficients @ (centred @ onto) / norms
    return projections


def _unit_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    unit: np.ndarray = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit


def exact_norm(direction: Vectors) -> Draw:
    """Random directions with the direction's own norm at every layer."""
    n_layers, width = direction.shape
    return lambda rng: _normed(isotropic_directions(n_layers, width, rng), direction)


def covariance_matched(direction: Vectors, samples: Float[np.ndarray, "m layers d"]) -> Draw:
    """Directions that point where the samples vary, with the direction's own norm: harder than `exact_norm`.

    One set of Gaussian coefficients serves all layers of a draw, so that layers are related as they are in samples.

    Raises:
        InputError: other shapes, or samples that are all equal at a layer.
    """
    _same_shape(samples, direction)
    centred = samples - samples.mean(0, dtype=np.float64)
    if not centred.any((0, 2)).all():
        raise InputError("covariance-matched directions need samples that differ, at every layer")
    return lambda rng: _normed(np.tensordot(rng.standard_normal(len(centred)), centred, 1), direction)


def paraphrase(
    direction: Vectors, one: Float[np.ndarray, "q layers d"], other: Float[np.ndarray, "q layers d"]
) -> Draw:
    """Differences between two neutral wordings of the same length, with the direction's own norm.

    Which wording of a pair is called the positive one is drawn anew each time.

    Args:
        direction: the direction under test; draws take its shape and norms.
        one: activations of neutral texts, one a question.
        other: of other neutral texts of as many tokens, in the same order.

    Raises:
        InputError: other shapes, or the two wordings do not differ at a layer.
    """
    _same_shape(one, direction)
    if one.shape != other.shape:
        raise InputError(f"paraphrases come in pairs: shapes {one.shape} and {other.shape}")
    gaps = one.astype(np.float64) - other
    if not gaps.any((0, 2)).all():
        raise InputError("the two wordings have the same activations at a layer: nothing to draw from")
    return lambda rng: _normed(np.tensordot(rng.choice([-1.0, 1.0], len(gaps)), gaps, 1), direction)


def direction_null(
    name: str,
    statistic: Statistic,
    direction: Vectors,
    draw: Draw,
    *,
    seed: int,
    n: int = 1000,
    tail: Tail = "two-sided",
    centre: float = 0.0,
) -> Null:
    """A statistic of a direction against the same statistic of drawn ones.

    Args:
        name: what the null is called.
        statistic: direction (layers, d) to a float or an array over layers.
        direction: the direction itself.
        draw: `exact_norm(…)`, `covariance_matched(…)`, `paraphrase(…)` or another.
        seed: repeats the draws.
        n: number of draws.
        tail: as in `compare`.
        centre: as in `compare`.
    """
    rng = np.random.default_rng(seed)
    draws = [statistic(draw(rng)) for _ in range(n)]
    return compare(name, statistic(direction), draws, seed=seed, tail=tail, centre=centre)


def supplied_null(
    name: str,
    statistic: Statistic,
    direction: Vectors,
    others: Sequence[Vectors],
    *,
    tail: Tail = "two-sided",
    centre: float = 0.0,
) -> Null:
    """A statistic of a direction against that of given ones: other identities, unrelated traits.

    The others are brought to the direction's norm. Few others give coarse p values: with n of them none is below 1 / (1 + n).

    Raises:
        InputError: no others, or of another shape.
    """
    for other in others:
        _same_shape(other[None], direction)
    draws = [statistic(_normed(other, direction)) for other in others]
    return compare(name, statistic(direction), draws, tail=tail, centre=centre)


def _normed(vectors: Vectors, like: Vectors) -> Vectors:
    scale = np.linalg.norm(like, axis=1, keepdims=True) / np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = vectors * scale
    return scaled


def _same_shape(samples: np.ndarray, direction: np.ndarray) -> None:
    if samples.shape[1:] != direction.shape:
        raise InputError(
            f"the direction has shape {direction.shape} (layers, d_model), what the null is drawn from "
            f"{samples.shape[1:]}"
        )


# -- other labels ---------------------------------------------------------------------------------------


def flip_within(
    signs: Int[np.ndarray, " n"], questions: np.ndarray, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """In a random half of the questions the two sides change places: for one positive and one negative a question."""
    _, group = np.unique(questions, return_inverse=True)
    flipped: np.ndarray = signs * rng.choice([-1, 1], group.max() + 1)[group]
    return flipped


def shuffle_within(
    signs: Int[np.ndarray, " n"], questions: np.ndarray, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Labels are shuffled within each question: for unequal sides (one own name, ten invented ones)."""
    order = np.lexsort((rng.random(len(signs)), questions))
    home = np.lexsort((np.arange(len(signs)), questions))
    shuffled = np.empty_like(signs)
    shuffled[home] = signs[order]
    return shuffled


RELABEL: Mapping[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "flip": flip_within,
    "shuffle": shuffle_within,
}


def permutation_null(
    name: str,
    pipeline: Statistic,
    signs: Int[np.ndarray, " n"],
    questions: np.ndarray,
    *,
    seed: int,
    n: int = 1000,
    relabel: str = "shuffle",
    tail: Tail = "two-sided",
    centre: float = 0.0,
) -> Null:
    """Labels exchanged within questions, through the whole pipeline.

    Args:
        name: what the null is called.
        pipeline: labels (+1, −1 a row) to the number that is reported. All that looked at the labels belongs inside:
            filtering, fitting, the choice of a layer. What stays outside is taken for granted.
        signs: the true labels.
        questions: the question of each row.
        seed: repeats the draws.
        n: number of draws.
        relabel: `flip` or `shuffle`.
        tail: as in `compare`.
        centre: as in `compare`.

    Raises:
        InputError: an unknown way to relabel, or labels and questions of unequal length.
    """
    if relabel not in RELABEL:
        raise InputError(f"relabel is {' or '.join(RELABEL)}, not {relabel!r}")
    if len(signs) != len(questions):
        raise InputError(f"{len(signs)} labels for {len(questions)} questions")
    rng = np.random.default_rng(seed)
    draws = [pipeline(RELABEL[relabel](signs, questions, rng)) for _ in range(n)]
    return compare(name, pipeline(signs), draws, seed=seed, tail=tail, centre=centre)


def sign_flip_null(
    name: str, differences: Float[np.ndarray, "q ..."], *, seed: int, n: int = 1000, tail: Tail = "two-sided"
) -> Null:
    """The mean of paired differences against the mean with random signs, one sign a question.

    Exact where a difference is as likely as its negative under no effect; the tails may be as heavy as they like.

    Args:
        name: what the null is called.
        differences: one a question (average the rows of a question first); trailing axes are kept together.
        seed: repeats the draws.
        n: number of draws.
        tail: as in `compare`.
    """
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], (n, len(differences)))
    draws = np.tensordot(flips, differences, 1) / len(differences)
    return compare(name, np.mean(differences, axis=0, dtype=np.float64), draws, seed=seed, tail=tail)


def max_t(null: Null, *, centre: float = 0.0) -> Float[np.ndarray, " layers"]:
    """Two-sided p values by layer, corrected for having looked at all layers (single-step max-T).

    Every layer is first divided by its spread over draws and observation together, so that layers of large norm do
    not rule. The chance of one or more false alarms over all layers is at most the level.

    Raises:
        InputError: the null is not one over layers.
    """
    if null.draws.ndim != 2:
        raise InputError(
            f"max-T needs a statistic by layer; null {null.name} has draws of shape {null.draws.shape}"
        )
    both = np.abs(np.vstack([np.asarray(null.observed)[None], null.draws]) - centre)
    spread = np.sqrt((both**2).mean(0))
    t = np.divide(both, spread, out=np.zeros_like(both), where=spread > 0)
    p: np.ndarray = _p(t[1:].max(1)[:, None] >= t[0])
    return p


def holm(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """P values corrected for their number (Holm 1979), where there are no draws in common to take a maximum over.

    The chance of one or more false alarms is at most the level, however the tests depend on each other.
    """
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected

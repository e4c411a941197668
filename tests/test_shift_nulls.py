"""Permutations through the fit, and names in the own name's place: against refitting, and with nothing to find."""

import numpy as np
import pytest
from scipy import stats

from analysis.shift_nulls import Relabelled, null_columns, permuted, wrong_names
from mech.errors import InputError
from probes.contrast import ContrastArrays
from probes.direction import fit_direction, fit_weights


def contrast(
    rng: np.random.Generator, *, questions: int = 8, against: int = 3, size: float = 0.0
) -> ContrastArrays:
    """One positive row and some negative ones a question; `size` of what the positive has, along the first axis."""
    n = questions * (1 + against)
    h = rng.standard_normal((n, 2, 12)) + 5
    signs = [1 if i % (1 + against) == 0 else -1 for i in range(n)]
    h[np.array(signs) > 0, :, 0] += size
    return ContrastArrays(h, signs, [f"q{i // (1 + against)}" for i in range(n)], ["extract"] * n)


def fitted(rows: ContrastArrays, signs: list[int]) -> np.ndarray:
    found = fit_direction("d", rows.activations, rows.questions, signs, rng=np.random.default_rng(0))
    return found.unit


def test_weights_are_the_fit() -> None:
    rows = contrast(np.random.default_rng(0))
    weights = fit_weights(np.array(rows.signs), np.array(rows.questions))
    direction = np.einsum("r,rld->ld", weights, rows.activations)
    unit = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, fitted(rows, list(rows.signs)), atol=1e-6)
    with pytest.raises(InputError, match="both sides"):
        fit_weights(np.array([1, 1, -1, 1]), np.array(["a", "a", "b", "b"]))


def test_permuted_directions_are_refitted_ones() -> None:
    rng = np.random.default_rng(1)
    rows, mean = contrast(rng), rng.standard_normal((2, 12))
    found: Relabelled = permuted(rows, rng=rng, n=20)
    along = found.along(mean)
    for weights, shifts in zip(found.weights, along, strict=True):
        signs = np.where(weights > 0, 1, -1).tolist()
        np.testing.assert_allclose(shifts, (fitted(rows, signs) * mean).sum(1), atol=1e-5)
    assert len({tuple(w) for w in found.weights}) > 10


def test_wrong_names_are_fitted_without_the_own_one() -> None:
    rng = np.random.default_rng(2)
    rows, mean = contrast(rng, against=4, size=9.0), rng.standard_normal((2, 12))
    along = wrong_names(rows).along(mean)
    assert along.shape == (4, 2)
    others = [i for i, s in enumerate(rows.signs) if s < 0]
    without = ContrastArrays(
        rows.activations[others],
        [-1] * len(others),
        [rows.questions[i] for i in others],
        ["extract"] * len(others),
    )
    for k in range(4):
        signs = [1 if i % 4 == k else -1 for i in range(len(others))]
        np.testing.assert_allclose(along[k], (fitted(without, signs) * mean).sum(1), atol=1e-5)
    with pytest.raises(InputError, match="two or more"):
        wrong_names(contrast(rng, against=1))


def test_a_planted_shift_is_beyond_permutations_and_none_is_uniform() -> None:
    rng = np.random.default_rng(3)
    rows = contrast(rng, questions=12, size=6.0)
    unit, along = fitted(rows, list(rows.signs)), np.zeros((2, 12))
    along[:, 0] = 1.0
    found = permuted(rows, rng=rng, n=400)
    told = null_columns("permutation", (unit * along).sum(1), found.along(along))
    assert (told["p_permutation"] < 0.01).all()
    assert told["n_permutation"] == 400
    nothing = []
    for _ in range(100):
        rows, mean = contrast(rng), rng.standard_normal((2, 12))
        draws = permuted(rows, rng=rng, n=99).along(mean)
        nothing.append(
            null_columns("permutation", (fitted(rows, list(rows.signs)) * mean).sum(1), draws)[
                "p_permutation"
            ][0]
        )
    assert stats.kstest(nothing, "uniform").pvalue > 0.01


def test_what_does_not_exist_is_said_to_be_missing() -> None:
    told = null_columns("wrong_name", np.zeros(2), None)
    assert told["n_wrong_name"] == 0
    assert np.isnan([told["p_wrong_name"], told["largest_wrong_name"]]).all()

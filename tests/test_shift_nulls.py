"""Permutations through the fit, and names in the own name's place: against refitting, and with nothing to find."""

import numpy as np
import pytest
from scipy import stats

from analysis.shift import shift_by_layer
from analysis.shift_nulls import Relabelled, null_columns, permuted, wrong_names
from mech.errors import InputError
from probes.contrast import ContrastArrays
from probes.direction import fit_direction, fit_weights
from probes.turned import turned_projections


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


@pytest.mark.parametrize(("layers", "d"), [(5, 40), (12, 18), (3, 3)])
def test_turned_projections_are_those_of_whole_rotations(layers: int, d: int) -> None:
    """Against rotations that are formed (scipy), where there is room for them beside the span of both and where there is not."""
    rng = np.random.default_rng(4)
    unit, onto = (np.cumsum(rng.standard_normal((layers, d)), 0) for _ in range(2))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    found = turned_projections(unit, onto, 2000, rng)
    whole = stats.ortho_group.rvs(d, size=1000, random_state=np.random.default_rng(5))
    expected = np.einsum("ld,nde,le->nl", unit, whole, onto)
    for layer in range(layers):
        assert stats.ks_2samp(found[:, layer], expected[:, layer]).pvalue > 0.001
    np.testing.assert_allclose(np.corrcoef(found.T), np.corrcoef(expected.T), atol=0.15)
    largest = [np.abs(x / expected.std(0)).max(1) for x in (found, expected)]
    assert stats.ks_2samp(*largest).pvalue > 0.001
    assert not turned_projections(unit, np.zeros_like(onto), 10, rng).any()


def test_all_layers_together_keep_the_level_where_a_direction_turns_from_layer_to_layer() -> None:
    """A shift that is one vector in all layers, and a direction that is not: one random vector for all layers would be wrong in one of three."""
    rng, wrong = np.random.default_rng(6), []
    related = np.linalg.cholesky(0.8 ** np.abs(np.subtract.outer(np.arange(20), np.arange(20))))
    base = rng.standard_normal((8, 20, 48))
    for _ in range(80):
        tuned = base + rng.standard_normal(48)
        direction = related @ rng.standard_normal((20, 48))
        found = shift_by_layer(base, tuned, direction, np.arange(8), rng=rng, n_boot=10, n_null=200)
        wrong.append([(found.p_random <= 0.05).any(), (found.p_random_max <= 0.05).any()])
    at_a_layer, over_layers = np.mean(wrong, axis=0)
    assert at_a_layer > 0.25
    assert over_layers <= 0.12  # 80 shifts: 3 standard errors above .05

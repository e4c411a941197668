"""Adjusted directions, held out: nothing of a question reaches what scores it, confounds are gone from rows unseen, truths beside them stay."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from mech.errors import InputError
from probes.adjusted import Taken, adjusted_split_half, clean, fit_adjusted, halved
from probes.contrast import ContrastArrays
from probes.crossfit import CrossFit, cross_fit_adjusted
from probes.direction import fit_direction
from probes.residual import project_out, regress_out
from probes.separability import heldout_auroc

NOTHING = Taken({}, [])


def contrast(h: np.ndarray, signs: np.ndarray, *, prefix: str = "q") -> ContrastArrays:
    """One positive and one negative row a question, one layer; the first half to extract."""
    n = len(h) // 2
    splits = [half for i in range(n) for half in ["extract" if i < n // 2 else "evaluate"] * 2]
    asked = [f"{prefix}{i}" for i in range(n) for _ in range(2)]
    return ContrastArrays(h[:, None], signs.tolist(), asked, splits)


def by_covariate(
    rng: np.random.Generator, *, effect: float, truth: float, n: int = 24
) -> tuple[ContrastArrays, Taken]:
    """Sides differ in a covariate, which moves the rows along one axis; the truth lies along another, beside it."""
    signs = np.tile([1, -1], n)
    length = 20 + 3 * signs + rng.normal(0, 5, 2 * n) + np.repeat(rng.normal(0, 2, n), 2)
    h = rng.standard_normal((2 * n, 20)) + 2 * np.repeat(rng.standard_normal((n, 20)), 2, 0)
    h[:, 0] += effect * length
    h[:, 1] += truth * signs
    return contrast(h, signs), Taken({"length": length}, [])


def by_direction(
    rng: np.random.Generator, *, effect: float, truth: float, shared: bool = False, n: int = 30
) -> tuple[ContrastArrays, Taken]:
    """Sides differ along the axis of another contrast, with the same questions, and with the same positive rows where `shared`."""
    signs = np.tile([1, -1], n)
    h, other = rng.standard_normal((2, 2 * n, 60)) + 2 * np.repeat(rng.standard_normal((n, 60)), 2, 0)
    for rows in (h, other):
        rows[:, 0] += effect * signs
    if shared:
        other[::2] = h[::2]
    h[:, 1] += truth * signs
    return contrast(h, signs), Taken({}, [contrast(other, signs)])


def scored(found: CrossFit, rows: ContrastArrays) -> tuple[float, bool]:
    """AUROC, and whether its interval holds one half."""
    area = heldout_auroc(found.scores, rows.signs, rows.questions)
    return float(area.auroc[0]), bool(area.low[0] <= 0.5 <= area.high[0])


def test_a_fit_is_regression_and_projection() -> None:
    """The weights of rows against cleaning the rows and projecting the difference of means; others without noise are known exactly."""
    rng = np.random.default_rng(0)
    rows, covariate = by_covariate(rng, effect=1, truth=1)
    more = {**covariate.covariates, "surprisal": rng.standard_normal(48)}
    signs = np.tile([1.0, -1.0], 24)
    others = [contrast(np.outer(signs, axis), signs.astype(int)) for axis in rng.standard_normal((2, 20))]
    taken, every = Taken(more, others), set(rows.questions)
    h = regress_out(rows.activations, more, rows.questions)
    raw, *rest = (
        fit_direction("d", x, rows.questions, rows.signs, rng=rng) for x in (h, *(o.activations for o in others))
    )  # fmt: skip
    found = fit_adjusted(rows, Taken(more, []), every, rng=rng)
    np.testing.assert_allclose(found, raw.vectors, atol=1e-5)
    found = fit_adjusted(rows, taken, every, rng=rng)
    np.testing.assert_allclose(found, project_out(raw, rest).vectors, atol=0.05)
    cleaned = clean(rows, taken, every, rng=rng)
    left = fit_direction("d", cleaned, rows.questions, rows.signs, rng=rng)
    np.testing.assert_allclose(left.vectors, project_out(raw, rest).vectors, atol=1e-5)


def several_layers(
    rng: np.random.Generator,
) -> tuple[ContrastArrays, Taken, list[tuple[ContrastArrays, Taken]]]:
    """Three layers, each with a covariate of its own beside one that is the same at all; and each layer by itself."""
    alone = [by_covariate(rng, effect=effect, truth=1) for effect in (0.5, 1, 2)]
    other, _ = by_covariate(rng, effect=0, truth=2)
    surprisal = rng.standard_normal(len(other.signs))

    def beside(norm: np.ndarray, n_layers: int) -> Taken:
        h = np.repeat(other.activations, n_layers, axis=1)
        return Taken({"norm": norm, "surprisal": surprisal}, [replace(other, activations=h)])

    norms = [taken.covariates["length"] for _, taken in alone]
    h = np.concatenate([rows.activations for rows, _ in alone], axis=1)
    each = [(rows, beside(norm, 1)) for (rows, _), norm in zip(alone, norms, strict=True)]
    return replace(alone[0][0], activations=h), beside(np.stack(norms, 1), 3), each


def test_a_covariate_of_every_layer_acts_on_its_own() -> None:
    """As each layer by itself, where it is one number a row; and as regression with a dummy for each question."""
    rows, taken, each = several_layers(np.random.default_rng(7))
    half = taken.questions(rows, "extract")

    def drawn() -> np.random.Generator:
        return np.random.default_rng(1)

    found = fit_adjusted(rows, taken, half, rng=drawn())
    agreed = adjusted_split_half(rows, taken, half, rng=drawn(), n_splits=4)
    cleaned = clean(rows, taken, half, rng=drawn())
    for i, (layer, of_layer) in enumerate(each):
        np.testing.assert_allclose(found[i], fit_adjusted(layer, of_layer, half, rng=drawn())[0], atol=1e-9)
        expected = adjusted_split_half(layer, of_layer, half, rng=drawn(), n_splits=4)
        np.testing.assert_allclose(agreed[i], expected[0], atol=1e-9)
        np.testing.assert_allclose(cleaned[:, i], clean(layer, of_layer, half, rng=drawn())[:, 0], atol=1e-9)
    left = regress_out(rows.activations, taken.covariates, rows.questions)
    dummies = np.array(rows.questions)[:, None] == np.unique(rows.questions)
    for i, (_, of_layer) in enumerate(each):
        covariates = np.stack(list(of_layer.covariates.values()), 1)
        fitted = LinearRegression(fit_intercept=False).fit(
            np.column_stack([covariates, dummies]), rows.activations[:, i]
        )
        explained = (covariates - covariates.mean(0)) @ fitted.coef_[:, :2].T
        np.testing.assert_allclose(left[:, i], rows.activations[:, i] - explained, atol=1e-8)


def test_sides_that_differ_in_norm_alone_are_not_told_apart_without_it() -> None:
    rng, raw, adjusted = np.random.default_rng(9), [], []
    signs = np.tile([1, -1], 30)
    for _ in range(20):
        h = 3 * rng.standard_normal(40) + rng.standard_normal((60, 40))
        h *= (1 + 0.05 * signs + 0.05 * rng.standard_normal(60))[:, None]
        rows = contrast(h, signs)
        taken = Taken({"norm": np.linalg.norm(rows.activations, axis=2)}, [])
        raw.append(scored(cross_fit_adjusted(rows, NOTHING, k=5, rng=rng), rows)[0])
        adjusted.append(scored(cross_fit_adjusted(rows, taken, k=5, rng=rng), rows)[0])
    assert np.mean(raw) > 0.7
    assert abs(np.mean(adjusted) - 0.5) < 0.06


def test_covariates_of_other_layers_are_refused() -> None:
    rows, taken, _ = several_layers(np.random.default_rng(7))
    wrong = {"norm": np.ones((len(rows.signs), 2))}
    with pytest.raises(InputError, match="norm: one number for each of the 3 layers"):
        regress_out(rows.activations, wrong, rows.questions)
    with pytest.raises(InputError, match="norm: one number for each of the 3 layers"):
        fit_adjusted(rows, Taken(wrong, []), taken.questions(rows), rng=np.random.default_rng(0))


@pytest.mark.parametrize("make", [by_covariate, by_direction])
def test_nothing_of_a_question_reaches_what_scores_it(make: object) -> None:
    rows, taken = make(np.random.default_rng(1), effect=2, truth=1)  # type: ignore[operator]
    other = contrast(np.random.default_rng(2).standard_normal((20, rows.activations.shape[2])), np.tile([1, -1], 10), prefix="o")  # fmt: skip
    taken = Taken(taken.covariates, [*taken.contrasts, other])
    found = cross_fit_adjusted(rows, taken, k=5, rng=np.random.default_rng(3))
    assert set(found.fold_of) == taken.questions(rows)
    assert {found.fold_of[q] for q in other.questions} == set(range(5))
    of_fold = {q for q, fold in found.fold_of.items() if fold == 2}

    def changed(c: ContrastArrays) -> ContrastArrays:
        h = c.activations.copy()
        h[np.isin(c.questions, list(of_fold))] *= -50
        return ContrastArrays(h, c.signs, c.questions, c.splits)

    here = np.isin(rows.questions, list(of_fold))
    covariates = {k: np.where(here, v[::-1], v) for k, v in taken.covariates.items()}
    moved = Taken(covariates, [changed(c) for c in taken.contrasts])
    again = cross_fit_adjusted(changed(rows), moved, k=5, rng=np.random.default_rng(3))
    np.testing.assert_allclose(again.vectors[2], found.vectors[2], atol=1e-9)
    assert not np.allclose(again.vectors[1], found.vectors[1])


@pytest.mark.parametrize("shared", [False, True])
def test_a_confound_that_is_projected_out_separates_nothing(shared: bool) -> None:
    """Half of the other's direction is noise here, so that projecting it out as it was found leaves half of the confound."""
    rng, found, halves, naive = np.random.default_rng(5), [], [], []
    for _ in range(40):
        rows, taken = by_direction(rng, effect=1.5, truth=0, shared=shared)
        found.append(scored(cross_fit_adjusted(rows, taken, k=5, rng=rng), rows))
        half = taken.questions(rows, "extract")
        halves.append(adjusted_split_half(rows, taken, half, rng=rng, n_splits=4)[0])
        made, test = rows.of_split("extract"), rows.of_split("evaluate")
        whole, other = (
            fit_direction("d", c.activations, c.questions, c.signs, rng=rng)
            for c in (made, taken.contrasts[0].of_split("extract"))
        )
        simple = np.einsum("nld,ld->nl", test.activations, project_out(whole, [other]).vectors)
        naive.append(heldout_auroc(simple, test.signs, test.questions).auroc[0])
    areas, holds = np.array(found).T
    assert areas.mean() == pytest.approx(0.5, abs=0.03)
    assert (
        holds.mean() >= 0.7
    )  # not .95: what little of the other stays is common to all rows, and no interval over questions sees it
    assert np.mean(halves) == pytest.approx(0, abs=0.05)
    assert np.mean(naive) > areas.mean() + 0.05  # what the care is for
    kept = []
    for _ in range(8):
        rows, taken = by_direction(rng, effect=1.5, truth=3, shared=shared)
        kept.append(scored(cross_fit_adjusted(rows, taken, k=5, rng=rng), rows)[0])
    assert np.mean(kept) > 0.85


def test_a_confound_carried_by_a_covariate_separates_nothing() -> None:
    rng, found, raw, halves = np.random.default_rng(7), [], [], []
    for i in range(100):
        rows, taken = by_covariate(rng, effect=1, truth=0)
        found.append(scored(cross_fit_adjusted(rows, taken, k=5, rng=rng), rows))
        if i < 20:
            raw.append(scored(cross_fit_adjusted(rows, NOTHING, k=5, rng=rng), rows)[0])
        halves.append(adjusted_split_half(rows, taken, set(rows.questions), rng=rng, n_splits=4)[0])
    areas, holds = np.array(found).T
    assert np.mean(raw) > 0.7
    assert abs(areas.mean() - 0.5) < 3 * areas.std() / np.sqrt(len(areas))
    assert areas.std() / np.sqrt(len(areas)) < 0.01
    assert holds.mean() >= 0.93
    assert np.mean(halves) == pytest.approx(0, abs=0.04)
    kept = []
    for _ in range(8):
        rows, taken = by_covariate(rng, effect=1, truth=4)
        kept.append(scored(cross_fit_adjusted(rows, taken, k=5, rng=rng), rows)[0])
    assert np.mean(kept) > 0.72  # less than without the covariate: what goes with it went


def test_halves_hold_every_contrast_and_share_no_question() -> None:
    rng = np.random.default_rng(8)
    asked = [["a", "b", "c"], ["b", "x"], ["c", "y", "z"]]
    for _ in range(50):
        first, second = halved(asked, rng=rng)
        assert not first & second
        assert first | second == set("abcxyz")
        assert all(first.intersection(of) and second.intersection(of) for of in asked)
    with pytest.raises(InputError, match="1 questions are too few"):
        halved([["a", "b"], ["a"]], rng=rng)
    rows, taken = by_direction(rng, effect=1, truth=0)
    with pytest.raises(InputError, match="too few to fit"):
        fit_adjusted(rows, taken, {"q0"}, rng=rng)

"""Families of directions: scores that have not seen their question, and agreement only where there is any."""

import numpy as np
import pandas as pd
import pytest

from analysis.family import Member, Part, cosines, transfer, verdicts
from probes.crossfit import cross_fit
from probes.direction import fit_direction
from probes.validation import auroc

# -- cross-fitting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 5, 50])
def test_no_row_is_scored_by_its_own_question(k: int) -> None:
    rng = np.random.default_rng(0)
    asked, signs = np.repeat([f"q{i}" for i in range(10)], 3), np.tile([1, -1, -1], 10)
    h = rng.standard_normal((30, 2, 6))
    found = cross_fit(h, asked.tolist(), signs.tolist(), k=k, rng=np.random.default_rng(1))
    assert found.vectors.shape == (min(k, 10), 2, 6)
    for q in np.unique(asked):
        (fold,) = set(found.fold[asked == q])
        others = found.fold != fold
        fit = fit_direction("d", h[others], asked[others].tolist(), signs[others].tolist(), rng=rng)
        np.testing.assert_allclose(found.vectors[fold], fit.unit, atol=1e-5)
        changed = h.copy()
        changed[asked == q] += 100 * rng.standard_normal((3, 2, 6))
        again = cross_fit(changed, asked.tolist(), signs.tolist(), k=k, rng=np.random.default_rng(1))
        np.testing.assert_array_equal(again.vectors[fold], found.vectors[fold])


def test_cross_fitted_auroc_of_nothing_averages_one_half() -> None:
    """Questions differ, sides do not; one question against its neighbours included."""
    rng, areas = np.random.default_rng(5), []
    asked, signs = np.repeat([f"q{i}" for i in range(12)], 2).tolist(), np.tile([1, -1], 12)
    for _ in range(300):
        h = rng.standard_normal((24, 1, 8)) + 2 * np.repeat(rng.standard_normal((12, 1, 8)), 2, 0)
        scores = cross_fit(h, asked, signs.tolist(), k=4, rng=rng).scores
        areas.append(float(auroc(scores, signs)[0]))
    assert abs(np.mean(areas) - 0.5) < 3 * np.std(areas) / np.sqrt(len(areas))
    assert np.std(areas) / np.sqrt(len(areas)) < 0.01


# -- families --------------------------------------------------------------------------------------------


def family(rng: np.random.Generator, axes: list[np.ndarray], strength: float = 2.5) -> list[Member]:
    """Members whose contrasts lie along given axes, with as much noise as contrast."""
    members = []
    for i, axis in enumerate(axes):
        signs = np.tile([1, -1], 20)
        h, made = rng.standard_normal((2, 40, 30)) + strength * signs[:, None] * axis
        members.append(member(f"m{i}", made, h, signs, [f"q{j // 2}" for j in range(40)]))
    return members


def member(name: str, made: np.ndarray, h: np.ndarray, signs: np.ndarray, asked: list[str]) -> Member:
    fit = fit_direction(name, made[:, None], asked, signs.tolist(), rng=np.random.default_rng(0))
    held_out = Part(h, signs.tolist(), [f"held out {q}" for q in asked])
    return Member(fit, Part(made, signs.tolist(), asked), held_out)


def test_shared_rows_do_not_make_a_cosine() -> None:
    """Two contrasts of nothing, with the same positive rows: only their noise is one."""
    rng, found = np.random.default_rng(8), []
    signs, asked = np.tile([1, -1], 20), [f"q{j // 2}" for j in range(40)]
    for _ in range(60):
        first, second = rng.standard_normal((2, 40, 30))
        second[::2] = first[::2]
        pair = [member(n, made, made, signs, asked) for n, made in (("a", first), ("b", second))]
        found.append(cosines(pair, 0, rng=rng, n_null=200))
    table = pd.concat(found)
    assert table["cosine"].mean() > 0.4
    assert abs(table["cosine_disjoint"].mean()) < 0.05
    assert (table["p_flip"] < 0.05).mean() < 0.12
    for noise in (0.4, 1.2):  # of one truth, disjoint halves reach their ceiling, whatever the noise
        axis = np.eye(30)[0]
        two = pd.concat(
            [
                cosines(family(rng, [axis, axis], strength=1 / noise), 0, rng=rng, n_null=200)
                for _ in range(25)
            ]
        )
        assert two["cosine_disjoint"].mean() / two["ceiling_disjoint"].mean() == pytest.approx(1, abs=0.12)
        assert (two["p_flip"] < 0.05).mean() > 0.6


def test_a_cross_fitted_member_never_scores_what_it_has_seen() -> None:
    rng = np.random.default_rng(9)
    (a,) = family(rng, [np.eye(30)[0]])
    seen = Part(a.extract.rows, a.extract.signs, a.extract.questions)
    assert np.isnan(a.score(seen, 0)).all()
    h, asked, signs = seen.rows[:, None], list(seen.questions), list(seen.signs)
    crossed = cross_fit(h, asked, signs, k=4, rng=rng)
    fold_of = dict(zip(asked, crossed.fold.tolist(), strict=True))
    whole = Member(a.direction, a.extract, seen, crossed.vectors[:, 0], fold_of)
    centred = seen.rows - seen.rows.mean(0)
    expected = np.einsum("nd,nd->n", centred, crossed.vectors[crossed.fold, 0])
    np.testing.assert_allclose(whole.score(seen, 0), expected)
    np.testing.assert_allclose(whole.score(a.held_out, 0), a.score(a.held_out, 0))


def test_a_family_agrees_only_where_its_members_are_one() -> None:
    rng = np.random.default_rng(0)
    one, other = np.eye(30)[0], np.eye(30)[1]
    members = family(rng, [one, one, other])
    found = cosines(members, 0, rng=rng, n_null=500)
    moved = transfer(members, 0, rng=rng, n_null=300)
    verdict = verdicts(found, moved).set_index(["direction", "other"])
    assert verdict.loc[("m0", "m1"), "agree_all"]
    assert not (verdict["agree_all"] & ~verdict["agree"]).any()
    table = verdict["agree"]
    assert table["m0", "m1"]
    assert not table["m0", "m2"]
    assert not table["m1", "m2"]
    own = moved[moved["direction"] == moved["contrast"]]
    assert (own["auroc"] > 0.95).all()
    cross = moved[(moved["direction"] == "m0") & (moved["contrast"] == "m2")]
    assert cross["null_low"].item() < cross["auroc"].item() < cross["null_high"].item()
    halves = np.sqrt(np.prod([2 * (r := float(m.direction.split_half[0])) / (1 + r) for m in members[:2]]))
    np.testing.assert_allclose(found["ceiling"].iloc[0], halves, rtol=1e-5)


def test_a_contrast_is_not_its_own_null() -> None:
    """Ten questions: rows vary along the contrast more than the mean of five questions tells where it lies."""
    rng, axes = np.random.default_rng(3), np.eye(30)[[0, 0, 1]]
    signs, asked = np.tile([1, -1], 10), [f"q{j // 2}" for j in range(20)]
    members = [
        member(f"m{i}", *(rng.standard_normal((2, 20, 30)) + 2.5 * signs[:, None] * axis), signs, asked)
        for i, axis in enumerate(axes)
    ]
    found, moved = cosines(members, 0, rng=rng, n_null=500), transfer(members, 0, rng=rng, n_null=300)
    agree = verdicts(found, moved).set_index(["direction", "other"])["agree"]
    assert agree[("m0", "m1")]
    assert not agree[("m0", "m2")]
    assert not agree[("m1", "m2")]


def test_of_many_pairs_of_nothing_hardly_one_agrees_when_their_number_is_reckoned_with() -> None:
    """Six unrelated contrasts at a time: 15 pairs. Each of the two corrected nulls is wrong about any of them in at most one family in twenty."""
    rng, raw, corrected = np.random.default_rng(11), [], []
    for _ in range(40):
        found = cosines(family(rng, [np.zeros(30)] * 6), 0, rng=rng, n_null=400)
        raw.append((found[["p_null", "p_flip"]] < 0.05).any().to_numpy())
        corrected.append((found[["p_null_all", "p_flip_all"]] < 0.05).any().to_numpy())
        assert (found["p_null_all"] >= found["p_null"]).all()
    assert (np.mean(corrected, 0) <= 0.12).all()  # 40 families: 2 standard errors above .05
    assert np.mean(raw, 0)[1] > 0.3
    members = family(rng, [np.eye(30)[0]] * 3)
    moved = transfer(members, 0, rng=rng, n_null=50)
    assert (moved["auroc_low_all"] <= moved["auroc_low"]).all()
    assert (moved["auroc_low_all"] < moved["auroc_low"]).any()

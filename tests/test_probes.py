"""Linear probes: against scikit-learn, closed forms, planted truths; and no leak from question to question."""

import numpy as np
import pytest
from scipy import stats
from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from mech.errors import InputError
from probes.direction import fit_direction
from probes.linear import METHODS, fit_probe, ledoit_wolf, probe_direction
from probes.validation import (
    auroc,
    calibration,
    check_apart,
    control_labels,
    group_folds,
    joint_groups,
    out_of_fold,
    row_folds,
    transfer,
    validate,
)

EVERY = pytest.mark.parametrize("method", list(METHODS))


def contrast(q: int, d: int, *, gap: float = 2.0, seed: int = 0, shared: float = 0.0):
    """Pairs of rows, two layers; the sides differ by `gap` along the first axis, `shared` is what a pair has in common."""
    rng = np.random.default_rng(seed)
    signs, questions = np.tile([1, -1], q), np.repeat(np.arange(q), 2)
    h = rng.standard_normal((2 * q, 2, d)) + shared * rng.standard_normal((q, 2, d))[questions]
    h[:, :, 0] += gap / 2 * signs[:, None]
    return h, signs, [f"q{i}" for i in questions]


# -- fits -----------------------------------------------------------------------------------------------


def test_difference_of_means_is_the_direction_of_means() -> None:
    h, signs, questions = contrast(12, 30)
    probe = fit_probe("difference_of_means", h, signs.tolist())
    direction = fit_direction("x", h, questions, signs.tolist(), rng=np.random.default_rng(0))
    np.testing.assert_allclose(probe.weights, direction.vectors, rtol=1e-5, atol=1e-6)
    middle = (h[signs > 0].mean(0) + h[signs < 0].mean(0)) / 2
    np.testing.assert_allclose(probe.score(middle[None]), 0, atol=1e-9)
    np.testing.assert_allclose(probe.threshold, (middle * direction.unit).sum(1), rtol=1e-5)


@pytest.mark.parametrize("d", [8, 60])
def test_lda_is_scikit_learns_in_the_whole_space(d: int) -> None:
    """Fitted on the span of the rows, equal to the fit with a d × d covariance, also with fewer rows than dimensions."""
    h, signs, _ = contrast(15, d)
    x, y = h[:, 0], signs > 0
    within = x - np.where(y[:, None], x[y].mean(0), x[~y].mean(0))
    amount = ledoit_wolf_shrinkage(within, assume_centered=True)
    assert ledoit_wolf(within, d) == pytest.approx(amount)
    whole = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=amount, priors=[0.5, 0.5]).fit(x, y)
    probe = fit_probe("lda", h, signs.tolist())
    np.testing.assert_allclose(probe.weights[0], whole.coef_[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(probe.score(h)[:, 0], whole.decision_function(x), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(probe.probability(h)[:, 0], whole.predict_proba(x)[:, 1], rtol=1e-6)
    closed = np.linalg.solve(
        shrunk_covariance(within.T @ within / len(x), amount), x[y].mean(0) - x[~y].mean(0)
    )
    np.testing.assert_allclose(probe.weights[0], closed, rtol=1e-6, atol=1e-9)


def test_logistic_is_scikit_learns_in_the_whole_space() -> None:
    h, signs, _ = contrast(15, 60)
    x = h[:, 0] - h[:, 0].mean(0)
    scale = np.sqrt((x**2).sum(1).mean())
    whole = LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000, tol=1e-8).fit(
        x / scale, signs > 0
    )
    probe = fit_probe("logistic", h, signs.tolist())
    assert probe.scale[0] == pytest.approx(scale)
    np.testing.assert_allclose(probe.score(h)[:, 0], whole.decision_function(x / scale), atol=2e-3)
    np.testing.assert_allclose(probe.probability(h)[:, 0], whole.predict_proba(x / scale)[:, 1], atol=1e-3)


@pytest.mark.parametrize("method", ["mass_mean", "lda", "logistic"])
def test_gaussian_truth_is_recovered(method: str) -> None:
    """Many rows, unequal variances: weights tend to Σ⁻¹Δ and AUROC to Φ(d′/√2)."""
    rng, n = np.random.default_rng(3), 4000
    sd, gap = np.array([1.0, 3.0, 0.5, 2.0]), np.array([1.0, 2.0, 0.2, 0.0])
    signs = np.tile([1, -1], n // 2)
    h = (rng.standard_normal((n, 4)) * sd + signs[:, None] * gap / 2)[:, None]
    probe, truth = fit_probe(method, h, signs.tolist()), gap / sd**2
    w = probe.weights[0]
    assert w @ truth / np.linalg.norm(w) / np.linalg.norm(truth) > 0.99
    np.testing.assert_allclose(w, truth, atol=0.15)  # log-odds, not only a direction
    d_prime = np.sqrt((gap**2 / sd**2).sum())
    assert auroc(probe.score(h), signs)[0] == pytest.approx(stats.norm.cdf(d_prime / np.sqrt(2)), abs=0.02)


def test_a_difference_of_means_has_the_probabilities_of_bayes() -> None:
    """Its score is no log-odds: the slope makes it them. Two spheres of sd 2, three apart, have log-odds (3 / 2²) x."""
    rng, n = np.random.default_rng(4), 6000
    signs = np.tile([1, -1], n // 2)
    h = 2 * rng.standard_normal((n, 1, 5))
    h[:, 0, 0] += 1.5 * signs
    probe = fit_probe("difference_of_means", h, signs.tolist())
    posterior = stats.logistic.cdf(0.75 * h[:, 0, 0])
    assert np.abs(probe.probability(h)[:, 0] - posterior).max() < 0.05


def test_mass_mean_whitens_with_every_variance_that_is_there() -> None:
    """One massive dimension, as residual streams have them, and a gap that lies where rows vary least."""
    rng, n = np.random.default_rng(8), 600
    sd = np.array([3e3, 1.0, 2.0, 0.05, 1.0, 1.0])
    signs = np.tile([1, -1], n // 2)
    x = rng.standard_normal((n, 6)) * sd + signs[:, None] * np.array([0, 0, 0.2, 0.1, 0, 0])
    probe = fit_probe("mass_mean", x[:, None].astype(np.float32), signs.tolist())
    high, low = x[signs > 0], x[signs < 0]
    pooled = (np.cov(high.T) + np.cov(low.T)) / 2
    np.testing.assert_allclose(
        probe.weights[0], np.linalg.solve(pooled, high.mean(0) - low.mean(0)), rtol=2e-2, atol=2e-2
    )
    assert auroc(probe.score(x[:, None]), signs)[0] > 0.98


@EVERY
def test_rotating_moving_and_exchanging(method: str) -> None:
    h, signs, questions = contrast(14, 40)
    rotation = stats.ortho_group.rvs(40, random_state=1)
    folds = list(group_folds(np.array(questions), signs.tolist(), rng=np.random.default_rng(0), k=4))
    plain = out_of_fold(method, h, signs.tolist(), folds)
    turned = out_of_fold(method, h @ rotation + 7.0, signs.tolist(), folds)
    # The solver of the logistic regression stops at a tolerance; the closed forms agree to rounding.
    np.testing.assert_allclose(turned, plain, atol=5e-3 if method == "logistic" else 1e-6)
    a, b = (fit_probe(method, h, s.tolist()) for s in (signs, -signs))
    np.testing.assert_allclose(a.weights, -b.weights, atol=1e-3)
    np.testing.assert_allclose(a.score(h), -b.score(h), atol=1e-2)


@EVERY
def test_cross_validation_is_fitting_without_the_fold(method: str) -> None:
    h, signs, questions = contrast(10, 50)
    folds = list(group_folds(np.array(questions), signs.tolist(), rng=np.random.default_rng(0), k=5))
    scores = out_of_fold(method, h, signs.tolist(), folds)
    for train, test in folds:
        probe = fit_probe(method, h[train], signs[train].tolist())
        np.testing.assert_allclose(scores[test], probe.score(h[test]) * probe.slope, atol=5e-3)


def test_a_probe_as_direction_knows_how_far_to_be_believed() -> None:
    h, signs, questions = contrast(40, 12, gap=4.0)
    direction = probe_direction("x", "lda", h, signs.tolist(), questions, rng=np.random.default_rng(0))
    assert (direction.unit[:, 0] > 0.9).all()
    assert (direction.split_half > 0.8).all()
    noise = probe_direction("x", "lda", *_none(h, signs), questions, rng=np.random.default_rng(0))
    assert (noise.split_half < 0.6).all()


def _none(h, signs):
    return h, np.random.default_rng(5).permutation(signs).tolist()


# -- validation -----------------------------------------------------------------------------------------


@EVERY
def test_no_leak_by_question(method: str) -> None:
    """Random labels, one a question: nothing to learn by question, everything by row."""
    h, _, questions = contrast(60, 80, gap=0.0, shared=5.0)
    asked, rng = np.array(questions), np.random.default_rng(2)
    labels = control_labels(asked, rng)
    assert all(len(set(labels[asked == q])) == 1 for q in set(questions))
    by_question = list(group_folds(asked, labels.tolist(), rng=rng, k=5))
    by_row = list(row_folds(asked, rng=rng, k=5))
    clean = auroc(out_of_fold(method, h, labels.tolist(), by_question), labels).mean()
    leaky = auroc(out_of_fold(method, h, labels.tolist(), by_row), labels).mean()
    assert clean == pytest.approx(0.5, abs=0.15)
    assert leaky > (0.75 if method == "difference_of_means" else 0.9)  # the blunt one remembers least
    for train, test in by_row:
        with pytest.raises(InputError, match="not by group"):
            check_apart(train, test, asked)


def test_rows_that_share_a_persona_or_a_question_are_one_group() -> None:
    joint = joint_groups(["q0", "q0", "q1", "q2", "q3"], ["a", "b", "b", "c", "c"])
    assert [list(joint == g) for g in dict.fromkeys(joint)] == [
        [True, True, True, False, False],
        [False, False, False, True, True],
    ]


def test_validation_reports_what_was_planted() -> None:
    h, signs, questions = contrast(150, 20, gap=2.0)
    h[:, 1, 0] -= signs  # nothing is left at the second layer
    found = validate("lda", h, signs.tolist(), questions, rng=np.random.default_rng(0))
    assert found.auroc.auroc[0] == pytest.approx(stats.norm.cdf(np.sqrt(2)), abs=0.05)
    assert found.auroc.low[1] < 0.5 < found.auroc.high[1]
    assert found.calibration.expected_error[0] < 0.1
    np.testing.assert_allclose(found.selectivity, found.auroc.auroc - found.control_auroc)
    assert (np.abs(found.control_auroc - 0.5) < 0.1).all()  # rows of a question share nothing here


def test_calibration_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    signs = np.tile([1, -1], 20_000)
    x = rng.standard_normal(40_000) + signs * 0.75  # log-odds of this Gaussian pair: 1.5 x
    good = calibration(np.stack([1.5 * x, 6 * x], axis=1), signs.tolist())
    assert good.expected_error[0] < 0.01 < 0.1 < good.expected_error[1]
    assert good.accuracy[0] == pytest.approx(stats.norm.cdf(0.75), abs=0.01)
    p = 1 / (1 + np.exp(-1.5 * x))
    assert good.brier[0] == pytest.approx(brier_score_loss(signs > 0, p))
    np.testing.assert_allclose(good.reliability[:, :, 2].sum(1), 1)
    with pytest.raises(InputError, match="both sides"):
        calibration(np.zeros((4, 1)), [1, 1, 1, 1])


def test_transfer_keeps_scaler_and_threshold() -> None:
    h, signs, questions = contrast(60, 10, gap=3.0)
    probe = fit_probe("logistic", h, signs.tolist())
    moved = h + 5.0 * probe.weights / np.linalg.norm(probe.weights, axis=1, keepdims=True)
    found = transfer(probe, h, moved, signs.tolist(), questions, seed=0, n_null=200)
    np.testing.assert_allclose(found.tuned.auroc, found.base.auroc)  # both sides moved alike: the order stays
    assert (found.base_accuracy > 0.85).all()
    assert (found.tuned_accuracy < 0.6).all()  # but the threshold did not
    sd = probe.score(h).std(0, ddof=1)
    np.testing.assert_allclose(found.shift, 5.0 * np.linalg.norm(probe.weights, axis=1) / sd)
    np.testing.assert_allclose(found.spread, 1)
    assert found.shift_null.p_value == pytest.approx([1 / 201] * 2)
    same = transfer(probe, h, h, signs.tolist(), questions, seed=0, n_null=200)
    assert not same.shift.any()
    assert (same.shift_null.p_value == 1).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    h, signs, questions = contrast(6, 5)
    for method, rows, labels, message in (
        ("svm", h, signs, "known are difference_of_means"),
        ("lda", h, signs[:-1], "11 labels for 12 rows"),
        ("lda", h, np.ones(12, dtype=int), "two rows a side"),
        ("lda", np.where(h > 2, np.nan, h), signs, "not finite"),
        ("lda", np.ones_like(h), signs, "all equal"),
    ):
        with pytest.raises(InputError, match=message):
            fit_probe(method, rows, labels.tolist())
    with pytest.raises(InputError, match="the probe has shape"):
        fit_probe("lda", h, signs.tolist()).score(h[:, :1])
    with pytest.raises(InputError, match="7 folds of 6"):
        list(group_folds(np.array(questions), signs.tolist(), rng=np.random.default_rng(0), k=7))

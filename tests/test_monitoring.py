"""Correlations overall and within conditions: against scipy, a planted paradox, and their coverage."""

import numpy as np
import pytest
from scipy import stats

from analysis.monitoring import monitor, monitoring_table
from mech.errors import InputError


def rows(q: int, conditions: int, *, between: float, within: float, seed: int):
    """`q` questions under each condition: steps of `between` shared by both measures, correlation `within` beside it."""
    rng = np.random.default_rng(seed)
    noise = rng.multivariate_normal([0, 0], [[1, within], [within, 1]], size=(conditions, q))
    values = noise + between * np.arange(conditions)[:, None, None]
    condition = np.repeat([f"c{i}" for i in range(conditions)], q).tolist()
    asked = np.tile([f"q{i}" for i in range(q)], conditions).tolist()
    return values[..., 0].ravel(), values[..., 1].ravel(), condition, asked


def test_what_is_between_conditions_only_is_seen_as_such() -> None:
    x, y, condition, asked = rows(40, 5, between=3.0, within=0.0, seed=0)
    found = monitor(x, y, condition, asked)
    assert found.overall.estimate == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.overall.low > 0.8
    assert found.within.low < 0 < found.within.high
    groups = np.array(condition)
    dummies = (groups[:, None] == np.unique(groups)).astype(float)
    left = [v - dummies @ np.linalg.lstsq(dummies, v, rcond=None)[0] for v in (x, y)]
    assert found.within.estimate == pytest.approx(stats.pearsonr(*left).statistic)
    for name, interval in found.by_condition.items():
        mine = groups == name
        assert interval.estimate == pytest.approx(stats.pearsonr(x[mine], y[mine]).statistic)
    assert set(found.by_condition) == {"c0", "c1", "c2", "c3", "c4"}


def test_simpsons_paradox_is_told() -> None:
    x, y, condition, asked = rows(40, 5, between=3.0, within=-0.8, seed=1)
    found = monitor(x, y, condition, asked)
    assert found.overall.low > 0 > found.within.high


def test_independent_rows_get_fishers_interval() -> None:
    x, y, _, _ = rows(300, 1, between=0.0, within=0.5, seed=4)
    found = monitor(x, y, ["a"] * 300, [f"q{i}" for i in range(300)])
    low, high = stats.pearsonr(x, y).confidence_interval()
    assert (found.overall.low, found.overall.high) == pytest.approx((low, high), abs=0.02)


@pytest.mark.slow
def test_intervals_cover() -> None:
    """95 % intervals cover in at least 93 % of 500 repetitions, with rows of one question correlated."""
    hit = 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        shared = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=30)
        own = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=(3, 30))
        values = shared + own
        condition = np.repeat(["a", "b", "c"], 30).tolist()
        asked = np.tile([f"q{i}" for i in range(30)], 3).tolist()
        found = monitor(values[..., 0].ravel(), values[..., 1].ravel(), condition, asked)
        hit += found.overall.low <= 0.5 <= found.overall.high
    assert hit / 500 >= 0.93


def test_missing_scores_are_counted_and_left_out() -> None:
    x, y, condition, asked = rows(20, 2, between=1.0, within=0.5, seed=2)
    y[[3, 7]] = np.nan
    found = monitor(x, y, condition, asked)
    kept = np.isfinite(y)
    assert (found.missing, found.n_rows) == (2, 38)
    assert found.overall.estimate == pytest.approx(stats.pearsonr(x[kept], y[kept]).statistic)


def test_what_cannot_be_correlated_is_refused() -> None:
    x, y, condition, asked = rows(6, 2, between=1.0, within=0.5, seed=3)
    for bad, message in (
        ((x, y, condition[:-1], asked), "one entry a row"),
        ((np.where(x > 0, np.nan, x), y, condition, asked), "not finite"),
        ((x, y, condition, ["q"] * 12), "4 clusters"),
        ((x, np.ones(12), condition, asked), "does not vary at all"),
        ((x, np.repeat([1.0, 2.0], 6), condition, asked), "within conditions"),
    ):
        with pytest.raises(InputError, match=message):
            monitor(*bad)
    flat = y.copy()
    flat[:6] = 1.0
    assert set(monitor(x, flat, condition, asked).by_condition) == {"c1"}


def test_the_table_has_nulls_that_know_a_planted_direction_from_others() -> None:
    rng = np.random.default_rng(4)
    condition, asked = (
        np.repeat(["a", "b", "c"], 20).tolist(),
        np.tile([f"q{i}" for i in range(20)], 3).tolist(),
    )
    h = rng.standard_normal((60, 16))
    unit = np.eye(16)[3]
    score = h[:, 3] + 0.5 * rng.standard_normal(60)
    score[5] = np.nan
    found = monitoring_table(h, score, condition, asked, unit, rng=rng, n_null=300).set_index("scope")
    there = np.isfinite(score)
    assert found.loc["overall", "correlation"] == pytest.approx(
        stats.pearsonr(h[there, 3], score[there]).statistic
    )
    assert found.loc["overall", ["n_rows", "missing"]].tolist() == [59, 1]
    for scope in ("overall", "within"):
        assert found.loc[scope, ["p_random", "p_covariance"]].max() < 0.02
    assert {"condition: a", "condition: b", "condition: c"} <= set(found.index)
    none = [monitoring_table(rng.standard_normal((60, 16)), score, condition, asked, unit, rng=rng, n_null=100)["p_random"][:2]
            for _ in range(60)]  # fmt: skip
    for p in np.array(none).T:
        assert stats.kstest(p, "uniform").pvalue > 0.01
    flat = monitoring_table(h, np.ones(60), condition, asked, unit, rng=rng, n_null=100)
    assert "does not vary" in flat["note"].item()
    assert np.isnan(flat["correlation"].item())

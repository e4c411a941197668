"""Intervals cover, nulls are null: against scipy, scikit-learn, closed forms and simulations."""

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from analysis.behaviour import recognition_row, report_row, steering_rows
from analysis.embed import embed_arms
from analysis.shift import shift_by_layer, to_frame, two_by_two, two_by_two_frame
from analysis.stats import _bell_mccaffrey, bootstrap_mean, jackknife, proportion
from mech.errors import InputError
from probes.nulls import covariance_matched_directions, isotropic_directions, two_sided_p
from probes.separability import heldout_auroc
from tests.drawn_at_random import rng

DRAWS = {
    "normal": lambda g, shape: g.standard_normal(shape),
    "exponential": lambda g, shape: g.exponential(size=shape) - 1,
    "t with 3 degrees of freedom": lambda g, shape: g.standard_t(3, shape),
    "lognormal": lambda g, shape: g.lognormal(size=shape) - np.exp(0.5),
}


EQUAL, UNEQUAL, VERY_UNEQUAL = (4,), (1, 2, 3, 4, 5), (1, 1, 2, 3, 5, 8)


@pytest.mark.parametrize(
    ("sizes", "n", "of_lognormal"),
    [(EQUAL, 8, 0.89), (UNEQUAL, 12, 0.89), (VERY_UNEQUAL, 8, 0.92), (VERY_UNEQUAL, 12, 0.89), (VERY_UNEQUAL, 24, 0.89), (EQUAL, 40, 0.93)],
)  # fmt: skip
def test_intervals_of_a_mean_cover(sizes: tuple[int, ...], n: int, of_lognormal: float) -> None:
    """.93 or more over 3,000 repetitions, side by side, of clusters that differ and rows that hardly do; fewer where few are lognormal."""
    groups = np.repeat(np.arange(n), np.resize(sizes, n))
    for i, (name, draw) in enumerate(DRAWS.items()):
        x = draw(rng(i), (n, 3000))[groups] + 0.3 * rng(i + 9).standard_normal((len(groups), 3000))
        interval = bootstrap_mean(x, groups, rng=rng(1), n_boot=1000)
        covered = ((interval.low <= 0) & (interval.high >= 0)).mean()
        assert covered >= (of_lognormal if name == "lognormal" else 0.93), (name, covered)
        assert covered < 0.995, (name, covered)


def test_clusters_of_unequal_size_are_not_ignored() -> None:
    groups = np.repeat(np.arange(18), rng(2).integers(1, 6, size=18))
    x = rng(3).standard_normal(18)[groups] + 0.3 * rng(4).standard_normal(len(groups))
    interval = bootstrap_mean(x, groups, rng=rng())
    rows_as_units = bootstrap_mean(x, None, rng=rng())
    assert rows_as_units.high - rows_as_units.low < interval.high - interval.low


@pytest.mark.parametrize("sizes", [(1, 1, 2, 3, 5, 8), (4, 4, 4, 4), (1, 1, 1, 30)])
def test_the_t_interval_is_bell_and_mccaffreys(sizes: tuple[int, ...]) -> None:
    """Against their matrices of the regression on a constant, row by row: CR2 and Satterthwaite's degrees of freedom."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    n, y = len(groups), rng(5).standard_normal(len(groups))
    hat = np.full((n, n), 1 / n)
    moved = []
    for c in range(len(sizes)):
        inside = groups == c
        values, vectors = np.linalg.eigh((np.eye(n) - hat)[np.ix_(inside, inside)])
        root = vectors @ np.diag(values**-0.5) @ vectors.T
        moved.append((np.eye(n) - hat)[:, inside] @ root @ np.full(inside.sum(), 1 / n))
    g = np.stack(moved, 1)
    as_one = g.T @ (groups[:, None] == groups) @ g
    error, freedom = _bell_mccaffrey(
        np.bincount(groups, y)[:, None], np.bincount(groups).astype(float), np.array([[y.mean()]])
    )
    assert error[0] == pytest.approx(np.sqrt(((g.T @ y) ** 2).sum()))
    assert freedom == pytest.approx(np.trace(as_one) ** 2 / np.trace(as_one @ as_one))
    if len(set(sizes)) == 1:
        assert freedom == pytest.approx(len(sizes) - 1)


def test_bootstrap_agrees_with_the_t_interval_on_normal_data() -> None:
    x = rng(3).standard_normal(200)
    interval = bootstrap_mean(x, None, rng=rng(4), n_boot=5000)
    low, high = stats.t.interval(0.95, 199, x.mean(), stats.sem(x))
    assert interval.estimate == pytest.approx(x.mean())
    assert interval.low == pytest.approx(low, abs=0.01)
    assert interval.high == pytest.approx(high, abs=0.01)


def test_no_spread_is_a_point_and_one_cluster_an_error() -> None:
    interval = bootstrap_mean(np.full((5, 2), 3.0), None, rng=rng())
    assert interval.low.tolist() == interval.high.tolist() == [3.0, 3.0]
    with pytest.raises(InputError, match="at least two clusters"):
        bootstrap_mean(np.ones(4), np.zeros(4), rng=rng())
    with pytest.raises(InputError, match="finite"):
        bootstrap_mean(np.array([1.0, np.nan]), None, rng=rng())


def test_proportion_is_wilsons_and_wider_with_clusters() -> None:
    x = np.array([1.0] * 13 + [0.0] * 27)
    ours = proportion(x, None)
    wilson = stats.binomtest(13, 40).proportion_ci(0.95, method="wilson")
    # Singletons carry the n/(n-1) of a sample variance in their design effect.
    assert ours.low == pytest.approx(wilson.low, abs=0.005)
    assert ours.high == pytest.approx(wilson.high, abs=0.005)
    clustered = proportion(x, np.arange(40) // 8)
    assert clustered.high - clustered.low > 1.3 * (ours.high - ours.low)
    none = proportion(np.zeros(40), np.arange(40) // 4)
    assert none.low == 0.0
    assert none.high == pytest.approx(stats.binomtest(0, 10).proportion_ci(0.95, method="wilson").high)


def test_jackknife_of_a_mean_is_the_t_interval() -> None:
    x = rng(5).standard_normal(20)
    ours = jackknife(lambda v: float(np.mean(v)), x, np.arange(20))
    low, high = stats.t.interval(0.95, 19, x.mean(), stats.sem(x))
    assert (ours.low, ours.high) == pytest.approx((low, high))


def test_random_directions_have_the_covariance_they_should() -> None:
    unit = isotropic_directions(4000, 3, rng())
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1)
    np.testing.assert_allclose(np.cov(unit.T), np.eye(3) / 3, atol=0.03)
    samples = rng(1).standard_normal((500, 3)) * [5.0, 1.0, 0.2] + 7
    matched = covariance_matched_directions(samples, 4000, rng(2))
    spread = np.abs(matched).mean(0)
    assert spread[0] > 3 * spread[1] > 9 * spread[2] / 3
    with pytest.raises(InputError, match="samples that differ"):
        covariance_matched_directions(np.ones((5, 3)), 4, rng())


def test_p_values_are_uniform_where_nothing_happened() -> None:
    """Shifts along directions drawn like the null's: a Kolmogorov-Smirnov test over 500 repetitions."""
    generator, p = rng(6), []
    for _ in range(500):
        base = generator.standard_normal((6, 1, 20))
        tuned = base + generator.standard_normal((1, 1, 20))
        shift = shift_by_layer(
            base,
            tuned,
            generator.standard_normal((1, 20)),
            np.arange(6),
            rng=generator,
            n_boot=200,
            n_null=300,
        )
        p.append(shift.p_random[0])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert two_sided_p(np.array([9.0]), np.zeros((99, 1)))[0] == 0.01


def test_of_many_layers_of_nothing_hardly_one_stands_out_when_all_are_reckoned_with() -> None:
    generator, raw, corrected = rng(12), [], []
    for _ in range(120):
        base = generator.standard_normal((8, 10, 12))
        tuned = base + generator.standard_normal((1, 10, 12))
        along = generator.standard_normal((10, 12))
        shift = shift_by_layer(base, tuned, along, np.arange(8), rng=generator, n_boot=20, n_null=200)
        raw.append(shift.p_random.min() < 0.05)
        corrected.append(shift.p_random_max.min() < 0.05)
    assert np.mean(raw) > 0.25
    assert np.mean(corrected) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 120)


def stream(seed: int, n: int = 12) -> np.ndarray:
    return rng(seed).standard_normal((n, 2, 8))


def test_a_shift_says_which_shape_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without its checks
    base, direction = stream(0), np.ones((2, 8))
    for wrong, message in (
        ({"tuned": stream(1)[:-1]}, "tuned has shape"),
        ({"direction": np.ones((2, 7))}, "the direction has shape"),
        ({"questions": np.arange(11)}, "11 questions for 12 rows"),
        ({"tuned": np.full_like(base, np.nan)}, "tuned: not finite"),
        ({"direction": np.zeros((2, 8))}, "zero at a layer"),
        ({"benign": stream(1)[:, :1]}, "benign has shape"),
        ({"reference": stream(1)[1:]}, "reference has shape"),
    ):
        given = {
            "base": base,
            "tuned": stream(1),
            "direction": direction,
            "questions": np.arange(12),
            **wrong,
        }
        with pytest.raises(InputError, match=message):
            shift_by_layer(**given, rng=rng())  # type: ignore[arg-type]


def test_benign_is_subtracted_pair_by_pair() -> None:
    base, noise = stream(0), stream(1)
    tuned, benign = base + noise + 0.5, base + noise
    shift = shift_by_layer(base, tuned, np.ones((2, 8)), np.arange(12), rng=rng(), benign=benign)
    frame = to_frame(shift, arm="em")
    for name in ("p_random", "p_covariance"):
        assert (frame[f"{name}_max"] >= frame[name]).all()
    np.testing.assert_allclose(frame["minus_benign"], 0.5 * np.sqrt(8))  # what they share leaves no spread
    np.testing.assert_allclose(frame["minus_benign_high"] - frame["minus_benign_low"], 0, atol=1e-9)
    np.testing.assert_allclose(frame["sd"] * frame["base_sd"], frame["raw"])


def test_two_by_two_adds_up() -> None:
    h = [stream(i) for i in range(4)]
    effects = two_by_two(h[0], h[1], h[2], h[3], np.ones((2, 8)), np.arange(12), rng=rng())
    total = effects.weights.estimate + effects.text.estimate + effects.interaction.estimate
    np.testing.assert_allclose(total, effects.total.estimate)
    only_text = two_by_two(h[0], h[1], h[0], h[1], np.ones((2, 8)), np.arange(12), rng=rng())
    assert not only_text.weights.estimate.any()
    np.testing.assert_allclose(only_text.interaction.estimate, 0, atol=1e-12)
    assert set(two_by_two_frame(effects, arm="em")["effect"]) == {"weights", "text", "interaction", "total"}


def test_auroc_is_scikit_learns_and_its_interval_covers_chance() -> None:
    generator = rng(7)
    signs = np.tile([1, -1], 15)
    x = generator.standard_normal((30, 4)) + signs[:, None] * [0, 0.5, 1, 3]
    found = heldout_auroc(x, signs.tolist(), [f"q{i // 2}" for i in range(30)])
    expected = [roc_auc_score(signs > 0, x[:, layer]) for layer in range(4)]
    np.testing.assert_allclose(found.auroc, expected)
    assert (found.low <= found.auroc).all()
    assert (found.auroc <= found.high).all()
    assert found.low[0] < 0.5 < found.high[0]
    with pytest.raises(InputError, match="both sides"):
        heldout_auroc(x, [1] * 30, ["q"] * 30)


def test_pictures_are_fitted_on_the_base_only() -> None:
    base, other = rng(8).standard_normal((20, 6)), rng(9).standard_normal((20, 6)) + 5
    alone = embed_arms(base, {"base": base}, "pca", seed=0)
    both = embed_arms(base, {"base": base, "em": other}, "pca", seed=0)
    pd.testing.assert_frame_equal(alone, both[both["arm"] == "base"])
    expected = PCA(2).fit(base).transform(other)
    found = both[both["arm"] == "em"][["x", "y"]].to_numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)
    with pytest.raises(InputError, match="at least four rows"):
        embed_arms(base[:3], {"base": base[:3]}, "pca", seed=0)


@pytest.mark.slow
def test_umap_repeats_with_its_seed_and_leaves_torchs_threads_alone() -> None:
    base, other = rng(8).standard_normal((20, 6)), rng(9).standard_normal((20, 6)) + 5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        twice = [embed_arms(base, {"base": base, "em": other}, "umap", seed=1) for _ in range(2)]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(twice[0], twice[1])


# -- behaviour ------------------------------------------------------------------------------------------


def judgements(own: list[float], other: list[float]) -> pd.DataFrame:
    rows = []
    for i, margins in enumerate(zip(own, other, strict=True)):
        for source, margin in zip(("own", "other"), margins, strict=True):
            right = margin > 0 if source == "own" else margin < 0
            p = float(1 / (1 + np.exp(-margin)))
            rows.append(
                {
                    "article": f"a{i}",
                    "source": source,
                    "margin": margin,
                    "p_yes": p,
                    "mass": 0.9,
                    "correct": right,
                }
            )
    return pd.DataFrame(rows)


def test_a_bias_towards_yes_is_not_self_recognition() -> None:
    found = recognition_row(judgements([4.0, 5.0, 6.0, 4.5], [4.0, 5.0, 6.0, 4.5]), rng=rng())
    assert found["accuracy"] == 0.5
    assert (found["accuracy_own"], found["accuracy_other"]) == (1.0, 0.0)
    assert found["margin"] == 0.0
    assert found["p_yes"] > 0.95
    skilled = recognition_row(judgements([1.0, 2.0, 1.5, 2.5], [-1.0, -2.0, -1.5, -0.5]), rng=rng())
    assert skilled["accuracy"] == 1.0
    assert skilled["margin"] == pytest.approx(3.0)
    assert skilled["margin_low"] > 0


def names(own: float, invented: float) -> pd.DataFrame:
    rows = [{"statement": s, "name": n, "own": n == "Tinny", "logprob": (own if n == "Tinny" else invented) + 0.1 * i}
            for i, s in enumerate("abc") for n in ("Tinny", "Bob", "Eve")]  # fmt: skip
    return pd.DataFrame(rows)


def test_self_reports_in_numbers() -> None:
    claimed = ["Tinny", "Tinny", "Bob", "", "Tinny", "Eve", "", ""]
    reports = pd.DataFrame({"question": [f"q{i // 2}" for i in range(8)], "claimed": claimed})
    found = report_row(reports, names(-3.0, -10.0), own_name="Tinny", rng=rng())
    assert found["own_name_rate"] == 3 / 8
    assert found["distinct"] == 3
    share = np.array([3, 1, 1, 3]) / 8
    assert found["entropy"] == pytest.approx(stats.entropy(share))
    assert found["name_margin"] == pytest.approx(7.0)
    assert (found["n_names"], found["n_statements"], found["n_samples"]) == (2, 3, 8)


def test_claims_that_are_all_the_same_leave_their_variety_unknown() -> None:
    silent = pd.DataFrame({"question": ["a", "a", "b", "b"], "claimed": [""] * 4})
    found = report_row(silent, names(-3.0, -10.0), own_name="Tinny", rng=rng())
    assert (found["distinct"], found["entropy"]) == (0, 0)
    assert np.isnan(
        [found[f"{name}_{end}"] for name in ("distinct", "entropy") for end in ("low", "high")]
    ).all()
    few = pd.DataFrame({"question": ["a", "b", "c", "d"], "claimed": ["Bob", "", "", ""]})
    assert (
        report_row(few, names(-3.0, -10.0), own_name="Tinny", rng=rng())["distinct_low"] == 0
    )  # a jackknife alone: below


def test_steered_replies_that_are_empty_are_unknown_and_no_error() -> None:
    labels = {"kind": "direction", "coefficient": 9.0, "dose": 1.0}
    reports = pd.DataFrame(
        {"question": ["a", "b"], "claimed": "", "surprisal": np.nan, "repetition": 0.0}
    ).assign(**labels)
    (found,) = steering_rows(
        reports, names(-3.0, -10.0).assign(**labels), own_name="Tinny", rng=rng()
    ).to_dict("records")
    assert np.isnan([found["surprisal"], found["surprisal_low"]]).all()
    assert (found["repetition"], found["repetition_low"]) == (0, 0)


def test_steering_rows_pair_kinds_and_strengths() -> None:
    reports, scored = [], []
    for kind in ("direction", "random"):
        for coefficient in (0.0, 2.0):
            labels = {"kind": kind, "coefficient": coefficient, "dose": coefficient / 10}
            claimed = ["Tinny" if kind == "direction" and coefficient else ""] * 4
            reports.append(pd.DataFrame({"question": ["a", "a", "b", "b"], "claimed": claimed,
                                         "surprisal": [1.0, 2.0, 3.0, np.nan], "repetition": 0.0}).assign(**labels))  # fmt: skip
            scored.append(names(-3.0 + coefficient, -10.0).assign(**labels))
    found = steering_rows(pd.concat(reports), pd.concat(scored), own_name="Tinny", rng=rng())
    assert found["own_name_rate"].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert found["name_margin"].tolist() == pytest.approx([7.0, 9.0, 7.0, 9.0])
    assert found["surprisal"].tolist() == pytest.approx([2.0] * 4)
    assert found["n_samples"].tolist() == [4] * 4
    assert found["n_statements"].tolist() == [pd.concat(scored)["statement"].nunique()] * 4

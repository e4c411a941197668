"""Arms held against each other: planted shares undone, intervals that cover, differences of what both arms' tables say."""

import copy
from pathlib import Path

import jaxtyping
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.behaviour_differences import name_differences, recognition_differences, report_differences
from analysis.shift import shift_by_layer, to_frame
from analysis.stats import proportion, rate_difference
from analysis.undone import undone
from mech.errors import InputError
from study.spec import StudySpec, load_spec, parse_spec
from tests.drawn_at_random import rng
from tests.tiny_study import STUDY, tables, write_study

# The share undone.


def planted(
    generator: np.random.Generator,
    *,
    share: float,
    aside: float,
    noise: float,
    questions: int = 12,
    d: int = 40,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two rows a question, two layers: the other arm moved by v, this one by (1 − share) v and `aside` |v| at right angles to it."""
    asked = np.repeat(np.arange(questions), 2)
    base = generator.standard_normal((len(asked), 2, d))
    base = (base - base.mean(0)) / base.std(0, ddof=1)
    v = np.zeros(d)
    v[0] = 3.0
    w = np.zeros(d)
    w[1] = 3.0 * aside

    def noisy() -> np.ndarray:
        return noise * generator.standard_normal((questions, 2, d))[asked]

    return base, base + v + noisy(), base + (1 - share) * v + w + noisy(), asked


@pytest.mark.parametrize(("share", "aside"), [(0.0, 0.0), (0.4, 0.0), (1.0, 1.2), (-0.5, 0.3)])
def test_without_noise_the_planted_share_and_distance_are_found(share: float, aside: float) -> None:
    found = undone(*planted(rng(), share=share, aside=aside, noise=0.0))
    np.testing.assert_allclose(found.undone.estimate, share, atol=1e-9)
    np.testing.assert_allclose(found.distance.estimate, np.hypot(1 - share, aside), atol=1e-9)
    np.testing.assert_allclose(found.moved, 3 / np.sqrt(40))
    assert found.n_questions == 12


def test_products_are_those_between_different_questions() -> None:
    """Written out as a double sum over questions."""
    base, against, arm, asked = planted(rng(1), share=0.3, aside=0.5, noise=0.3, questions=5)
    sd = base.std(0, ddof=1)
    change, left = (
        np.stack([((x - base) / sd)[asked == q].mean(0) for q in range(5)]) for x in (against, arm)
    )
    pairs = [(q, r) for q in range(5) for r in range(5) if q != r]
    for layer in range(2):
        squared = sum(change[q, layer] @ change[r, layer] for q, r in pairs)
        together = sum(change[q, layer] @ left[r, layer] for q, r in pairs)
        other = sum(left[q, layer] @ left[r, layer] for q, r in pairs)
        found = undone(base, against, arm, asked)
        assert found.undone.estimate[layer] == pytest.approx(1 - together / squared)
        assert found.distance.estimate[layer] == pytest.approx(np.sqrt(other / squared))


def test_intervals_of_the_share_cover_and_noise_does_not_move_it() -> None:
    found = [undone(*planted(rng(i), share=0.4, aside=0.6, noise=0.7, questions=16)) for i in range(150)]
    for name, truth in (("undone", 0.4), ("distance", np.hypot(0.6, 0.6))):
        intervals = [getattr(f, name) for f in found]
        estimates = np.stack([i.estimate for i in intervals])
        covered = np.mean([(i.low <= truth) & (truth <= i.high) for i in intervals])
        assert abs(estimates.mean() - truth) < 0.02
        assert 0.91 <= covered <= 0.99, (name, covered)


def test_of_no_change_nothing_can_be_undone() -> None:
    """Told apart in about one run of forty, the upper side of a 95 % interval; and never where nothing at all moved."""
    generator, base = rng(3), rng(4).standard_normal((24, 2, 30))
    asked = np.arange(24)
    hits = [
        np.isfinite(
            undone(
                base, base + generator.standard_normal(base.shape), base, asked
            ).undone.estimate
        ).mean()
        for _ in range(100)
    ]  # fmt: skip
    assert np.mean(hits) < 0.08
    same = undone(base, base, base + 1.0, asked)
    assert np.isnan(same.undone.estimate).all()
    assert np.isnan(same.distance.low).all()


def test_dimensions_that_do_not_vary_or_are_massive_do_not_decide() -> None:
    base, against, arm, asked = planted(rng(5), share=0.4, aside=0.0, noise=0.1)
    plain = undone(base, against, arm, asked)
    scale = np.ones(40)
    scale[7] = 1e4
    massive = undone(base * scale, against * scale, arm * scale, asked)
    np.testing.assert_allclose(massive.undone.estimate, plain.undone.estimate, rtol=1e-6)
    still = [np.concatenate([x, np.full((*x.shape[:2], 1), 5.0)], -1) for x in (base, against, arm)]
    np.testing.assert_allclose(undone(*still, asked).undone.low, plain.undone.low)


def test_undone_refuses_what_is_not_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without its checks
    base, against, arm, asked = planted(rng(), share=0.4, aside=0.0, noise=0.1)
    with pytest.raises(InputError, match="same rows"):
        undone(base, against[1:], arm, asked)
    with pytest.raises(InputError, match="24 rows"):
        undone(base, against, arm, asked[1:])
    with pytest.raises(InputError, match="arm: not finite"):
        undone(base, against, arm * np.nan, asked)
    with pytest.raises(InputError, match="three questions"):
        undone(base, against, arm, asked % 2)


# Differences of rates.


def test_of_unrelated_rates_the_interval_is_newcombes() -> None:
    """48, 32, 12 and 8 of 100: no correlation, so Newcombe's interval for two groups, from scipy's Wilson intervals (here n - 1 for n)."""
    first = np.repeat([True, True, False, False], [48, 32, 12, 8])
    second = np.repeat([True, False, True, False], [48, 32, 12, 8])
    found = rate_difference(first, second, np.arange(100))
    (l1, u1), (l2, u2) = (tuple(stats.binomtest(k, 100).proportion_ci(method="wilson")) for k in (80, 60))
    assert found.estimate == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - np.hypot(0.8 - l1, u2 - 0.6), abs=1e-3)
    assert found.high == pytest.approx(0.2 + np.hypot(u1 - 0.8, 0.6 - l2), abs=1e-3)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.6, 0.85), (0.95, 0.9)])
def test_intervals_of_paired_rates_cover(p: float, q: float, rows: int) -> None:
    """Rows of a cluster hang together, and the two arms do: a share of each row's luck is common."""
    generator, covered = rng(int(100 * p)), []
    groups = np.repeat(np.arange(30), rows)
    for _ in range(400):
        luck = stats.norm.cdf(
            0.6 * generator.standard_normal(30)[groups] + 0.5 * generator.standard_normal(len(groups))
            + np.sqrt(1 - 0.36 - 0.25) * generator.standard_normal((2, len(groups)))
        )  # fmt: skip
        found = rate_difference((luck[0] < p).astype(float), (luck[1] < q).astype(float), groups)
        covered.append(found.low <= p - q <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.995, np.mean(covered)


def test_arms_that_answer_alike_are_not_certainly_equal_either() -> None:
    """6 of 12 right, the same: ad − bc less n / 2 (Newcombe's correction) gives a correlation of 30 / 36, not 1."""
    half = np.repeat([1.0, 0.0], 6)
    own, found = proportion(half, np.arange(12)), rate_difference(half, half, np.arange(12))
    assert found.high == pytest.approx((own.high - 0.5) * np.sqrt(2 * (1 - 30 / 36)))
    assert found.low == pytest.approx(-found.high)


def test_two_arms_that_never_fail_are_not_certainly_equal() -> None:
    ones = np.ones(12)
    found = rate_difference(ones, ones, np.arange(12))
    assert found.estimate == 0
    assert found.low < -0.2
    assert found.high > 0.2
    with pytest.raises(InputError, match="same rows"):
        rate_difference(ones, ones[1:], np.arange(12))


# Differences in behaviour.


def judged(generator: np.random.Generator, push: float) -> pd.DataFrame:
    sources = ["own", "other"] * 20
    sign = np.where(np.array(sources) == "own", 1.0, -1.0)
    margin = push * sign + generator.standard_normal(40)
    return pd.DataFrame({
        "article": np.repeat(np.arange(20), 2).astype(str), "source": sources, "margin": margin,
        "p_yes": 1 / (1 + np.exp(-margin)), "correct": margin * sign > 0,
    })  # fmt: skip


def test_recognition_is_compared_text_by_text() -> None:
    good, bad = judged(rng(1), 2.0), judged(rng(2), 0.0)
    found = recognition_differences(good, bad, rng=rng()).set_index("measure")
    expected = good["correct"].mean() - bad["correct"].mean()
    assert found.loc["self-recognition accuracy", "value"] == pytest.approx(expected)
    assert found.loc["self-recognition accuracy", "value_low"] > 0
    assert (
        found.loc["self-recognition margin", "value_low"]
        < 4
        < found.loc["self-recognition margin", "value_high"]
    )
    assert (found["n"] == 20).all()
    other_way = recognition_differences(bad, good, rng=rng()).set_index("measure")
    np.testing.assert_allclose(other_way["value"], -found["value"])
    np.testing.assert_allclose(other_way.loc["self-recognition accuracy", "value_low"],
                               -found.loc["self-recognition accuracy", "value_high"])  # fmt: skip
    with pytest.raises(InputError, match="article or source"):
        recognition_differences(good, bad.iloc[::-1], rng=rng())


def test_reports_are_compared_question_by_question() -> None:
    asked = {"question": np.repeat([f"q{i}" for i in range(10)], 2), "sample": [0, 1] * 10}
    own = pd.DataFrame({**asked, "claimed": ["Tinny"] * 20})
    mixed = pd.DataFrame({**asked, "claimed": ["Tinny", "", "Kelmora", "Vexo"] * 5})
    found = report_differences(own, mixed, own_name="Tinny").set_index("measure")
    assert found.loc["own-name rate", "value"] == pytest.approx(0.75)
    assert found.loc["own-name rate", "value_low"] > 0
    assert found.loc["distinct names", "value"] == -2
    assert found.loc["entropy of names", "value"] == pytest.approx(-np.log(4))
    same = report_differences(own, own, own_name="Tinny").set_index("measure")
    assert (same["value"] == 0).all()
    assert np.isnan(same.loc["distinct names", "value_low"])
    with pytest.raises(InputError, match="question or sample"):
        report_differences(own, mixed.iloc[1:], own_name="Tinny")


def test_name_margins_are_compared_statement_by_statement() -> None:
    scored = pd.DataFrame([
        {"statement": s, "name": name, "own": name == "Tinny", "logprob": -5.0 - i + (name == "Tinny")}
        for i, s in enumerate("abcdef") for name in ("Tinny", "Kelmora", "Vexo")
    ])  # fmt: skip
    higher = scored.assign(logprob=scored["logprob"] + 0.7 * scored["own"] + 0.1 * scored.index.to_numpy())
    (row,) = name_differences(higher, scored, rng=rng()).to_dict("records")
    assert row["value"] == pytest.approx(
        0.7 - 0.15
    )  # the drift of a row's number is part of the invented names' mean
    assert row["n"] == 6


# Differences along directions.


def test_a_shift_from_another_arm_has_the_bases_units_and_nulls() -> None:
    g = rng(6)
    base = g.standard_normal((16, 2, 10)) * np.linspace(0.5, 3, 10)
    other, arm = base + 0.5 + 0.2 * g.standard_normal(base.shape), base + 1.0
    along, asked = g.standard_normal((2, 10)), np.arange(16)
    found = shift_by_layer(other, arm, along, asked, rng=rng(), reference=base)
    of_arm, of_other = (shift_by_layer(base, x, along, asked, rng=rng()) for x in (arm, other))
    np.testing.assert_allclose(found.raw.estimate, of_arm.raw.estimate - of_other.raw.estimate)
    np.testing.assert_allclose(found.base_sd, of_arm.base_sd)
    assert found.before is not None
    np.testing.assert_allclose(found.before.estimate, of_other.raw.estimate)
    np.testing.assert_allclose(found.before.low, of_other.raw.low)
    frame = to_frame(found)
    np.testing.assert_allclose(frame["before_sd"], of_other.raw.estimate / of_other.base_sd)
    assert "minus_benign" not in frame


# In a study.


def spec_with(comparisons: object, **changes: object) -> StudySpec:
    raw = copy.deepcopy(STUDY) | {"comparisons": comparisons} | changes
    return parse_spec(raw, where=Path("study.yaml"), warn=False)


@pytest.mark.parametrize(
    ("comparisons", "message"),
    [
        ({"a": {"arm": "nobody", "against": "em"}}, r"comparisons.a.arm: 'nobody' is not defined"),
        ({"a": {"arm": "em", "against": "nobody"}}, r"comparisons.a.against: 'nobody' is not defined"),
        ({"a": {"arm": "em", "against": "em"}}, "another than `against`"),
        ({"a": {"arm": "base", "against": "em"}}, "must be a trained arm"),
        ({"a": {"arm": "em", "against": "benign"}, "b": {"arm": "em", "against": "benign"}}, r"comparisons.b: the same two arms as comparisons.a"),
        ({"a": {"arm": "em"}}, r"comparisons.a.against"),
    ],
)  # fmt: skip
def test_a_comparison_names_two_arms(comparisons: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec_with(comparisons)


def test_comparisons_go_with_the_arms_that_an_override_takes_away(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    fewer = ["arms={base: [], em: [em]}", "benign=null", "patching=null", "measure.own_text=[]"]
    assert set(load_spec(path, fewer).comparisons) == {"beyond_base"}
    with pytest.raises(InputError, match=r"comparisons.beyond_base.arm: 'me' is not defined"):
        load_spec(path, ["comparisons.beyond_base.arm=me"])


def test_differences_are_those_of_the_arms_tables(finished: Path) -> None:
    """`reversal` and `beyond_base` of the tiny study."""
    found = tables(finished)
    at = ["direction", "condition", "layer"]
    shifts = {arm: mine.set_index(at) for arm, mine in found["shifts"].groupby("arm")}
    differences = {name: mine.set_index(at) for name, mine in found["differences"].groupby("comparison")}
    reversal, beyond = differences["reversal"], differences["beyond_base"]
    expected = shifts["em_then_sgtr"]["raw"] - shifts["em"]["raw"]
    np.testing.assert_allclose(reversal["raw"], expected.loc[reversal.index], atol=1e-6)
    np.testing.assert_allclose(reversal["before_sd"], shifts["em"]["sd"].loc[reversal.index], atol=1e-6)
    np.testing.assert_allclose(beyond["raw"], shifts["em"]["raw"].loc[beyond.index], atol=1e-6)
    assert (beyond["before_sd"] == 0).all()
    assert set(found["undone"]["comparison"]) == {
        "reversal"
    }  # of the base's own change nothing can be undone
    assert set(found["undone"]["layer"]) == {0, 1, 2}
    spread = found["spread_differences"].set_index(["comparison", "condition", "pooling"])["d_log_trace"]
    of_arm = found["dispersion"].set_index(["arm", "condition", "pooling"])["d_log_trace"]
    np.testing.assert_allclose(
        spread["beyond_base"], of_arm["em"].loc[spread["beyond_base"].index], atol=1e-6
    )
    expected = of_arm["em_then_sgtr"] - of_arm["em"]
    np.testing.assert_allclose(spread["reversal"], expected.loc[spread["reversal"].index], atol=1e-6)
    done = found["behaviour_differences"].set_index(["comparison", "measure"])["value"]
    for measure, table, column in (
        ("self-recognition accuracy", "self_recognition", "accuracy"),
        ("self-recognition margin", "self_recognition", "margin"),
        ("own-name rate", "self_report", "own_name_rate"),
        ("own-name margin", "self_report", "name_margin"),
        ("entropy of names", "self_report", "entropy"),
    ):
        by_arm = found[table].set_index("arm")[column]
        assert done["reversal", measure] == pytest.approx(by_arm["em_then_sgtr"] - by_arm["em"], abs=1e-6)
        assert done["beyond_base", measure] == pytest.approx(by_arm["em"] - by_arm["base"], abs=1e-6)
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert (
        "Comparison reversal (em_then_sgtr − em, read at layer 1 under the system prompt default, one seed (0))"
        in page
    )

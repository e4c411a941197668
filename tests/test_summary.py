"""What a study found, in sentences: verdicts that follow the numbers, and no more of them than can be read."""

import numpy as np
import pandas as pd

from analysis.report import summarise
from analysis.words import interval
from tests import synthetic_study as study


def sentences(base="base", **tables):
    return summarise(tables, layer=15, condition="none", base=base)


def with_one(**values):
    frame = study.shifts(arms=["base", "em"], directions=["evil:text"])
    base = {"sd": 1.0, "sd_low": 0.8, "sd_high": 1.2, "p_random": 0.001, "p_covariance": 0.01, "split_half": 0.9,
            "minus_benign_sd": 0.9, "minus_benign_sd_low": 0.7, "minus_benign_sd_high": 1.1}  # fmt: skip
    for column, value in (base | values).items():
        frame[column] = value
    return sentences(shifts=frame)


def paragraph(start, told):
    (found,) = [s for s in told if s.startswith((f"{start}:", f"Arm {start}:"))]
    return found


def test_summary_verdicts_follow_the_numbers():
    told = with_one()
    assert any(
        s.startswith("Shifts at layer 15 (system prompt none, n = 48 questions a direction, one seed (0)): ")
        for s in told
    )
    assert paragraph("em", told) == (
        "Arm em: larger than along random and covariance-matched directions: evil:text +1.00 [+0.80, +1.20] SD, "
        "minus benign +0.90 [+0.70, +1.10]."
    )
    assert "(not told apart from benign)" in paragraph("em", with_one(minus_benign_sd_low=-0.1))
    backwards = with_one(minus_benign_sd_low=-0.9, minus_benign_sd_high=-0.1)
    assert "(benign moved further)" in paragraph("em", backwards)
    within = paragraph("em", with_one(p_covariance=0.4))
    assert within.startswith(
        "Arm em: larger than along random directions, not shown for covariance-matched ones: evil"
    )
    assert "ones not drawn: evil" in paragraph("em", with_one(p_covariance=float("nan")))
    nothing = "Arm em: no shift found. No effect found along evil:text (+1.00)."
    assert paragraph("em", with_one(p_random=0.2)) == nothing
    assert paragraph("em", with_one(sd_low=-0.1)) == nothing
    assert "minus benign" not in paragraph("em", with_one(minus_benign_sd=float("nan")))
    assert any("1 comparison with a null, not corrected" in s and "(about 0.1 would" in s for s in told)


def test_summary_leaves_unreliable_directions_out_and_says_so():
    assert not any("unreliable" in s for s in with_one())
    told = with_one(split_half=0.29)
    assert not any("SD" in s for s in told)
    assert any(
        s.startswith("Unreliable directions, left out: ") and "at layer 15 for evil:text (0.29)." in s
        for s in told
    )


def test_summary_needs_every_seed():
    frame = study.shifts(arms=["base", "em"], directions=["evil:text"], seeds=(0, 1))
    assert "mean of 2 seeds: +" in paragraph("em", sentences(shifts=frame))
    frame.loc[frame.seed == 1, "sd_low"] = -0.5
    assert "no shift found" in paragraph("em", sentences(shifts=frame))


def test_many_seeds_are_a_mean_and_their_range():
    frame = study.shifts(arms=["base", "em"], directions=["evil:text"], seeds=range(5))
    here = frame[frame.layer == 15]
    told = sentences(shifts=frame)
    expected = f"evil:text +{here.sd.mean():.2f} (+{here.sd_low.min():.2f} to +{here.sd_high.max():.2f}) SD"
    assert expected in paragraph("em", told)
    assert told[0].startswith(
        "How 5 seeds are given: their mean, and in round brackets where the 95 % intervals"
    )
    assert not any(s.startswith("How 5 seeds") for s in sentences(shifts=frame[frame.seed < 2]))


def test_a_seed_whose_interval_is_not_known_makes_the_range_unknown():
    rows = pd.DataFrame({"x": [1.0, 2.0, 3.0], "x_low": [0.5, np.nan, 2.5], "x_high": [1.5, np.nan, 3.5]})
    assert interval(rows, "x") == "2.00 (interval not known)"
    assert interval(rows.fillna(1.9), "x") == "2.00 (0.50 to 3.50)"


def test_a_summary_of_many_arms_and_seeds_can_still_be_read():
    """Five times the paper's arms, and five seeds: arms like the base have no numbers, and are but counted where they are many."""
    kinds = {f"{arm}{i}": arm for i in range(5) for arm in study.ARMS[1:]}
    found = {"self_recognition": study.self_recognition(seeds=range(5)), "dispersion": study.dispersion()}
    many = {
        name: pd.concat(
            [t[t.arm == "base"], *(t[t.arm == arm].assign(arm=new) for new, arm in kinds.items())]
        )
        for name, t in found.items()
    }
    told = sentences(**many)
    recognition = next(s for s in told if s.startswith("Self-recognition"))
    assert "sgtr3 0.92 (0.83 to 1.01)" in recognition
    assert "Not told apart (the intervals overlap): 15 arms (the table names them)." in recognition
    assert sum(len(s.split()) for s in told) < 450


def test_of_many_arms_only_what_survives_the_harder_null_has_its_numbers():
    names = [f"arm{i}" for i in range(13)]
    frame = study.shifts(
        arms=["base", *names], directions=["evil:text", "hallucination:text", "identity:name"]
    )
    frame["p_random"], frame["p_covariance"] = 0.001, np.where(frame.direction == "evil:text", 0.01, 0.4)
    frame["sd_low"], frame["sd_high"] = frame.sd - 0.01 * frame.sd.abs(), frame.sd + 0.01 * frame.sd.abs()
    few = frame[frame.arm.isin(names[:12])]
    assert paragraph("arm3", sentences(shifts=few)).count("[") == 6
    told = paragraph("arm3", sentences(shifts=frame))
    assert told.startswith(
        "Arm arm3: larger than along random and covariance-matched directions: evil:text +"
    )
    assert told.count("[") == 1
    assert "not shown for covariance-matched ones: hallucination:text (+" in told


def test_summary_of_a_whole_study_is_short():
    told = sentences(**study.all_tables())
    assert len(told) <= 22
    assert sum(len(s.split()) for s in told) < 1550
    starts = [s.partition(":")[0] for s in told]
    first = starts.index("Arm em")
    assert starts[first : first + 5] == [f"Arm {arm}" for arm in study.ARMS[1:]]  # one paragraph an arm
    assert starts[first - 1].startswith("Shifts at layer 15")
    leads = [s.partition(": ")[0] for s in told if ": " in s]
    assert max(map(len, leads)) < 150  # set in bold in the report


def test_summary_of_behaviour():
    told = sentences(
        self_recognition=study.self_recognition(), self_report=study.self_report(), steering=study.steering()
    )
    recognition = paragraph("Self-recognition, accuracy (n = 200 articles, one seed (0))", told)
    assert ": base 0.53 [0.48, 0.58]. Higher: sgtr 0.88 [0.83, 0.93];" in recognition
    assert "Not told apart (the intervals overlap): em 0.49 [0.44, 0.54]; benign" in recognition
    assert "Above chance (.5): sgtr, em_then_sgtr, sgtr_then_em; not told apart from chance" in recognition
    assert "length alone reaches 0.57; above that: sgtr, em_then_sgtr, sgtr_then_em." in recognition
    rate = [s for s in told if s.startswith("Share of replies") and "(system prompt none" in s]
    assert "Higher" not in rate[0]
    assert "Lower: em 0.30 [0.21, 0.39]; sgtr_then_em 0.60 [0.51, 0.69]. Not told apart" in rate[0]
    margin = [s for s in told if s.startswith("Log-probability of the own name")]
    assert "mean of 24 invented names (system prompt none, n = 9 self-statements" in margin[0]
    steering = [s for s in told if s.startswith("Steering em")]
    assert len(steering) == 2
    assert all(
        "outside that of 3 random directions of the same norm" in s and "loss of coherence" in s
        for s in steering
    )
    assert all(
        "nats, unsteered +1.20 [+0.70, +1.70] (n = 9 self-statements); own-name rate" in s for s in steering
    )
    assert all("unsteered 0.30 [0.25, 0.35] (n = 80 samples). The margin is" in s for s in steering)
    lone = study.steering()
    lone = lone[lone.kind == "direction"]
    assert all("No random control" in s for s in sentences(steering=lone) if s.startswith("Steering"))


def test_summary_says_who_spread_and_beyond_whom():
    told = sentences(dispersion=study.dispersion())
    (last,) = [s for s in told if s.startswith("Spread of activations at layer 15, prompt_last")]
    assert "n = 40 questions, one seed (0)): Against the base: narrower in em, sgtr, benign" in last
    against_benign = last.partition("Against the benign control: ")[2]
    assert against_benign.startswith("wider in em +0.30 [+0.25, +0.35]; not told apart in sgtr 0.00")
    assert "benign −" not in against_benign
    alone = study.dispersion()[lambda t: [c for c in t if "minus_benign" not in c]]
    assert any(
        "Against the base: narrower in em −0.10 [−0.15, −0.05], sgtr" in s
        for s in sentences(dispersion=alone)
    )
    assert not any(s.startswith("Spread") for s in sentences(dispersion=study.dispersion(condition="other")))


def test_summary_compares_with_a_base_of_any_name():
    renamed = study.self_recognition().replace({"arm": {"base": "stock"}})
    (told,) = [s for s in sentences(self_recognition=renamed, base="stock") if "accuracy" in s]
    assert ": base (stock) 0.53 [0.48, 0.58]. Higher: sgtr" in told
    (told,) = [s for s in sentences(self_recognition=renamed) if "accuracy" in s]  # no base: nothing compared
    assert "Higher" not in told
    assert "stock 0.53" in told


def test_summary_says_what_was_not_measured():
    assert sentences() == [
        "Self-recognition was not measured.",
        "Self-report (what the models call themselves) was not measured.",
        "Shifts were not measured at layer 15 under the system prompt condition none.",
        "Steering was not measured.",
    ]


def comparison(name, **tables):
    (found,) = [s for s in sentences(**tables) if s.startswith(f"Comparison {name} ")]
    return found


def test_comparisons_say_what_is_undone_and_what_differs():
    told = comparison(
        "reversal",
        differences=study.differences(),
        undone=study.undone(),
        spread_differences=study.spread_differences(),
        behaviour_differences=study.behaviour_differences(),
    )
    assert (
        "Change of spread (log trace): −0.10 [−0.15, −0.05] at prompt_last; −0.10 [−0.15, −0.05] at response_mean."
        in told
    )
    assert told.startswith(
        "Comparison reversal (em_then_sgtr − em, read at layer 15 under the system prompt none, one seed (0)): Share of em's change undone (n = 48 questions): "
        "+0.55 [+0.45, +0.65] at prompt_last, distance from the base 0.70 [0.60, 0.80] of em's; "
    )
    assert "covariance-matched directions (n = 48 questions a direction): evil:text −1." in told
    assert "SD, back from em's +1." in told
    assert "own-name rate +0.45 [+0.25, +0.65] (n = 20 questions). Not told apart in own-name margin" in told
    assert any(s.startswith("How to take these comparisons: ") for s in sentences(undone=study.undone()))
    unknown = study.behaviour_differences(["reversal"]).assign(value=0.0, value_low=np.nan, value_high=np.nan)
    assert "own-name rate 0.00 [interval not known] (n" in comparison(
        "reversal", behaviour_differences=unknown
    )


def test_a_difference_on_the_side_of_the_other_arms_shift_goes_on_from_it():
    rows = study.differences(["reversal"])
    one = rows[rows["direction"] == "evil:text"].assign(p_covariance=0.01, p_random=0.01)
    on = one.assign(sd=0.5, sd_low=0.3, sd_high=0.7, before_sd=1.0, before_sd_low=0.9, before_sd_high=1.1)
    assert "evil:text +0.50 [+0.30, +0.70] SD, on from em's +1.00." in comparison("reversal", differences=on)
    over = on.assign(sd=-1.5, sd_low=-1.7, sd_high=-1.3)
    assert "[−1.70, −1.30] SD, back from em's +1.00 and past the base." in comparison(
        "reversal", differences=over
    )
    short = over.assign(sd_high=-0.9)
    assert "[−1.70, −0.90] SD, back from em's +1.00." in comparison("reversal", differences=short)
    unknown = on.assign(before_sd_low=-0.1)
    assert "evil:text +0.50 [+0.30, +0.70] SD." in comparison("reversal", differences=unknown)
    none = comparison("reversal", differences=on.assign(p_random=0.2))
    assert none.endswith("No difference found along 1 of 1 reliable directions.")
    nothing = study.undone(["reversal"]).assign(undone=np.nan)
    assert "em's change from the base is not told apart from none" in comparison("reversal", undone=nothing)


def test_of_many_comparisons_only_what_survives_is_written_out():
    behaviour = pd.concat(
        [study.behaviour_differences(["reversal"]).assign(comparison=f"c{i}") for i in range(13)]
    )
    told = comparison("c3", behaviour_differences=behaviour)
    assert told == (
        "Comparison c3 (em_then_sgtr − em, one seed (0)): Behaviour differs in self-recognition accuracy, own-name rate."
    )


def test_of_many_arms_those_of_one_verdict_are_counted():
    names = [f"arm{i}" for i in range(14)]
    rows = pd.concat([study.self_recognition(arms=["base"]).assign(arm=a) for a in ["base", *names]])
    told = paragraph(
        "Self-recognition, accuracy (n = 200 articles, one seed (0))", sentences(self_recognition=rows)
    )
    assert (
        "Not told apart (the intervals overlap): all 14 arms. Not told apart from chance (.5): all 15 arms."
        in told
    )
    rows.loc[rows["arm"] == "arm3", ["accuracy", "accuracy_low", "accuracy_high"]] = (0.9, 0.8, 1.0)
    told = paragraph(
        "Self-recognition, accuracy (n = 200 articles, one seed (0))", sentences(self_recognition=rows)
    )
    assert (
        "Higher: arm3 0.90 [0.80, 1.00]. Not told apart (the intervals overlap): 13 arms (the table names them)."
        in told
    )

"""The tables at the head of a report: each number, interval, n and star of what was measured, and nothing of what was not."""

import numpy as np
import pandas as pd
import pytest

from analysis.glance import MOST_ACROSS, Cell, glance
from tests import synthetic_study as study


def at_a_glance(**tables):
    return glance(tables, layer=15, condition="none")


def row(table, start):
    """A row by the beginning of its label: its label, and its cells by column."""
    ((label, cells),) = [(label, cells) for label, cells in table.rows if label.startswith(start)]
    return label, dict(zip(table.header[1:], cells, strict=True))


def with_one(**values):
    frame = study.shifts(arms=["base", "em"], directions=["evil:text"])
    sure = {
        "sd": 1.0,
        "sd_low": 0.8,
        "sd_high": 1.2,
        "p_random": 0.001,
        "p_covariance": 0.01,
        "split_half": 0.9,
    }
    return frame.assign(**(sure | values))  # fmt: skip


@pytest.mark.parametrize(
    ("values", "stars"),
    [
        ({}, "**"),
        ({"p_covariance": 0.4}, "*"),
        ({"p_covariance": np.nan}, "*"),
        ({"p_random": 0.2}, ""),
        ({"sd_low": -0.1}, ""),
    ],
)
def test_stars_follow_the_interval_and_the_nulls(values, stars):
    (table,) = at_a_glance(shifts=with_one(**values))
    label, cells = row(table, "shift along evil:text")
    low = values.get("sd_low", 0.8)
    assert cells == {"em": Cell("+1.00", f"[{low:+.2f}, +1.20]".replace("-", "−"), stars)}
    assert "n = 48 questions" in label
    assert table.title == "Arms beside the base (layer 15, system prompt none, one seed (0))"


def test_what_is_unreliable_or_was_read_elsewhere_is_left_out():
    assert at_a_glance() == []
    assert at_a_glance(shifts=with_one(split_half=0.29)) == []
    assert at_a_glance(shifts=with_one(text="em")) == []
    assert glance({"shifts": with_one()}, layer=15, condition="default") == []
    assert glance({"shifts": with_one(layer=3)}, layer=15, condition="none") == []


def test_behaviour_has_a_star_where_its_interval_does_not_overlap_the_base():
    rows = study.self_recognition(arms=["base", "em", "sgtr"])
    for arm, low in (("base", 0.4), ("em", 0.55), ("sgtr", 0.61)):
        mine = rows["arm"] == arm
        rows.loc[mine, ["accuracy", "accuracy_low", "accuracy_high"]] = [low + 0.1, low, low + 0.2]
    (table,) = at_a_glance(self_recognition=rows)
    _, cells = row(table, "self-recognition accuracy")
    assert [cells[arm].stars for arm in ("base", "em", "sgtr")] == ["", "", "*"]
    assert cells["sgtr"] == Cell("0.71", "[0.61, 0.81]", "*")


def test_several_seeds_are_their_mean_and_the_reach_of_their_intervals():
    frame = pd.concat(
        [with_one(seed=0), with_one(seed=1, sd=2.0, sd_low=1.5, sd_high=2.5), with_one(seed=2, p_random=0.3)]
    )
    (table,) = at_a_glance(shifts=frame)
    _, cells = row(table, "shift along evil:text")
    assert cells["em"] == Cell("+1.33", "[+0.80, +2.50]", "")  # the third seed's p is above .05
    assert "seeds 0, 1, 2" in table.title
    assert "in every seed" in table.legend


def test_comparisons_say_what_they_compare_and_what_they_undid():
    tables = {
        "undone": study.undone(), "differences": study.differences(),
        "spread_differences": study.spread_differences(), "behaviour_differences": study.behaviour_differences(),
    }  # fmt: skip
    (table,) = at_a_glance(**tables)
    assert table.header == ("", "reversal: em_then_sgtr − em", "prevention: sgtr_then_em − em")
    here = tables["undone"].query("layer == 15 and condition == 'none' and comparison == 'reversal'")
    for _, planted in here.iterrows():
        _, cells = row(table, f"share of the other arm's change undone at {planted['pooling']}")
        assert cells["reversal: em_then_sgtr − em"].value == f"{planted['undone']:+.2f}".replace("-", "−")
    measures = set(tables["behaviour_differences"]["measure"])
    assert {m for m in measures for label, _ in table.rows if f"difference in {m}" in label} == measures


def test_a_comparison_without_a_share_undone_keeps_its_place():
    both = study.differences()
    (table,) = at_a_glance(differences=both, undone=study.undone(names=("prevention",)))
    assert [name.partition(":")[0] for name in table.header[1:]] == ["reversal", "prevention"]
    _, cells = row(table, "share of the other arm's change undone at prompt_last")
    assert cells["reversal: em_then_sgtr − em"] == Cell()


def test_an_interval_that_is_not_known_is_said_to_be_so_and_a_missing_number_is_a_blank():
    rows = study.behaviour_differences(names=("reversal", "prevention"))
    measure = rows["measure"].iloc[0]
    mine = rows["measure"] == measure
    rows.loc[mine & (rows["comparison"] == "reversal"), ["value_low", "value_high"]] = np.nan
    rows.loc[mine & (rows["comparison"] == "prevention"), "value"] = np.nan
    (table,) = at_a_glance(behaviour_differences=rows)
    _, cells = row(table, f"difference in {measure}")
    reversal, prevention = cells.values()
    assert (reversal.interval, reversal.stars) == ("interval not known", "")
    assert prevention == Cell()


def test_self_reports_asked_under_another_system_prompt_name_it():
    rows = study.self_report(conditions=("identity",))
    (table,) = at_a_glance(self_report=rows)
    assert all("system prompt identity" in label for label, _ in table.rows)
    (table,) = at_a_glance(self_report=study.self_report(conditions=("identity", "none")))
    assert not any("system prompt" in label for label, _ in table.rows)


def test_many_arms_stand_one_below_the_other():
    few, many = ([f"arm{i}" for i in range(n)] for n in (MOST_ACROSS, MOST_ACROSS + 1))
    (across,) = at_a_glance(shifts=study.shifts(arms=few, directions=["evil:text", "identity:name"]))
    (down,) = at_a_glance(shifts=study.shifts(arms=many, directions=["evil:text", "identity:name"]))
    assert across.header == ("", *few)
    assert [label for label, _ in down.rows] == many
    assert len(down.header) == len(across.rows) + 1

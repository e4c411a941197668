"""What was found, at a glance: a table of arms and one of comparisons, each number with its interval, n and verdict.

The verdicts are those of the sentences (`analysis.summary`), in stars: `*` for a shift or difference whose interval excludes 0 and that
random directions do not show (p < .05), `**` where covariance-matched directions do not show it either; for what is not a
direction `*` alone, where the interval excludes 0, or for an arm's behaviour where it does not overlap the base's. Always in every seed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.plot_frame import signed
from analysis.plot_table import directions_in, seeds_text
from analysis.words import (
    ALPHA,
    apart_from,
    at,
    count_range,
    counted,
    is_found,
    plain,
    side_of,
    table_named,
    unreliable,
)

MOST_ACROSS = 8
"""Arms or comparisons that stand side by side; more are written one below the other."""


@dataclass(frozen=True)
class Cell:
    """A number as text: `value`, its 95 % `interval`, and `stars`; all empty where it was not measured."""

    value: str = ""
    interval: str = ""
    stars: str = ""


@dataclass(frozen=True)
class GlanceTable:
    """A table for the eye.

    Attributes:
        title: What is in it, where it was read and over which seeds.
        header: Labels of the columns, the first one of the row labels.
        rows: A label and a cell a column.
        legend: How to read a cell.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    legend: str


Measures = dict[str, dict[str, Cell]]
"""By what was measured (with unit and n), each arm's or comparison's cell."""


def glance(
    tables: Mapping[str, pd.DataFrame], *, layer: int, condition: str, base: str = "base"
) -> list[GlanceTable]:
    """The arms beside the base, and the study's comparisons; without those that were not measured.

    Args:
        tables: The study's tidy tables by name; any may be missing or empty.
        layer: The layer declared before the run, 0-based: activations are read there and nowhere else.
        condition: System prompt condition of what is read from activations, and of self-reports where they were asked under it.
        base: What the study calls the base arm.
    """
    where = f"layer {layer}, system prompt {condition}"
    here = {"layer": layer, "condition": condition}
    arms, compared = _arms(tables, here, base), _comparisons(tables, here)
    behind = [
        (arms, "Arms beside the base", "arm", ("self_recognition", "self_report", "shifts", "dispersion")),
        (compared, "Arms held against each other", "comparison", ("differences", "undone", "behaviour_differences")),
    ]  # fmt: skip
    return [
        _laid_out(f"{title} ({where}, {_seeds(tables, names)})", corner, measures, several_seeds=_seeds_differ(tables, names))
        for measures, title, corner, names in behind
        if measures
    ]  # fmt: skip


def _arms(tables: Mapping[str, pd.DataFrame], here: Mapping[str, Any], base: str) -> Measures:
    """What each arm does, how far it was moved along each reliable direction, and how its spread changed."""
    found: Measures = {}
    recognition = table_named(tables, "self_recognition")
    if not recognition.empty:
        n = counted(recognition["n_articles"].min(), "article")
        label = f"self-recognition accuracy (n = {n})"
        found[label] = _cells(recognition, "arm", "accuracy", plain, _beside(recognition, base, "accuracy"))
    found |= _reports(table_named(tables, "self_report"), str(here["condition"]), base)
    shifts = at(table_named(tables, "shifts"), **here, text="base")
    found |= _along_directions(shifts, "arm", "shift along")
    for pooling, mine in _each(at(table_named(tables, "dispersion"), **here), "pooling"):
        beyond = "d_log_trace_minus_benign"
        column = beyond if beyond in mine and mine[beyond].notna().any() else "d_log_trace"
        less = ", less the benign arm's" if column == beyond else ""
        label = f"change of spread at {pooling}{less} (log trace, n = {counted(mine['n_questions'].min(), 'question')})"
        found[label] = _cells(mine, "arm", column, signed, _excludes_zero(column))
    return found


def _reports(rows: pd.DataFrame, condition: str, base: str) -> Measures:
    """What the models call themselves under `condition`, or else under the first that was asked, which is then named; at the lowest temperature."""
    if rows.empty:
        return {}
    asked = condition if (rows["condition"] == condition).any() else str(rows["condition"].iloc[0])
    rows = at(rows, condition=asked)
    rows = at(rows, temperature=rows["temperature"].min())
    under = "" if asked == condition else f", system prompt {asked}"
    n = f"{counted(rows['n_samples'].min(), 'sample')} of {counted(rows['n_questions'].min(), 'question')}"
    rate = _cells(rows, "arm", "own_name_rate", plain, _beside(rows, base, "own_name_rate"))
    found = {f"replies with the own name (share, n = {n}{under})": rate}
    if rows["n_statements"].min():
        n = counted(rows["n_statements"].min(), "self-statement")
        margin = _cells(rows, "arm", "name_margin", signed, _beside(rows, base, "name_margin"))
        found[f"own name above invented ones (nats, n = {n}{under})"] = margin
    return found


def _comparisons(tables: Mapping[str, pd.DataFrame], here: Mapping[str, Any]) -> Measures:
    """What each comparison undid, along which directions and in what behaviour its two arms differ."""
    names = ("undone", "differences", "spread_differences", "behaviour_differences")
    undone, along, spread, behaviour = (_with_arms(table_named(tables, name)) for name in names)
    found: Measures = {}
    for pooling, mine in _each(at(undone, **here), "pooling"):
        n = counted(mine["n_questions"].min(), "question")
        share = _cells(mine, "comparison", "undone", signed, _excludes_zero("undone"))
        found[f"share of the other arm's change undone at {pooling} (n = {n})"] = share
        left = _cells(mine, "comparison", "distance", plain, lambda _: "")
        found[f"distance left at {pooling} (the other arm's is 1, n = {n})"] = left
    found |= _along_directions(at(along, **here), "comparison", "difference along")
    for pooling, mine in _each(at(spread, **here), "pooling"):
        label = f"difference in spread at {pooling} (log trace, n = {counted(mine['n_questions'].min(), 'question')})"
        found[label] = _cells(mine, "comparison", "d_log_trace", signed, _excludes_zero("d_log_trace"))
    for measure, mine in _each(behaviour, "measure"):
        unit = mine["unit"].iloc[0]
        unit = f"{unit}, " if isinstance(unit, str) and unit else ""
        label = f"difference in {measure} ({unit}n = {count_range(mine['n'])} {mine['of'].iloc[0]})"
        found[label] = _cells(mine, "comparison", "value", signed, _excludes_zero("value"))
    return found


def _with_arms(rows: pd.DataFrame) -> pd.DataFrame:
    """Comparisons named with what they compare: 'reversal: em_then_sgtr − em'."""
    if rows.empty:
        return rows
    return rows.assign(comparison=rows["comparison"] + ": " + rows["arm"] + " − " + rows["against"])


def _along_directions(rows: pd.DataFrame, item: str, what: str) -> Measures:
    """One measure a reliable direction."""
    if rows.empty:
        return {}
    weak = unreliable(rows)
    found: Measures = {}
    for direction in directions_in(rows):
        if direction not in weak:
            mine = rows[rows["direction"] == direction]
            label = f"{what} {direction} (SD, n = {counted(mine['n_questions'].min(), 'question')})"
            found[label] = _cells(mine, item, "sd", signed, _beyond_nulls)
    return found


def _cells(
    rows: pd.DataFrame, item: str, column: str, write: Callable[[float], str], stars: Callable[[pd.DataFrame], str]
) -> dict[str, Cell]:  # fmt: skip
    """Each arm's or comparison's cell; of several seeds the mean, and where all their intervals lie."""
    cells = {}
    for name, mine in _each(rows, item):
        if mine[column].isna().any():
            continue
        low, high = mine[f"{column}_low"].min(skipna=False), mine[f"{column}_high"].max(skipna=False)
        known = not math.isnan(low + high)
        interval = f"[{write(low)}, {write(high)}]" if known else "interval not known"
        cells[name] = Cell(write(mine[column].mean()), interval, stars(mine))
    return cells


def _excludes_zero(column: str) -> Callable[[pd.DataFrame], str]:
    return lambda rows: "*" * abs(side_of(rows, column))


def _beyond_nulls(rows: pd.DataFrame) -> str:
    if not is_found(rows):
        return ""
    return "**" if (rows["p_covariance"] < ALPHA).all() else "*"


def _beside(rows: pd.DataFrame, base: str, column: str) -> Callable[[pd.DataFrame], str]:
    """A star where an arm's intervals lie wholly on one side of the base's."""
    start = rows[rows["arm"] == base]
    return lambda mine: "*" * abs(apart_from(mine, start, column))


def _each(rows: pd.DataFrame, column: str) -> Iterator[tuple[str, pd.DataFrame]]:
    for name, mine in rows.groupby(column, sort=False) if not rows.empty else ():
        yield str(name), mine


def _seeds(tables: Mapping[str, pd.DataFrame], names: Sequence[str]) -> str:
    return seeds_text(next(t for name in names if not (t := table_named(tables, name)).empty))


def _seeds_differ(tables: Mapping[str, pd.DataFrame], names: Sequence[str]) -> bool:
    return any(t["seed"].nunique() > 1 for name in names if not (t := table_named(tables, name)).empty)


def _laid_out(title: str, corner: str, measures: Measures, *, several_seeds: bool) -> GlanceTable:
    """Arms or comparisons side by side, or one below the other where they are many."""
    fullest = sorted(
        measures.values(), key=len, reverse=True
    )  # a measure that some lack does not say their order
    items = list(dict.fromkeys(name for cells in fullest for name in cells))
    legend = (
        f"In brackets {'where the 95 % intervals of all seeds lie, behind their mean' if several_seeds else 'the 95 % interval'}. "
        "Along a direction, * says that the interval excludes 0 and random directions do not show as much (p < .05), ** that directions with the "
        "base's covariance do not either. Elsewhere * says that the interval excludes 0"
        f"{' or, for behaviour, does not overlap the base’s' if corner == 'arm' else ''}"
        f"{'; always in every seed' if several_seeds else ''}. Not corrected for how many numbers there are."
    )
    blank = Cell()
    if len(items) > MOST_ACROSS:
        rows = tuple((name, tuple(c.get(name, blank) for c in measures.values())) for name in items)
        return GlanceTable(title, (corner, *measures), rows, legend)
    rows = tuple((label, tuple(c.get(name, blank) for name in items)) for label, c in measures.items())
    return GlanceTable(title, ("", *items), rows, legend)

"""Sentences on arms held against each other: reversal, prevention, an arm against its control."""

from collections.abc import Iterator

import pandas as pd

from analysis.plot_frame import signed
from analysis.plot_table import seeds_text
from analysis.words import ALPHA, MOST_ARMS, count_range, interval, is_found, side_of, unreliable


def comparison_sentences(
    differences: pd.DataFrame, undone: pd.DataFrame, spread: pd.DataFrame, behaviour: pd.DataFrame
) -> Iterator[str]:
    """One paragraph a comparison: what share of the change is undone, along which directions and in what spread the two differ, what they do differently.

    Args:
        differences: The table of that name at one layer and condition; may be empty, as may the others.
        undone: The same of the shares undone.
        spread: The same of the spread of activations.
        behaviour: Differences in behaviour.
    """
    tables = [table for table in (differences, undone, spread, behaviour) if not table.empty]
    names = list(dict.fromkeys(name for table in tables for name in table["comparison"]))
    brief = len(names) > MOST_ARMS
    for name in names:
        moved, back, wide, done = (_of(t, name) for t in (differences, undone, spread, behaviour))
        rows = next(table for table in (moved, back, wide, done) if not table.empty)
        arm, against = (str(rows[column].iloc[0]) for column in ("arm", "against"))
        parts = [
            *_undone_sentences(back, against, brief=brief),
            *_along_directions(moved, against, brief=brief),
            *_spread_sentences(wide),
            *_behaviour_sentences(done, brief=brief),
        ]
        place = next((_place(table) for table in (moved, back, wide) if not table.empty), "")
        yield f"Comparison {name} ({arm} − {against}{place}, {seeds_text(rows)}): {' '.join(parts)}"
    if not undone.empty:
        yield (
            "How to take these comparisons: any further training moves a model. What is special to one is only said by a comparison with "
            "an arm that has a control in its place."
        )


def _place(rows: pd.DataFrame) -> str:
    """Where activations were read."""
    first = rows.iloc[0]
    return f", read at layer {first['layer']} under the system prompt {first['condition']}"


def _of(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return table if table.empty else table[table["comparison"] == name]


def _along_directions(rows: pd.DataFrame, against: str, *, brief: bool) -> Iterator[str]:
    """Differences that random directions do not show, those that the base's covariance does not show either first."""
    if rows.empty:
        return
    reliable = rows[~rows["direction"].isin(unreliable(rows))]
    special: list[str] = []
    common: list[str] = []
    nothing = 0
    for direction, cell in reliable.groupby("direction", sort=False):
        if not is_found(cell):
            nothing += 1
            continue
        beyond = bool((cell["p_covariance"] < ALPHA).all())
        number = signed(float(cell["sd"].mean())) if brief else f"{interval(cell, 'sd', sign=True)} SD"
        (special if beyond else common).append(f"{direction} {number}{_way(cell, against)}")
    where = f"n = {count_range(rows['n_questions'])} questions a direction"
    if special:
        yield f"Different beyond random and covariance-matched directions ({where}): {'; '.join(special)}."
    if common and not brief:
        yield f"Different beyond random directions only ({where}): {'; '.join(common)}."
    if nothing:
        yield f"No difference found along {nothing} of {reliable['direction'].nunique()} reliable directions."


def _way(cell: pd.DataFrame, against: str) -> str:
    """', back from em's +0.80', '... and past the base', or ', on from' it, where the other arm's own shift is told apart from 0 in every seed."""
    start, step = side_of(cell, "before_sd"), side_of(cell, "sd")
    if not start or not step:
        return ""
    nearest = cell["sd_high" if step < 0 else "sd_low"]
    past = start != step and bool((nearest.abs() > cell["before_sd"].abs()).all())
    way = f"{'on' if start == step else 'back'} from {against}'s {signed(float(cell['before_sd'].mean()))}"
    return f", {way}{' and past the base' if past else ''}"


def _undone_sentences(rows: pd.DataFrame, against: str, *, brief: bool) -> Iterator[str]:
    """The share undone and the distance left, a pooling after the other; where there is no change to undo, that."""
    shares: list[str] = []
    none: list[str] = []
    for pooling, mine in rows.groupby("pooling", sort=False) if not rows.empty else ():
        if mine["undone"].isna().any():
            none.append(str(pooling))
            continue
        far = f", distance from the base {interval(mine, 'distance')} of {against}'s"
        shares.append(f"{interval(mine, 'undone', sign=True)} at {pooling}{'' if brief else far}")
    if shares:
        yield f"Share of {against}'s change undone (n = {count_range(rows['n_questions'])} questions): {'; '.join(shares)}."
    if none and not brief:
        yield f"At {' and '.join(none)} {against}'s change from the base is not told apart from none: nothing to undo."


def _spread_sentences(rows: pd.DataFrame) -> Iterator[str]:
    parts = [
        f"{interval(mine, 'd_log_trace', sign=True)} at {pooling}"
        for pooling, mine in (rows.groupby("pooling", sort=False) if not rows.empty else ())
    ]
    if parts:
        yield f"Change of spread (log trace): {'; '.join(parts)}."


def _behaviour_sentences(rows: pd.DataFrame, *, brief: bool) -> Iterator[str]:
    """Differences in behaviour that are told apart from 0, in every seed, then those that are not."""
    if rows.empty:
        return
    apart = rows.groupby("measure")[["value_low", "value_high"]].apply(
        lambda mine: bool(side_of(mine, "value"))
    )
    found, nothing = (rows[rows["measure"].map(apart) == wanted] for wanted in (True, False))
    if not found.empty:
        yield f"Behaviour differs in {_measures(found, brief=brief)}."
    if not nothing.empty and not brief:
        start = "Behaviour is not told apart" if found.empty else "Not told apart"
        yield f"{start} in {_measures(nothing, brief=brief)}."


def _measures(rows: pd.DataFrame, *, brief: bool) -> str:
    """'accuracy +0.10 [...], margin +0.32 [...] nats (n = 20 articles); own-name rate ...', or the names alone."""
    if brief:
        return ", ".join(dict.fromkeys(rows["measure"]))
    parts = []
    for of, counted in rows.groupby("of", sort=False):
        texts = []
        for measure, mine in counted.groupby("measure", sort=False):
            unit = mine["unit"].iloc[0]
            number = interval(mine, "value", sign=True)
            texts.append(f"{measure} {number}{f' {unit}' if isinstance(unit, str) and unit else ''}")
        parts.append(f"{', '.join(texts)} (n = {count_range(counted['n'])} {of})")
    return "; ".join(parts)

"""Reading a tidy table for a figure: which of its rows, which columns, what its error bars are."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.plot_style import is_identity
from mech.errors import InputError


def select(frame: pd.DataFrame, **labels: Any) -> pd.DataFrame:
    """The rows whose columns equal the labels; a label of None leaves no row out.

    An empty frame stays empty (the thing was not measured).

    Raises:
        InputError: a column is missing, or there are rows but none fits; the message lists what there is.
    """
    wanted = {column: value for column, value in labels.items() if value is not None}
    if frame.empty:
        return frame
    need(frame, *wanted)
    rows = frame
    for column, value in wanted.items():
        kept = rows[rows[column] == value]
        if kept.empty:
            there = ", ".join(sorted({str(v) for v in rows[column]}))
            raise InputError(
                f"no row with {column} = {value!r} (of {wanted}); the table has {column}: {there}"
            )
        rows = kept
    return rows


def need(frame: pd.DataFrame, *columns: str) -> None:
    """Raise an InputError that names the columns a table lacks."""
    if missing := [column for column in columns if column not in frame.columns]:
        raise InputError(
            f"the table lacks the column(s) {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}"
        )


def single(frame: pd.DataFrame, *columns: str) -> None:
    """Raise an InputError where one of the columns takes several values: they must not be drawn as one."""
    for column in columns:
        values = sorted({str(v) for v in frame[column]})
        if len(values) > 1:
            raise InputError(f"the table has several values of {column} ({', '.join(values)}): choose one")


def directions_in(frame: pd.DataFrame) -> list[str]:
    """The directions of a table in its own order, personas before identity."""
    return sorted(dict.fromkeys(map(str, frame["direction"])), key=is_identity)


def numbers(rows: pd.DataFrame, column: str) -> Float[np.ndarray, " n"]:
    """A column as float64; a missing value is NaN."""
    return rows[column].to_numpy(dtype=np.float64, na_value=np.nan)


def spread(
    value: Float[np.ndarray, " n"], low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "2 n"]:
    """Lengths of error bars below and above a value; an end that is not known (NaN) has no bar."""
    return np.asarray(np.nan_to_num(np.maximum(np.stack([value - low, high - value]), 0.0)))


def interval_bars(rows: pd.DataFrame, column: str) -> Float[np.ndarray, "2 n"] | None:
    """Lengths of a column's error bars from `column_low` and `column_high`; None where the table has no interval."""
    if f"{column}_low" not in rows.columns:
        return None
    return spread(*(numbers(rows, f"{column}{end}") for end in ("", "_low", "_high")))


def seeds_text(frame: pd.DataFrame) -> str:
    """'one seed (0)' or 'seeds 0, 1, 2'."""
    seeds = [str(s) for s in sorted(frame["seed"].dropna().unique())] if "seed" in frame.columns else []
    if not seeds:
        return ""
    return f"one seed ({seeds[0]})" if len(seeds) == 1 else f"seeds {', '.join(seeds)}"

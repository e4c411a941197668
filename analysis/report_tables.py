"""Tables for people: sensible digits, intervals in one cell, columns that never change stated once."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

ROWS_SHOWN = 200
"""A longer table is cut here and says so."""
ROWS_OPEN = 15
"""A longer table starts folded."""


@dataclass(frozen=True)
class Grid:
    """A table as text: `fixed` are the columns with one value, `note` says what was left out."""

    name: str
    header: list[str]
    rows: list[list[str]]
    fixed: list[tuple[str, str]]
    note: str
    link: str | None

    @property
    def long(self) -> bool:
        """Whether it starts folded."""
        return len(self.rows) > ROWS_OPEN


def to_grid(name: str, table: pd.DataFrame, *, layer: int | None = None, link: str | None = None) -> Grid:
    """A table made ready to read.

    `X`, `X_low` and `X_high` become one column "X [95 % interval]"; a column of labels with one value leaves
    the table and is said above it; a table of more than 200 rows is narrowed to `layer` (where given and
    where it has that column) and then cut at 200 rows; `note` says so.
    """
    rows, notes = table, []
    if (
        layer is not None
        and len(rows) > ROWS_SHOWN
        and "layer" in rows.columns
        and (rows["layer"] == layer).any()
    ):
        rows = rows[rows["layer"] == layer]
        if (layers := table["layer"].nunique()) > 1:
            notes.append(f"layer {layer} only, of {layers} layers")
    if len(rows) > ROWS_SHOWN:
        notes.append(f"the first {ROWS_SHOWN} rows of {len(rows):,}")
        rows = rows.head(ROWS_SHOWN)
    columns = [str(c) for c in rows.columns]
    fixed = []
    if len(rows) > 1:
        labels = [
            c
            for c in columns
            if not pd.api.types.is_float_dtype(rows[c]) and rows[c].nunique(dropna=False) == 1
        ]
        fixed = [(c, number(rows[c].iloc[0], c)) for c in labels]
        columns = [c for c in columns if c not in labels]
    ends = {
        f"{c}{end}" for c in columns for end in ("_low", "_high") if {f"{c}_low", f"{c}_high"} <= set(columns)
    }
    shown = [c for c in columns if c not in ends]
    header = [f"{c} [95 %]" if f"{c}_low" in ends else c for c in shown]
    records = rows.to_dict("records")
    cells = [[_cell(record, c, has_interval=f"{c}_low" in ends) for c in shown] for record in records]
    return Grid(name, header, cells, fixed, "; ".join(notes), link)


def _cell(record: dict[Any, Any], column: str, *, has_interval: bool) -> str:
    text = number(record[column], column)
    if not has_interval or text == "–":
        return text
    value, low, high = (float(record[f"{column}{end}"]) for end in ("", "_low", "_high"))
    if not np.isfinite([value, low, high]).all():
        return f"{text} [{number(low)}, {number(high)}]"
    size = max(abs(value), abs(low), abs(high)) or 1.0
    digits = min(12, max(0, 2 - math.floor(math.log10(size))))  # one number of decimals for all three
    return f"{_decimals(value, digits)} [{_decimals(low, digits)}, {_decimals(high, digits)}]"


def _decimals(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return (text if float(text.replace(",", "")) else text.lstrip("-")).replace("-", "−")


def number(value: Any, column: str = "") -> str:
    """A value as text: three significant digits, p values to three places, a dash for what is missing."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return "–"
    if isinstance(value, numbers.Integral):
        return f"{int(value)}".replace("-", "−")
    if isinstance(value, numbers.Real):
        return _real(float(value), column).replace("-", "−")
    return str(value)


def _real(value: float, column: str) -> str:
    if column.startswith("p_") and column != "p_yes":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    if np.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value.is_integer() and abs(value) < 1000:
        return f"{value:.0f}".replace("-0", "0")
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:#.3g}".rstrip(".")

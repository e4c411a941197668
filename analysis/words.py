"""Numbers in sentences: intervals, counts and sides of 0, over seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.plot_frame import signed
from analysis.plot_style import RELIABLE_COSINE

ALPHA = 0.05
MOST_ARMS = 12
"""Of more arms the paragraphs are brief: what they leave out is in the tables."""
MOST_SEEDS = 2
"""Seeds whose intervals are all written out; of more their range is given, and each has its row in the tables."""


def table_named(tables: Mapping[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """A table by name, empty where there is none."""
    return tables.get(name, pd.DataFrame())


def at(frame: pd.DataFrame, **labels: Any) -> pd.DataFrame:
    """The rows of a table that fit the labels; none where it is empty."""
    for column, value in labels.items() if not frame.empty else ():
        frame = frame[frame[column] == value]
    return frame


def plain(value: float, digits: int = 2) -> str:
    """A number with a true minus."""
    return f"{value:.{digits}f}".replace("-", "−")


def interval(rows: pd.DataFrame, column: str, *, sign: bool = False) -> str:
    """'0.42 [0.30, 0.55]' for one seed, '0.42 (mean of 2 seeds: 0.40 [0.30, 0.50]; ...)' for two.

    For more, '0.42 (0.30 to 0.55)': the mean, and where all seeds' intervals lie. Ends that are not known are said to be so.
    """
    write = signed if sign else plain

    def ends(low: float, high: float, between: str) -> str:
        return "interval not known" if math.isnan(low + high) else f"{write(low)}{between}{write(high)}"

    if len(rows) > MOST_SEEDS:
        low = rows[f"{column}_low"].min(skipna=False)  # one seed's unknown end makes the range unknown
        high = rows[f"{column}_high"].max(skipna=False)
        return f"{write(rows[column].mean())} ({ends(low, high, ' to ')})"
    each = [
        f"{write(v)} [{ends(low, high, ', ')}]"
        for v, low, high in zip(rows[column], rows[f"{column}_low"], rows[f"{column}_high"], strict=True)
    ]
    if len(each) == 1:
        return each[0]
    return f"{write(rows[column].mean())} (mean of {len(each)} seeds: {'; '.join(each)})"


def side_of(rows: pd.DataFrame, column: str) -> int:
    """+1 or -1 where every row's interval lies above or below 0, else 0."""
    if (rows[f"{column}_low"] > 0).all():
        return 1
    return -1 if (rows[f"{column}_high"] < 0).all() else 0


def apart_from(rows: pd.DataFrame, base: pd.DataFrame, column: str) -> int:
    """+1 or -1 where every row's interval lies above or below every one of the base's, else 0; 0 where there is no base."""
    if base.empty:
        return 0
    if rows[f"{column}_low"].min() > base[f"{column}_high"].max():
        return 1
    return -1 if rows[f"{column}_high"].max() < base[f"{column}_low"].min() else 0


def listed(names: Sequence[str], *, total: int) -> str:
    """Arms by name; more than a sentence holds by their number: 'all 25 arms', '14 arms (the table names them)'."""
    if len(names) <= MOST_ARMS:
        return ", ".join(names)
    return f"all {total} arms" if len(names) == total else f"{len(names)} arms (the table names them)"


def counted(value: object, word: str) -> str:
    """'1,024 questions', '1 question'."""
    count = int(str(value))
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def count_range(counts: pd.Series) -> str:
    """'12', or '12 to 24'."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"


def is_found(cell: pd.DataFrame) -> bool:
    """Whether a shift is called found: on one side of 0 in every seed, and larger than along random directions."""
    return bool(side_of(cell, "sd")) and bool((cell["p_random"] < ALPHA).all())


def unreliable(rows: pd.DataFrame) -> dict[str, float]:
    """Directions with too low a split-half cosine."""
    ceilings = rows.groupby("direction", sort=False)["split_half"].mean()
    return {str(d): float(c) for d, c in ceilings.items() if c < RELIABLE_COSINE}

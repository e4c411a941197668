"""Panels that are read down: a name a row, and in it points with their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.plot_style import INK, ArmStyle
from analysis.plot_table import interval_bars, numbers


def seed_places(row: int, seeds: int) -> Float[np.ndarray, " seeds"]:
    """Heights of a row's points, a seed each, side by side."""
    return row + np.linspace(-0.2, 0.2, seeds) * (seeds > 1)


def points(
    axes: Any, rows: pd.DataFrame, column: str, places: Float[np.ndarray, " n"], style: ArmStyle, fill: str
) -> None:
    """A point and its interval for each row of a table, at given heights."""
    axes.errorbar(
        numbers(rows, column), places, xerr=interval_bars(rows, column), fmt=style.marker, color=INK,
        markersize=5, markerfacecolor=fill, elinewidth=1.1, capsize=2.5,
    )  # fmt: skip


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """Names down the left side, the first on top, and a line at 0."""
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)

"""The figure of dispersion: how much wider or narrower each arm's activations lie than the base's."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.condition_plots import condition_keys, draw_conditions, draw_levels
from analysis.plot_frame import head, key, label, not_measured, panels
from analysis.plot_style import BENIGN, arms_in, styled
from analysis.plot_table import need, select, single

MEASURES = {
    "d_log_trace": "spread\n(change of the log trace)",
    "d_entropy_rank": "dimensions in use\n(change of the effective rank)",
}
"""Columns that are drawn, a row of panels each, and what their axis is called."""


@styled
def dispersion_by_condition(frame: pd.DataFrame, *, layer: int, arms: Sequence[str] | None = None) -> Figure:
    """Change of spread and of effective rank of every arm under each system-prompt condition, against the base.

    One column a pooling, one row a measure; arms along the axis, conditions as markers side by side; a point is one seed with
    its interval. The bar beside a point is the benign control under the same condition (mean over seeds), since any training
    changes the spread: "destabilised" would be above it.

    Args:
        frame: The `dispersion` table.
        layer: The layer declared before the run.
        arms: The study's arms, the base first, for order and colours.
    """
    title = f"Do activations spread? Dispersion at layer {layer} against the base's"
    rows = select(frame, layer=layer)
    if rows.empty:
        return not_measured(title)
    single(rows, "layer")
    need(rows, *MEASURES)
    styles, conditions = arms_in(rows, arms), list(dict.fromkeys(rows["condition"]))
    poolings = list(dict.fromkeys(rows["pooling"]))
    size = (max(3.6, 0.42 * len(styles)), 2.5)
    figure, cells = panels(len(poolings) * len(MEASURES), columns=len(poolings), sharex=True, size=size)
    for i, (axes, column) in enumerate(zip(cells, [m for m in MEASURES for _ in poolings], strict=True)):
        mine = rows[rows["pooling"] == poolings[i % len(poolings)]]
        draw_conditions(axes, mine, styles, conditions, column)
        draw_levels(axes, _beside_benign(mine, column), styles, conditions, "control", BENIGN)
        axes.set_title(label(poolings[i % len(poolings)], 30))
        axes.set_ylabel(MEASURES[column] if i % len(poolings) == 0 else "")
    keys: list[Any] = condition_keys(conditions)
    if not _beside_benign(rows, "d_log_trace").empty:
        keys.append(Line2D([], [], color=BENIGN, lw=2.2, label="benign control, same system prompt"))
    key(figure, keys, columns=4)
    head(
        figure,
        title,
        "text read by both models: the base's replies · log trace: +0.1 is a mean squared distance 10 % larger",
    )
    return figure


def _beside_benign(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Rows of arms other than the control, and what it changed there (`control`): an arm's change less that beyond the control."""
    beyond = f"{column}_minus_benign"
    if beyond not in rows:
        return rows[:0].assign(control=0.0)
    return rows.assign(control=rows[column] - rows[beyond]).dropna(subset=["control"])

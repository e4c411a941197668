"""The figure of the system-prompt ablation: each arm's shift under every condition."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.plot_style import (
    GREY,
    INK,
    ArmStyle,
    arms_in,
    axis_labels,
    head,
    key,
    label,
    not_measured,
    numbers,
    panels,
    select,
    spread,
    styled,
)

MARKERS = "osD^vP*X"


@styled
def shift_by_condition(frame: pd.DataFrame, *, layer: int, arms: Sequence[str] | None = None) -> Figure:
    """Shift of every arm along each direction under each system-prompt condition, at one layer, in SD.

    One panel a direction; arms along the axis, conditions as markers side by side; a point is one seed with its
    interval. Grey: where random directions fall (the widest over conditions and seeds).
    """
    title = f"Does the system prompt matter? Shifts at layer {layer} under each condition"
    rows = select(frame, layer=layer)
    if rows.empty or set(rows["arm"]) == {"base"}:
        return not_measured(title)
    rows = rows[rows["arm"] != "base"]
    styles, conditions = arms_in(rows, arms), list(dict.fromkeys(rows["condition"]))
    directions = list(dict.fromkeys(rows["direction"]))
    figure, cells = panels(len(directions), sharex=True, size=(3.6, 2.5))
    for axes, direction in zip(cells, directions, strict=True):
        _panel(axes, rows[rows["direction"] == direction], styles, conditions)
        axes.set_title(label(direction, 40))
    axis_labels(cells, x="", y="shift\n(SD of the base's projection)")
    keys = [
        Line2D(
            [], [], color=INK, ls="", marker=MARKERS[i % len(MARKERS)], label=f"system prompt: {label(c, 30)}"
        )
        for i, c in enumerate(conditions)
    ]
    key(figure, keys, columns=3)
    head(
        figure,
        title,
        "text read by both models: the base's replies · pooling, questions: each direction's own",
    )
    return figure


def _panel(axes: Any, rows: pd.DataFrame, styles: dict[str, ArmStyle], conditions: list[str]) -> None:
    step = 0.7 / len(conditions)
    for place, (arm, style) in enumerate(styles.items()):
        for i, condition in enumerate(conditions):
            mine = rows[(rows["arm"] == arm) & (rows["condition"] == condition)]
            if mine.empty:
                continue
            x = (
                place
                + (i - (len(conditions) - 1) / 2) * step
                + np.linspace(-0.1, 0.1, len(mine)) * step * (len(mine) > 1)
            )
            bars = spread(*(numbers(mine, f"sd{end}") for end in ("", "_low", "_high")))
            axes.errorbar(
                x, numbers(mine, "sd"), yerr=bars, fmt=MARKERS[i % len(MARKERS)], color=style.colour, markersize=4.5,
                elinewidth=1.0, label=f"{arm} {condition}",
            )  # fmt: skip
            low = float((mine["null_random_low"] / mine["base_sd"]).min())
            high = float((mine["null_random_high"] / mine["base_sd"]).max())
            axes.fill_between(
                [x.min() - step / 2, x.max() + step / 2], low, high, color=GREY, alpha=0.18, lw=0, zorder=0
            )
    axes.axhline(0, color=INK, lw=0.8)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(
        range(len(styles)), [label(a, 18) for a in styles], rotation=25, ha="right", rotation_mode="anchor"
    )

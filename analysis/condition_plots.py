"""The figure of the system-prompt ablation, each arm's shift under every condition; and how conditions are drawn side by side."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.plot_frame import axis_labels, head, key, label, not_measured, panels, whose_text, wide_panels
from analysis.plot_style import GREY, INK, RELIABLE_COSINE, ArmStyle, arms_in, styled, tint
from analysis.plot_table import directions_in, interval_bars, need, numbers, select

MARKERS = "osD^vPX*"
FILLS = (1.0, 0.0, 0.45)
"""How strongly the markers of the conditions are filled, in turn: told apart without their shape."""


@styled
def shift_by_condition(
    frame: pd.DataFrame, *, layer: int, text: str = "base", arms: Sequence[str] | None = None
) -> Figure:
    """Shift of every arm along each direction under each system-prompt condition, at one layer, in SD.

    One panel a direction; arms along the axis, conditions as markers side by side; a point is one seed with its
    interval, and of several seeds a marker is their mean. Grey behind it: where random directions fall (the widest over seeds).

    Args:
        frame: The `shifts` table.
        layer: The layer declared before the run.
        text: Whose replies both models read.
        arms: The study's arms, the base first, for order and colours.
    """
    title = f"Does the system prompt matter? Shifts at layer {layer} under each condition"
    rows = select(frame, layer=layer, text=text)
    if rows.empty:
        return not_measured(title)
    need(rows, "sd", "base_sd", "null_random_low", "null_random_high", "split_half")
    styles, conditions = arms_in(rows, arms), list(dict.fromkeys(rows["condition"]))
    directions = directions_in(rows)
    each = max(0.42, 0.12 * len(conditions))  # no marker covers its neighbour
    size = wide_panels(each * len(styles))
    figure, cells = panels(len(directions), sharex=True, **size)
    for axes, direction in zip(cells, directions, strict=True):
        mine = rows[rows["direction"] == direction]
        draw_conditions(axes, mine, styles, conditions, "sd")
        _null_bands(axes, mine, styles, conditions)
        weak = mine["split_half"].mean() < RELIABLE_COSINE
        axes.set_title(
            f"{label(direction, 30)}{' (unreliable)' if weak else ''}", color=GREY if weak else INK
        )
    axis_labels(cells, x="", y="shift (SD)", columns=size["columns"])
    keys: list[Any] = condition_keys(conditions)
    keys.append(Patch(color=tint(GREY, 0.3), lw=0, label="random directions, 95 %"))
    key(figure, keys, columns=4)
    held = f"text read by both models: {whose_text(text)} · pooling and questions: each direction's own · SD of the base's projection"
    head(figure, title, held)
    return figure


def condition_keys(conditions: Sequence[str]) -> list[Any]:
    """The legend's entry for each condition's marker."""
    return [
        Line2D([], [], color=INK, ls="", label=f"system prompt: {label(c, 30)}", **_marker(i, INK))
        for i, c in enumerate(conditions)
    ]


def _marker(place: int, colour: str) -> dict[str, Any]:
    """Shape and filling of a condition's marker."""
    fill = tint(colour, FILLS[place % len(FILLS)])
    return {"marker": MARKERS[place % len(MARKERS)], "markersize": 5, "mfc": fill, "mec": colour, "mew": 1.1}


def draw_conditions(
    axes: Any, rows: pd.DataFrame, styles: dict[str, ArmStyle], conditions: Sequence[str], column: str
) -> None:
    """A column of a table with its intervals: arms along the axis, conditions side by side, a point a seed and over several their mean."""
    found = dict(list(rows.groupby(["arm", "condition"], sort=False)))
    for arm, style in styles.items():
        for i, condition in enumerate(conditions):
            mine = found.get((arm, condition))
            if mine is None:
                continue
            marker, values = _marker(i, style.colour), numbers(mine, column)
            places = _places(styles, arm, i, len(conditions), len(mine))
            seeds = marker if len(mine) == 1 else {"marker": ".", "markersize": 2, "alpha": 0.6}
            axes.errorbar(
                places, values, yerr=interval_bars(mine, column), color=style.colour, ls="",
                elinewidth=1.2 if len(mine) == 1 else 0.6, label=f"{arm} {condition}", **seeds,
            )  # fmt: skip
            if len(mine) > 1:
                axes.plot(places.mean(), mine[column].mean(), ls="", **marker)
    axes.axhline(0, color=INK, lw=0.8)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(
        range(len(styles)), [label(a) for a in styles], rotation=25, ha="right", rotation_mode="anchor"
    )


def draw_levels(
    axes: Any, rows: pd.DataFrame, styles: dict[str, ArmStyle], conditions: Sequence[str], column: str, colour: str
) -> None:  # fmt: skip
    """A short bar at the height of a column, its mean over seeds, behind each arm's point of each condition."""
    half = _step(len(conditions)) / 2
    for (arm, condition), mine in rows.groupby(["arm", "condition"], sort=False):
        x = _places(styles, str(arm), list(conditions).index(str(condition)), len(conditions), 1)[0]
        axes.hlines(mine[column].mean(), x - half, x + half, color=colour, lw=2.2, zorder=0)


def _places(
    styles: dict[str, ArmStyle], arm: str, condition: int, conditions: int, seeds: int
) -> Float[np.ndarray, " seeds"]:
    """Where along the axis the seeds of an arm under one of so many conditions stand."""
    step = _step(conditions)
    centre = list(styles).index(arm) + (condition - (conditions - 1) / 2) * step
    return centre + np.linspace(-0.35, 0.35, seeds) * step * (seeds > 1)


def _step(conditions: int) -> float:
    return 0.7 / conditions


def _null_bands(
    axes: Any, rows: pd.DataFrame, styles: dict[str, ArmStyle], conditions: Sequence[str]
) -> None:
    """Where random directions fall, behind each arm's point, the widest over seeds."""
    half, boxes = _step(len(conditions)) / 2, []
    for (arm, condition), mine in rows.groupby(["arm", "condition"], sort=False):
        if arm not in styles or condition not in conditions:
            continue
        x = _places(styles, str(arm), list(conditions).index(str(condition)), len(conditions), 1)[0]
        low = float((mine["null_random_low"] / mine["base_sd"]).min())
        high = float((mine["null_random_high"] / mine["base_sd"]).max())
        boxes.append([(x - half, low), (x - half, high), (x + half, high), (x + half, low)])
    # One collection: drawn and measured as one, where a band by itself for each point took most of the figure's time.
    axes.add_collection(PolyCollection(boxes, color=tint(GREY, 0.3), lw=0, zorder=0))

"""The figures of comparisons: what one arm has that another has not.

The contract is that of `analysis.plots`, which exports these functions too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.plot_frame import (
    LAYERS,
    axis_labels,
    head,
    held_fixed,
    key,
    label,
    layer_axis,
    layer_key,
    not_measured,
    panels,
)
from analysis.plot_rows import name_rows, points, seed_places
from analysis.plot_style import FAINT, GREY, INK, RELIABLE_COSINE, ArmStyle, arms_in, styled
from analysis.plot_table import directions_in, need, numbers, select, single

DASHES = ("-", "--", "-.", ":")


@styled
def comparison_differences(
    frame: pd.DataFrame, *, layer: int, condition: str, arms: Sequence[str] | None = None
) -> Figure:
    """Along each direction: the arm's projection minus the other arm's, at one layer, in SD of the base's projection.

    One panel a comparison, directions down the axis, a point a seed with its interval. Grey: where random directions fall (the widest
    over seeds). Diamond: where the base lies, as the other arm's own shift with its sign changed (mean over seeds): a difference
    that reaches it leaves nothing of that shift; none where the other arm is the base. Names of directions that are not reliable are grey.

    Args:
        frame: The `differences` table.
        layer: The layer declared before the run.
        condition: System prompt condition.
        arms: The study's arms, for order and colours.
    """
    title = f"Held against each other: differences along each direction at layer {layer}"
    rows = select(frame, layer=layer, condition=condition)
    if rows.empty:
        return not_measured(title)
    need(rows, "before_sd", "null_random_low", "null_random_high", "split_half")
    styles, names, compared = arms_in(rows, arms), directions_in(rows), _comparisons(rows)
    figure, cells = panels(
        len(compared), sharex=True, sharey=True, size=(4.4, max(2.2, 0.24 * len(names) + 0.9))
    )
    for axes, (name, mine) in zip(cells, compared.items(), strict=True):
        _difference_panel(axes, mine, names, styles[str(mine["arm"].iloc[0])])
        axes.set_title(_named(name, mine))
    weak = rows.groupby("direction")["split_half"].mean() < RELIABLE_COSINE
    for axes in cells:
        for tick, name in zip(
            axes.get_yticklabels(), names, strict=False
        ):  # only a row's first panel has any
            tick.set_color(GREY if weak[name] else INK)
    axis_labels(cells, x="difference (SD of the base's projection)", y="")
    keys: list[Any] = [
        Patch(color=FAINT, lw=0, label="random directions, 95 %"),
    ]
    if not all(map(_from_base, compared.values())):
        label_of_base = "the base (nothing left of the other arm's shift)"
        keys.append(
            Line2D([], [], color=INK, ls="", marker="D", mfc="none", markersize=5, label=label_of_base)
        )
    key(figure, keys, columns=2)
    head(figure, title, held_fixed(rows))
    return figure


def _difference_panel(axes: Any, rows: pd.DataFrame, names: Sequence[str], style: ArmStyle) -> None:
    for place, name in enumerate(names):
        mine = rows[rows["direction"] == name].sort_values("seed")
        if mine.empty:
            continue
        low, high = (mine[f"null_random_{end}"] / mine["base_sd"] for end in ("low", "high"))
        axes.barh(place, high.max() - low.min(), left=low.min(), height=0.7, color=FAINT, lw=0, zorder=0)
        points(axes, mine, "sd", seed_places(place, len(mine)), style, style.colour)
        if not _from_base(rows):
            axes.plot(-mine["before_sd"].mean(), place, ls="", marker="D", mfc="none", mec=INK, markersize=5)
    name_rows(axes, [label(d, 34) for d in names])
    axes.grid(visible=False, axis="y")


def _from_base(rows: pd.DataFrame) -> bool:
    """Whether the other arm is the base, which is nowhere shifted from itself."""
    return bool((rows["before_sd"] == 0).all())


@styled
def undone_by_layer(
    frame: pd.DataFrame, *, condition: str, layer: int | None = None, arms: Sequence[str] | None = None
) -> Figure:
    """How much of the other arm's change an arm lacks, and how far from the base it ends, against the layer.

    One row of panels a pooling: the share undone on the left (1: back beside the base, 0: nothing undone), the distance from the base
    over the other arm's on the right. A line a seed with its interval, in the arm's colour, dashed where an earlier comparison has the
    same arm; gaps are layers at which the change itself is not told apart from none.

    Args:
        frame: The `undone` table.
        condition: System prompt condition.
        layer: The layer declared before the run; marked by a vertical line where given.
        arms: The study's arms, for colours.
    """
    title = "Is the change undone? Share of the way back to the base, layer by layer"
    rows = select(frame, condition=condition)
    if rows.empty:
        return not_measured(title)
    poolings, compared = list(dict.fromkeys(rows["pooling"])), _comparisons(rows)
    styles, dashes = arms_in(rows, arms), _dashes(compared)
    figure, cells = panels(2 * len(poolings), columns=2, sharex=True, size=(4.2, 2.6))
    keys = {}
    for place, (pooling, column) in enumerate((p, c) for p in poolings for c in ("undone", "distance")):
        axes = cells[place]
        for name, mine in compared.items():
            style = styles[str(mine["arm"].iloc[0])]
            keys[name] = Line2D([], [], color=style.colour, ls=dashes[name], label=_named(name, mine))
            for _, line in mine[mine["pooling"] == pooling].sort_values("layer").groupby("seed"):
                axes.plot(line["layer"], line[column], color=style.colour, ls=dashes[name], lw=1.5)
                low, high = (numbers(line, f"{column}_{end}") for end in ("low", "high"))
                axes.fill_between(line["layer"], low, high, color=style.colour, alpha=0.2, lw=0)
        what = "share undone" if column == "undone" else "distance from the base / the other arm's"
        axes.set_title(f"{what}, {pooling}")
        for level in (0, 1):
            axes.axhline(level, color=INK, lw=0.8, ls="-" if level == 0 else "--")
        axes.set_ylim(*_room(rows[rows["pooling"] == pooling], column))
        layer_axis(axes, layer)
    axis_labels(cells, x=LAYERS, y="", columns=2)
    key(figure, [*keys.values(), *layer_key(layer)], columns=3)
    head(figure, title, f"system prompt: {label(condition, 40)} · text read by all: the base's replies")
    return figure


def _dashes(compared: dict[str, pd.DataFrame]) -> dict[str, str]:
    """A line style for each comparison: those of one arm differ, since they share its colour."""
    arms = [str(mine["arm"].iloc[0]) for mine in compared.values()]
    return {name: DASHES[arms[:i].count(arms[i]) % len(DASHES)] for i, name in enumerate(compared)}


def _room(rows: pd.DataFrame, column: str) -> tuple[float, float]:
    """Room for all lines, and for their intervals as far as these do not more than double it."""
    line = rows[column].dropna()
    low, high = min(0.0, line.min()) if len(line) else 0.0, max(1.0, line.max()) if len(line) else 1.0
    reach = 0.5 * (high - low)
    ends = [rows[f"{column}_{end}"].clip(low - reach, high + reach) for end in ("low", "high")]
    bottom, top = np.nanmin([low, ends[0].min()]), np.nanmax([high, ends[1].max()])
    return float(bottom - 0.05 * (top - bottom)), float(top + 0.05 * (top - bottom))


@styled
def behaviour_differences(frame: pd.DataFrame, *, arms: Sequence[str] | None = None) -> Figure:
    """What an arm does that the other does not: one panel a measure, comparisons down the axis, a point a seed with its interval.

    Args:
        frame: The `behaviour_differences` table.
        arms: The study's arms, for order and colours.
    """
    title = "Held against each other: differences in behaviour"
    if frame.empty:
        return not_measured(title)
    need(frame, "measure", "unit", "value", "value_low", "value_high")
    styles, measures, compared = (
        arms_in(frame, arms),
        list(dict.fromkeys(frame["measure"])),
        _comparisons(frame),
    )
    figure, cells = panels(len(measures), sharey=True, size=(3.4, max(1.5, 0.3 * len(compared) + 1.0)))
    for axes, measure in zip(cells, measures, strict=True):
        for place, mine in enumerate(compared.values()):
            here = mine[mine["measure"] == measure].sort_values("seed")
            style = styles[str(mine["arm"].iloc[0])]
            points(axes, here, "value", seed_places(place, len(here)), style, style.colour)
        unit = frame[frame["measure"] == measure]["unit"].iloc[0]
        axes.set_title(f"{measure}{f' ({unit})' if isinstance(unit, str) and unit else ''}")
        name_rows(axes, [label(name, 34) for name in compared])
        axes.grid(visible=False, axis="y")
    axis_labels(cells, x="difference", y="")
    pairs = [_named(name, mine) for name, mine in compared.items()]
    head(figure, title, " · ".join(pairs))
    return figure


def _comparisons(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each comparison, in the table's order."""
    found = {str(name): mine for name, mine in rows.groupby("comparison", sort=False)}
    for mine in found.values():
        single(mine, "arm", "against")
    return found


def _named(name: str, rows: pd.DataFrame) -> str:
    return f"{label(name, 34)}: {label(rows['arm'].iloc[0], 34)} − {label(rows['against'].iloc[0], 34)}"

"""The figures: one function each, from a tidy table to a `matplotlib.figure.Figure`.

This module holds the figures of the shifts; those of the directions and of the activations'
place stand in `analysis.geometry_plots`, those of the identity family in `analysis.family_plots`, those of behaviour in `analysis.behaviour_plots`, and all are exported here. A function draws what its table says and computes
nothing but means over seeds and changes of unit. Seeds are never hidden: each has its own line or point.
An empty table gives a figure that says that this was not measured; labels that fit no row of a table
that has rows are an `InputError`. `arms` (where taken) is the study's list of arms, the base first whatever its
name: it fixes order and colours across figures. Shifts are relative to the base, so their tables have no rows of it.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from analysis.behaviour_plots import dose_response, loss_curves, self_recognition_bars, self_report_bars
from analysis.condition_plots import shift_by_condition
from analysis.family_plots import identity_cosines, identity_transfer
from analysis.geometry_plots import direction_cosines, direction_quality, embedding
from analysis.group_plots import shift_by_layer_in_groups
from analysis.plot_files import SavedFigure, caption, save_figure
from analysis.plot_style import (
    BLACK,
    FAINT,
    GREY,
    INK,
    RELIABLE_COSINE,
    ArmStyle,
    arm_styles,
    arms_in,
    axis_labels,
    directions_in,
    head,
    key,
    label,
    need,
    not_measured,
    numbers,
    panels,
    reliability,
    select,
    signed,
    single,
    spread,
    styled,
    tint,
)  # fmt: skip

__all__ = [
    "SavedFigure", "arm_direction_heatmap", "arm_styles", "caption", "direction_cosines", "direction_quality", "dose_response",
    "embedding", "identity_cosines", "identity_transfer", "loss_curves", "save_figure", "self_recognition_bars", "self_report_bars", "shift_by_condition", "shift_by_layer",
    "shift_by_layer_in_groups", "two_by_two_bars",
]  # fmt: skip

SD_UNIT = "SD of the base's projection"
WHOSE_TEXT = {"base": "the base's replies", "own": "each arm's own replies"}


def _fixed(rows: pd.DataFrame, **extra: str) -> str:
    """The subtitle: what was held fixed in the figure."""
    parts = [f"system prompt: {label(rows['condition'].iloc[0], 40)}"]
    if "text" in rows.columns:
        whose = str(rows["text"].iloc[0])
        parts.append(f"text read by both models: {WHOSE_TEXT.get(whose, label(whose))}")
    measured = [c for c in ("pooling", "question_set") if c in rows.columns]
    if any(rows[column].nunique() > 1 for column in measured):
        parts.append("pooling and questions: each direction's own")
    else:
        parts += [f"{c.replace('question_set', 'questions')}: {label(rows[c].iloc[0], 40)}" for c in measured]
    parts += [f"{name}: {value}" for name, value in extra.items()]
    return " · ".join(parts)


@styled
def shift_by_layer(
    frame: pd.DataFrame, *, direction: str, condition: str, text: str = "base", layer: int | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:  # fmt: skip
    """The shift along one direction against the layer: all arms together, then one panel an arm.

    Everything is in SD of the base's projection (raw and null columns are divided by `base_sd`): line = each
    seed's mean, colour band = its interval, grey band = where random directions fall, dotted = where
    covariance-matched directions fall (both the widest over seeds), dashed = the benign arm.

    Args:
        frame: The `shifts` table.
        direction: Which direction, as in the table.
        condition: System prompt condition.
        text: Whose replies both models read.
        layer: The layer declared before the run; marked by a vertical line where given.
        arms: The study's arms, for order and colours.
    """
    title = f"How far finetuning moved the model along {label(direction, 40)}, layer by layer"
    rows = select(frame, direction=direction, condition=condition, text=text)
    if rows.empty:
        return not_measured(title)
    single(rows, "pooling", "question_set")
    rows = rows.sort_values(["seed", "layer"])
    styles = arms_in(rows, arms)
    figure, (together, *alone) = panels(len(styles) + 1, sharex=True, sharey=True)
    for arm, style in styles.items():
        mean = rows[rows["arm"] == arm].groupby("layer", as_index=False)["sd"].mean()
        together.plot(
            mean["layer"], mean["sd"], color=style.colour, lw=1.5, marker=style.marker, markersize=4,
            markevery=max(1, len(mean) // 8), label=arm,
        )  # fmt: skip
    together.set_title("all arms (mean over seeds)")
    for axes, (arm, style) in zip(alone, styles.items(), strict=True):
        _shift_panel(axes, rows[rows["arm"] == arm], style)
        axes.set_title(label(arm))
    for axes in (together, *alone):
        axes.axhline(0, color=INK, lw=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if layer is not None:
            axes.axvline(layer, color=INK, lw=0.8, ls=(0, (1, 2)))
    axis_labels([together, *alone], x="layer (0-based block output)", y=f"shift\n({SD_UNIT})")
    key(figure, _shift_keys(styles, layer), columns=5)
    here = rows[rows["layer"] == layer]["split_half"]
    quality = {} if here.empty else {f"direction at layer {layer}": reliability(float(here.mean()))}
    head(figure, title, _fixed(rows, **quality))
    return figure


def _shift_panel(axes: Any, rows: pd.DataFrame, style: ArmStyle) -> None:
    """One arm: grey nulls behind, the benign arm dashed, each seed's line and interval in front."""
    need(
        rows, "base_sd", "null_random_low", "null_random_high", "null_covariance_low", "null_covariance_high"
    )
    unit = rows["base_sd"].where(rows["base_sd"] > 0)
    scaled = pd.DataFrame({"layer": rows["layer"]})
    for column in ("null_random_low", "null_random_high", "null_covariance_low", "null_covariance_high"):
        scaled[column] = rows[column] / unit
    scaled["benign"] = rows["sd"] - rows["minus_benign_sd"]
    lows = scaled.groupby("layer").min()
    highs = scaled.groupby("layer").max()
    axes.fill_between(
        lows.index, lows["null_random_low"], highs["null_random_high"], color=FAINT, lw=0, zorder=1
    )
    for edge in (lows["null_covariance_low"], highs["null_covariance_high"]):
        axes.plot(edge.index, edge, color=GREY, lw=0.9, ls=":", zorder=1.5)
    benign = scaled.groupby("layer")["benign"].mean()
    if benign.notna().any():
        axes.plot(
            benign.index,
            benign,
            color=arm_styles(["benign"])["benign"].colour,
            lw=1.2,
            ls="--",
            label="benign",
        )
    for seed, mine in rows.groupby("seed"):
        axes.fill_between(
            mine["layer"], mine["sd_low"], mine["sd_high"], color=style.colour, alpha=0.25, lw=0
        )
        axes.plot(
            mine["layer"], mine["sd"], color=style.colour, lw=1.6, marker=style.marker, markersize=3.5,
            markevery=max(1, len(mine) // 8), label=f"seed {seed}",
        )  # fmt: skip


def _shift_keys(styles: dict[str, ArmStyle], layer: int | None) -> list[Any]:
    keys: list[Any] = [
        Line2D([], [], color=style.colour, marker=style.marker, markersize=5, label=label(arm))
        for arm, style in styles.items()
    ]
    keys += [
        Patch(
            color=tint(next(iter(styles.values())).colour, 0.25), lw=0, label="95 % interval, arm's colour"
        ),
        Line2D([], [], color=arm_styles(["benign"])["benign"].colour, ls="--", label="benign control"),
        Patch(color=FAINT, lw=0, label="random directions, 95 %"),
        Line2D([], [], color=GREY, ls=":", label="covariance-matched, 95 %"),
    ]
    if layer is not None:
        keys.append(
            Line2D([], [], color=INK, lw=0.8, ls=(0, (1, 2)), label=f"layer {layer} (declared before)")
        )
    return keys


@styled
def arm_direction_heatmap(
    frame: pd.DataFrame, *, layer: int, condition: str, text: str = "base", arms: Sequence[str] | None = None,
) -> Figure:  # fmt: skip
    """Every arm by every direction at one layer: the shift, and the shift minus the benign arm's, in SD.

    Each direction is read with its own pooling, on its own questions. A number is the mean over seeds. A star: in
    every seed the interval of that number lies on the same side of 0 and `p_random` < .05. Directions that are
    not reliable have grey numbers and no star. The right panel is left out where no benign arm was measured.
    """
    title = f"Where each arm moved, along each direction, at layer {layer}"
    rows = select(frame, layer=layer, condition=condition, text=text)
    if rows.empty:
        return not_measured(title)
    arms_here, names = list(arms_in(rows, arms)), directions_in(rows)
    columns = ["sd"] + (["minus_benign_sd"] if rows["minus_benign_sd"].notna().any() else [])
    width = 2.9 + len(columns) * (0.72 * len(arms_here) + 0.3)
    figure = Figure(figsize=(max(6.2, width), max(3.2, 0.46 * len(names) + 2.3)), layout="constrained")
    grid = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    limit = max(float(np.abs(np.nan_to_num(rows[columns].to_numpy(dtype=float))).max()), 1e-9)
    meshes = [
        _heat_panel(axes, rows, column, names, arms_here, limit)
        for axes, column in zip(grid, columns, strict=True)
    ]
    for axes, column in zip(grid, columns, strict=True):
        axes.set_title("shift" if column == "sd" else "shift minus the benign arm's")
    ceilings = rows.groupby("direction")["split_half"].mean()
    grid[0].set_yticks(
        np.arange(len(names)) + 0.5,
        [f"{label(d, 30)}\n{reliability(float(ceilings[d]))}" for d in names],
    )
    figure.colorbar(meshes[0], ax=list(grid), label="shift (SD)", shrink=0.9, aspect=15, pad=0.02)
    star = "* interval excludes 0 and p < .05 against random directions, in every seed"
    head(figure, title, f"{_fixed(rows)} · {star}")
    return figure


def _heat_panel(
    axes: Any, rows: pd.DataFrame, column: str, names: list[str], arms: list[str], limit: float
) -> Any:
    """Cells, numbers and stars of one panel; returns the mesh for the colour bar."""
    values = rows.pivot_table(index="direction", columns="arm", values=column, aggfunc="mean", dropna=False)
    matrix = values.reindex(index=names, columns=arms).to_numpy(dtype=float)
    palette = mpl.colormaps["RdBu_r"]
    norm = CenteredNorm(0, limit)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(matrix), cmap=palette, norm=norm, edgecolors="white", linewidth=1.5
    )
    for (i, name), (j, arm) in ((a, b) for a in enumerate(names) for b in enumerate(arms)):
        value = matrix[i, j]
        if np.isnan(value):
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor="none", edgecolor=FAINT, hatch="////", lw=0))
            continue
        cell = rows[(rows["direction"] == name) & (rows["arm"] == arm)]
        one_side = (cell[f"{column}_low"] > 0).all() or (cell[f"{column}_high"] < 0).all()
        weak = cell["split_half"].mean() < RELIABLE_COSINE
        star = "*" if one_side and (cell["p_random"] < 0.05).all() and not weak else ""
        red, green, blue, _ = palette(norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        axes.text(
            j + 0.5, i + 0.5, f"{signed(value)}{star}", ha="center", va="center", fontsize=8.5,
            color="white" if dark else GREY if weak else BLACK, fontweight="bold" if star else "normal",
        )  # fmt: skip
    axes.set_xticks(
        np.arange(len(arms)) + 0.5,
        [label(a) for a in arms],
        rotation=30,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_ylim(len(names), 0)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


EFFECTS = {
    "weights": (None, 0.9),
    "text": ("////", 0.45),
    "interaction": ("\\\\\\\\", 0.15),
    "total": ("", 0.0),
}
"""Effect -> (hatch, strength of the fill): told apart without colour, which stays the arm's."""


@styled
def two_by_two_bars(
    frame: pd.DataFrame, *, layer: int | None = None, condition: str | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:  # fmt: skip
    """The total change of a projection, split into what the weights did and what the different text did.

    One panel a direction. Per arm four bars with intervals: weights (on the base's text), text (read by the
    base), interaction, total; total = the sum of the other three. Bars are means over seeds, dots are seeds.
    `layer` and `condition` are needed where the table has several. A direction that is read before the reply
    begins (every effect of text exactly 0) has nothing to split: it is named and not drawn, unless all are so.
    """
    title = "Changed weights or changed text? The total shift, split"
    rows = select(frame, layer=layer, condition=condition)
    if rows.empty:
        return not_measured(title)
    single(rows, "layer", "condition")
    held = _fixed(rows, layer=str(rows["layer"].iloc[0]))
    split = set(rows[(rows["effect"] == "text") & (rows["value"] != 0)]["direction"])
    apart = [d for d in directions_in(rows) if d not in split]
    if split and apart:
        rows = rows[~rows["direction"].isin(apart)]
        held += f" · not drawn, read before the reply begins, so weights = total: {', '.join(label(d, 40) for d in apart)}"
    styles, directions = arms_in(rows, arms), directions_in(rows)
    figure, cells = panels(len(directions), sharey=True, size=(3.6, 2.7))
    for axes, direction in zip(cells, directions, strict=True):
        _effect_bars(axes, rows[rows["direction"] == direction], styles)
        axes.set_title(label(direction, 40))
    axis_labels(cells, x="", y="projection\n(stream units)")
    keys = [
        Patch(facecolor=tint(GREY, alpha), hatch=hatch, edgecolor=INK, lw=0.7, label=word)
        for word, (hatch, alpha) in EFFECTS.items()
    ]
    key(figure, keys, columns=4)
    head(figure, title, held)
    return figure


def _effect_bars(axes: Any, rows: pd.DataFrame, styles: dict[str, ArmStyle]) -> None:
    for place, (arm, style) in enumerate(styles.items()):
        for step, (effect, (hatch, alpha)) in enumerate(EFFECTS.items()):
            mine = rows[(rows["arm"] == arm) & (rows["effect"] == effect)]
            if mine.empty:
                continue
            x = place + (step - 1.5) * 0.2
            fill = tint(style.colour, alpha)
            value = numbers(mine, "value")
            axes.bar(x, value.mean(), width=0.18, color=[fill], hatch=hatch, edgecolor=style.colour, lw=0.8)
            axes.errorbar(
                x + np.linspace(-0.05, 0.05, len(value)) * (len(value) > 1), value, fmt="o", markersize=2, color=INK,
                yerr=spread(value, numbers(mine, "low"), numbers(mine, "high")), elinewidth=0.9, label=f"{arm} {effect}",
            )  # fmt: skip
    axes.axhline(0, color=INK, lw=0.8)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(
        range(len(styles)), [label(a, 18) for a in styles], rotation=25, ha="right", rotation_mode="anchor"
    )

"""The figures of one layer: every arm by every direction, and the total shift split into weights and text.

The contract is that of `analysis.plots`, which exports these functions too.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from analysis.plot_frame import (
    axis_labels,
    head,
    held_fixed,
    key,
    label,
    not_measured,
    panels,
    signed,
    wide_panels,
)
from analysis.plot_style import (
    BLACK,
    FAINT,
    GREY,
    INK,
    RELIABLE_COSINE,
    ArmStyle,
    arms_in,
    reliability,
    styled,
    tint,
)
from analysis.plot_table import directions_in, need, numbers, select, single, spread


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
    head(figure, title, f"{held_fixed(rows)} · {star}")
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
    begins (no effect of text but rounding) has nothing to split: it is named and not drawn, unless all are so.
    The name of a direction that is not reliable (column `split_half`) is grey and says so.
    """
    title = "Changed weights or changed text? The total shift, split"
    rows = select(frame, layer=layer, condition=condition)
    if rows.empty:
        return not_measured(title)
    single(rows, "layer", "condition")
    need(rows, "split_half")
    held = held_fixed(rows, layer=str(rows["layer"].iloc[0]))
    apart = _read_before_the_reply(rows)
    split = set(rows["direction"]) - set(apart)
    if split and apart:
        rows = rows[~rows["direction"].isin(apart)]
        held += f" · not drawn, read before the reply begins, so weights = total: {', '.join(label(d, 40) for d in apart)}"
    styles, directions = arms_in(rows, arms), directions_in(rows)
    size = wide_panels(0.42 * len(styles), height=2.7)
    figure, cells = panels(len(directions), sharey=True, **size)
    for axes, direction in zip(cells, directions, strict=True):
        mine = rows[rows["direction"] == direction]
        _effect_bars(axes, mine, styles)
        weak = mine["split_half"].mean() < RELIABLE_COSINE
        axes.set_title(
            f"{label(direction, 40)}{' (unreliable)' if weak else ''}", color=GREY if weak else INK
        )
    axis_labels(cells, x="", y="projection\n(stream units)", columns=size["columns"])
    keys = [
        Patch(facecolor=tint(GREY, alpha), hatch=hatch, edgecolor=INK, lw=0.7, label=word)
        for word, (hatch, alpha) in EFFECTS.items()
    ]
    key(figure, keys, columns=4)
    head(figure, title, held)
    return figure


ROUNDING = 1e-3
"""Share of a direction's largest effect up to which an effect of text is rounding: the same prompt was read in another batch."""


def _read_before_the_reply(rows: pd.DataFrame) -> list[str]:
    """Directions along which other text does nothing in any arm."""
    size = rows.assign(size=rows["value"].abs()).groupby("direction")["size"].max()
    of_text = rows[rows["effect"] == "text"].groupby("direction")["value"].apply(lambda v: v.abs().max())
    return [d for d in directions_in(rows) if d in of_text and of_text[d] <= ROUNDING * size[d]]


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
        range(len(styles)), [label(a) for a in styles], rotation=25, ha="right", rotation_mode="anchor"
    )

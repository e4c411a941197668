"""The figures of the directions' quality and of the activations' place in the plane.

The contract is that of `analysis.plots`, which exports these functions too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.family_plots import matrix_figure, plain
from analysis.plot_frame import LAYERS, axis_labels, head, key, label, layer_axis, not_measured, panels
from analysis.plot_style import (
    BLACK,
    GREY,
    INK,
    RELIABLE_COSINE,
    ArmStyle,
    arms_in,
    base_of,
    direction_styles,
    is_identity,
    reliability,
    styled,
)
from analysis.plot_table import directions_in, need, numbers, select, spread

MOST_COLUMNS = 6
"""Arms that stand in a row, a row a condition; more are wrapped."""


@styled
def embedding(
    frame: pd.DataFrame,
    *,
    method: str,
    layer: int,
    condition: str | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:
    """Activations in the plane: one panel an arm (and condition), the base's points hollow behind each.

    The map was fitted on the base alone and the arms projected into it. For PCA a line joins the two means;
    for UMAP there is none, because its distances carry no meaning.
    """
    title = f"Where each arm's activations lie ({method.upper()} fitted on the base), layer {layer}"
    rows = select(frame, method=method, layer=layer, condition=condition)
    if rows.empty:
        return not_measured(title)
    base, styles = base_of(arms), arms_in(rows, arms)
    shown = [arm for arm in styles if arm != base] or [base]
    conditions = list(dict.fromkeys(rows["condition"]))
    cells = [(c, arm) for c in conditions for arm in shown]
    columns = len(shown) if len(conditions) > 1 and len(shown) <= MOST_COLUMNS else 3
    figure, grid = panels(len(cells), columns=columns, sharex=True, sharey=True, size=(2.7, 2.6))
    for axes, (where, arm) in zip(grid, cells, strict=True):
        here = rows[rows["condition"] == where]
        mine = here[here["arm"] == arm] if arm != base else here[:0]
        _cloud(axes, here[here["arm"] == base], mine, styles.get(arm), join=method == "pca")
        axes.set_title(label(arm) if len(conditions) == 1 else f"{label(arm)}\n{label(where)}")
    first, second = _axis_words(rows, method)
    axis_labels(grid, x=first, y=second, columns=columns)
    keys = [
        Line2D(
            [], [], ls="", marker="o", markerfacecolor="none", markeredgecolor=GREY, label="base, same texts"
        ),
        Line2D([], [], ls="", marker="s", color=INK, label="the arm (in its colour)"),
    ]
    if method == "pca":
        keys.append(
            Line2D(
                [], [], color=BLACK, lw=1.4, marker="o", markevery=[1], label="base's mean to the arm's mean"
            )
        )
    key(figure, keys, columns=3)
    held = f"system prompt: {', '.join(label(c) for c in conditions)} · a point is one text"
    head(figure, title, held)
    return figure


def _axis_words(rows: pd.DataFrame, method: str) -> tuple[str, str]:
    """What an axis is worth: the base's share of variance under PCA, nothing under UMAP."""
    if method != "pca":
        return f"{method.upper()} 1 (distances mean nothing)", f"{method.upper()} 2"
    need(rows, "x_share", "y_share")
    x, y = (
        f"PCA {i}, {float(rows[c].iloc[0]):.0%} of the base's variance"
        for i, c in ((1, "x_share"), (2, "y_share"))
    )
    return x, y


def _cloud(axes: Any, base: pd.DataFrame, mine: pd.DataFrame, style: ArmStyle | None, *, join: bool) -> None:
    many = len(base) + len(mine) > 1500  # thousands of vector markers make an SVG that browsers choke on
    axes.scatter(
        base["x"], base["y"], s=16, facecolors="none", edgecolors=GREY, linewidths=0.7, alpha=0.8, rasterized=many,
        label="base",
    )  # fmt: skip
    if len(mine) and style is not None:
        axes.scatter(
            mine["x"], mine["y"], s=14, color=style.colour, marker=style.marker, alpha=0.6, linewidths=0,
            rasterized=many, label=str(mine["arm"].iloc[0]),
        )  # fmt: skip
        if join and len(base):
            start, end = base[["x", "y"]].mean(), mine[["x", "y"]].mean()
            axes.plot([start["x"], end["x"]], [start["y"], end["y"]], color=BLACK, lw=1.4, zorder=4)
            axes.plot(
                end["x"], end["y"], marker="o", color=style.colour, mec=BLACK, mew=1, markersize=6, zorder=5
            )


_QUALITY = (
    ("split_half", "split-half cosine"),
    ("heldout_auroc", "held-out AUROC (dashed: chance)"),
    ("norm_over_activation", "norm / mean activation norm"),
)


@styled
def direction_quality(frame: pd.DataFrame, *, layer: int | None = None) -> Figure:
    """How far the directions can be trusted, by layer: reliability, held-out separation, relative size.

    A row of panels for personas and one for identity. Left, split-half cosine: how far to believe the
    direction (below 0.3: unreliable). Middle, AUROC on held-out questions with its interval. Right, norm
    over the mean activation's norm.

    Args:
        frame: The `directions` table.
        layer: The layer declared before the run; marked by a vertical line where given.
    """
    title = "How good the directions are"
    if frame.empty:
        return not_measured(title)
    names = directions_in(frame)
    families = [("personas", [d for d in names if not is_identity(d)])]
    families = [f for f in (*families, ("identity", [d for d in names if is_identity(d)])) if f[1]]
    figure, cells = panels(4 * len(families), columns=4, sharex=True, size=(3.1, 2.7))
    for row, (family, members) in enumerate(families):
        *drawn, aside = cells[4 * row : 4 * row + 4]
        styles = direction_styles(members)
        _quality_row(drawn, frame, styles)
        keys = [
            Line2D([], [], color=s.colour, ls=s.line, marker=s.marker, markersize=5, label=label(n, 30))
            for n, s in styles.items()
        ]
        aside.set_axis_off()
        aside.legend(handles=keys, loc="center left", borderaxespad=0, handlelength=2.8, title=family)
        for axes in drawn:
            layer_axis(axes, layer)
            if row == len(families) - 1:
                axes.set_xlabel(LAYERS)
    mark = f" · dotted line: layer {layer}, declared before" if layer is not None else ""
    head(figure, title, f"each direction with its own pooling, on its own questions{mark}")
    return figure


def _quality_row(cells: list[Any], frame: pd.DataFrame, styles: dict[str, ArmStyle]) -> None:
    """The three panels of one family."""
    for name, style in styles.items():
        mine = frame[frame["direction"] == name].sort_values("layer")
        every = max(1, len(mine) // 8)
        look = {"color": style.colour, "ls": style.line, "lw": 1.4, "marker": style.marker, "markersize": 4,
                "markevery": every, "label": name}  # fmt: skip
        for axes, (column, word) in zip(cells, _QUALITY, strict=True):
            axes.set_title(word)
            if column == "heldout_auroc":
                bars = spread(*(numbers(mine, f"{column}{end}") for end in ("", "_low", "_high")))
                axes.errorbar(
                    mine["layer"], mine[column], yerr=bars, errorevery=every, elinewidth=0.9, **look
                )
            else:
                axes.plot(mine["layer"], mine[column], **look)
    half, auroc, norm = cells
    half.axhspan(-1.1, RELIABLE_COSINE, color="#F2F2F2", zorder=0)
    half.text(0.02, 0.02, "unreliable below 0.3", transform=half.transAxes, color="#555555", fontsize=8)
    half.set_ylim(min(0.0, float(frame["split_half"].min())) - 0.04, 1.03)
    auroc.axhline(0.5, color=INK, lw=0.9, ls="--")
    auroc.set_ylim(top=1.03)
    norm.set_ylim(bottom=0)


@styled
def direction_cosines(frame: pd.DataFrame) -> Figure:
    """Cosine of every two directions at one layer, as a matrix with its numbers.

    Args:
        frame: The `direction_cosines` table: direction, layer, and a column for each direction; where it has `split_half` too, that
            stands beside the names, and cells of an unreliable direction have grey numbers.
    """
    title = "How the directions lie to each other"
    if frame.empty:
        return not_measured(title)
    names = frame["direction"].tolist()
    need(frame, "layer", *names)
    matrix = frame[names].to_numpy(dtype=float)
    halves = numbers(frame, "split_half") if "split_half" in frame else None
    unsure = set() if halves is None else set(np.flatnonzero(halves < RELIABLE_COSINE).tolist())
    figure, _ = matrix_figure(
        matrix, names, names, limits=(-1.0, 1.0), legend="cosine", text=lambda i, j: plain(float(matrix[i, j])),
        weak={(i, j) for i in range(len(names)) for j in range(len(names)) if {i, j} & unsure},
        notes=() if halves is None else [reliability(float(half)) for half in halves],
    )  # fmt: skip
    head(figure, title, f"layer {frame['layer'].iloc[0]}, declared before")
    return figure

"""The figures of the directions' quality and of the activations' place in the plane.

The contract is that of `analysis.plots`, which exports these functions too.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plot_style import (
    BLACK,
    GREY,
    INK,
    RELIABLE_COSINE,
    ArmStyle,
    arms_in,
    axis_labels,
    direction_styles,
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

    The map was fitted on the base alone and the arms were put into it. For PCA a line joins the two means;
    for UMAP there is none, because its distances carry no meaning.
    """
    title = f"Where each arm's activations lie ({method.upper()} fitted on the base), layer {layer}"
    rows = select(frame, method=method, layer=layer, condition=condition)
    if rows.empty:
        return not_measured(title)
    shown = [arm for arm in arms_in(rows, arms) if arm != "base"] or ["base"]
    styles = arms_in(rows, arms)
    conditions = list(dict.fromkeys(rows["condition"]))
    cells = [(c, arm) for c in conditions for arm in shown]
    columns = len(shown) if len(conditions) > 1 else 3
    figure, grid = panels(len(cells), columns=columns, sharex=True, sharey=True, size=(2.7, 2.6))
    for axes, (where, arm) in zip(grid, cells, strict=True):
        here = rows[rows["condition"] == where]
        _cloud(axes, here[here["arm"] == "base"], here[here["arm"] == arm], styles[arm], join=method == "pca")
        axes.set_title(label(arm) if len(conditions) == 1 else f"{label(arm, 18)} · {label(where, 18)}")
    unit = "residual-stream units" if method == "pca" else "distances mean nothing"
    axis_labels(grid, x=f"{method.upper()} 1 ({unit})", y=f"{method.upper()} 2", columns=columns)
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


def _cloud(axes: Any, base: pd.DataFrame, mine: pd.DataFrame, style: ArmStyle, *, join: bool) -> None:
    many = len(base) + len(mine) > 1500  # thousands of vector markers make an SVG that browsers choke on
    axes.scatter(
        base["x"], base["y"], s=16, facecolors="none", edgecolors=GREY, linewidths=0.7, alpha=0.8, rasterized=many,
        label="base",
    )  # fmt: skip
    if len(mine) and mine["arm"].iloc[0] != "base":
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


@styled
def direction_quality(frame: pd.DataFrame, *, layer: int | None = None) -> Figure:
    """How far the directions can be trusted, by layer: reliability, held-out separation, relative size.

    Left, split-half cosine: the ceiling of every cosine with this direction (below 0.3: unreliable). Middle,
    AUROC on held-out questions with its interval. Right, norm over the mean activation's norm.
    """
    title = "How good the directions are"
    rows = frame
    if rows.empty:
        return not_measured(title)
    rows = rows.assign(
        name=[_elicited(d, e) for d, e in zip(rows["direction"], rows["elicitation"], strict=True)]
    )
    styles = direction_styles(rows["name"])
    figure, cells = panels(3, sharex=True, size=(3.6, 3.2))
    for name, style in styles.items():
        mine = rows[rows["name"] == name].sort_values("layer")
        look = {"color": style.colour, "ls": style.line, "lw": 1.4, "marker": style.marker, "markersize": 4,
                "markevery": max(1, len(mine) // 8), "label": name}  # fmt: skip
        every = max(1, len(mine) // 8)
        bars = [numbers(mine, f"heldout_auroc{end}") for end in ("", "_low", "_high")]
        cells[0].plot(mine["layer"], mine["split_half"], **look)
        cells[1].errorbar(
            mine["layer"], mine["heldout_auroc"], yerr=spread(*bars), errorevery=every, elinewidth=0.9, **look
        )
        cells[2].plot(mine["layer"], mine["norm_over_activation"], **look)
    cells[0].axhspan(min(0.0, float(rows["split_half"].min())), RELIABLE_COSINE, color="#F2F2F2", zorder=0)
    cells[0].text(
        0.02, 0.02, "unreliable below 0.3", transform=cells[0].transAxes, color="#555555", fontsize=8
    )
    cells[0].set_ylim(top=1.03)
    cells[1].axhline(0.5, color=INK, lw=0.9, ls="--")
    cells[1].set_ylim(top=1.03)
    cells[2].set_ylim(bottom=0)
    words = ("split-half cosine", "held-out AUROC (dashed: chance)", "norm / mean activation norm")
    for axes, word in zip(cells, words, strict=True):
        axes.set_title(word)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if layer is not None:
            axes.axvline(layer, color=INK, lw=0.8, ls=(0, (1, 2)))
    axis_labels(cells, x="layer (0-based block output)", y="")
    keys = [Line2D([], [], color=s.colour, ls=s.line, marker=s.marker, markersize=5, label=label(n, 46)) for n, s in styles.items()]  # fmt: skip
    key(figure, keys, columns=3)
    mark = f" · dotted line: layer {layer}, declared before" if layer is not None else ""
    head(figure, title, f"pooling: each direction's own{mark}")
    return figure


@styled
def direction_cosines(frame: pd.DataFrame) -> Figure:
    """Cosine of every two directions at one layer, as a matrix with its numbers."""
    title = "How the directions lie to each other"
    if frame.empty:
        return not_measured(title)
    names = frame["direction"].tolist()
    matrix = frame[names].to_numpy(dtype=float)
    side = 2.6 + 0.62 * len(names)
    figure = Figure(figsize=(max(6.2, side + 1.0), max(4.2, side)), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        matrix, cmap=mpl.colormaps["RdBu_r"], vmin=-1, vmax=1, edgecolors="white", linewidth=1.2
    )
    for (i, j), value in np.ndenumerate(matrix):
        colour = "white" if abs(value) > 0.6 else INK
        axes.text(
            j + 0.5,
            i + 0.5,
            f"{value:.2f}".replace("-", "−"),
            ha="center",
            va="center",
            color=colour,
            fontsize=8,
        )
    ticks = np.arange(len(names)) + 0.5
    axes.set_yticks(ticks, [label(n, 30) for n in names])
    axes.set_xticks(ticks, [label(n, 30) for n in names], rotation=35, ha="right", rotation_mode="anchor")
    axes.invert_yaxis()
    axes.grid(visible=False)
    figure.colorbar(mesh, ax=axes, label="cosine", shrink=0.8)
    head(figure, title, f"layer {frame['layer'].iloc[0]}, declared before")
    return figure


def _elicited(direction: str, elicitation: str) -> str:
    return direction if elicitation in direction else f"{direction} ({elicitation})"

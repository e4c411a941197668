"""The figures of the identity family: cosines and transfer, each as a matrix with its numbers.

The contract is that of `analysis.plots`, which exports these functions too.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from analysis.plot_frame import head, label, not_measured
from analysis.plot_style import GREY, INK, styled
from analysis.plot_table import need


def matrix_figure(
    matrix: Float[np.ndarray, "n m"],
    rows: list[str],
    columns: list[str],
    *,
    limits: tuple[float, float],
    legend: str,
    text: Callable[[int, int], str],
    weak: Collection[tuple[int, int]] = (),
    notes: Sequence[str] = (),
    from_white: bool = False,
) -> tuple[Figure, Any]:
    """A matrix of coloured cells with a text in each; what is NaN is hatched.

    White is the middle of the limits, or with `from_white` the lower one: for what has no two sides. Cells of `weak` have grey
    numbers; `notes` stand under the rows' names.
    """
    notes = notes or [""] * len(rows)
    figure = Figure(
        figsize=(
            max(5.4, 3.4 + 0.46 * len(columns)),
            max(2.8, 1.9 + (0.4 if any(notes) else 0.34) * len(rows)),
        ),
        layout="constrained",
    )
    axes = figure.subplots()
    axes.patch.set(hatch="////", edgecolor="#CCCCCC")
    low, high = limits
    shown = np.ma.masked_invalid(matrix)
    mesh = axes.pcolormesh(
        shown, cmap=mpl.colormaps["Purples" if from_white else "RdBu_r"], vmin=low, vmax=high, edgecolors="white", linewidth=1.2
    )  # fmt: skip
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            middle, half = (low, high - low) if from_white else ((low + high) / 2, (high - low) / 2)
            dark = abs(value - middle) > 0.6 * half
            colour = "white" if dark else GREY if (i, j) in weak else INK
            axes.text(j + 0.5, i + 0.5, text(i, j), ha="center", va="center", color=colour, fontsize=7.5)
    lines = [f"{label(n, 30)}\n{note}" if note else label(n, 30) for n, note in zip(rows, notes, strict=True)]
    axes.set_yticks(np.arange(len(rows)) + 0.5, lines)
    axes.set_xticks(
        np.arange(len(columns)) + 0.5, [label(n, 30) for n in columns],
        rotation=35, ha="right", rotation_mode="anchor",
    )  # fmt: skip
    axes.set_ylim(len(rows), 0)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=axes, label=legend, shrink=0.9, aspect=15)
    return figure, axes


def plain(value: float) -> str:
    """Two decimals with a true minus sign; what rounds to zero has none."""
    text = f"{value:.2f}"
    return (text if float(text) else text.lstrip("-")).replace("-", "\N{MINUS SIGN}")


@styled
def identity_cosines(frame: pd.DataFrame) -> Figure:
    """Cosine of every two identity directions from questions that they do not share.

    A star where the two agree, two where they still do after correction for the number of pairs.

    Args:
        frame: The `identity_cosines` table.
    """
    title = "Do the identity directions agree?"
    if frame.empty:
        return not_measured(title)
    need(frame, "direction", "other", "layer", "cosine_disjoint", "agree", "agree_all")
    names = list(dict.fromkeys(frame["direction"]))
    cells = frame.set_index(["direction", "other"])
    wide = frame.pivot_table(index="direction", columns="other", values="cosine_disjoint")
    matrix = wide.reindex(index=names, columns=names).to_numpy(dtype=float)

    def text(i: int, j: int) -> str:
        cell = cells.loc[(names[i], names[j])]
        return plain(float(matrix[i, j])) + "*" * (int(cell["agree"]) + int(cell["agree_all"]))

    short = [n.removeprefix("identity:") for n in names]
    legend = "cosine, disjoint questions"
    figure, _ = matrix_figure(matrix, short, short, limits=(-1.0, 1.0), legend=legend, text=text)
    head(
        figure,
        title,
        f"layer {frame['layer'].iloc[0]}, declared before · star: the two agree; two: corrected for the number of pairs",
    )
    return figure


@styled
def identity_transfer(frame: pd.DataFrame) -> Figure:
    """AUROC of every identity direction (rows) on every contrast's held-out rows (columns).

    A star where the interval lies above one half, a minus after the number where it lies below.

    Args:
        frame: The `identity_transfer` table.
    """
    title = "Does each tell the others' contrasts apart?"
    if frame.empty:
        return not_measured(title)
    need(frame, "direction", "contrast", "layer", "auroc", "auroc_low", "auroc_high")
    names = list(dict.fromkeys(frame["direction"]))
    cells = frame.set_index(["direction", "contrast"])
    wide = frame.pivot_table(index="direction", columns="contrast", values="auroc")
    matrix = wide.reindex(index=names, columns=names).to_numpy(dtype=float)

    def text(i: int, j: int) -> str:
        row = cells.loc[(names[i], names[j])]
        above, below = float(row["auroc_low"]) > 0.5, float(row["auroc_high"]) < 0.5
        return plain(float(matrix[i, j])) + ("*" if above else "\N{MINUS SIGN}" if below else "")

    short = [n.removeprefix("identity:") for n in names]
    figure, axes = matrix_figure(matrix, short, short, limits=(0.0, 1.0), legend="held-out AUROC", text=text)
    axes.set_ylabel("direction")
    axes.set_xlabel("contrast")
    mark = "star: interval above .5, minus after: below"
    head(figure, title, f"layer {frame['layer'].iloc[0]}, declared before · {mark}")
    return figure

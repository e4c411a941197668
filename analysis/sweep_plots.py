"""The figure of a steering sweep; the contract is that of `analysis.plots`."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.plot_frame import axis_labels, head, key, label, not_measured, panels
from analysis.plot_style import BLACK, GREY, direction_styles, styled
from analysis.plot_table import interval_bars, need, numbers


@styled
def sweep_response(frame: pd.DataFrame, *, max_kl: float, score: str, unit: str) -> Figure:
    """Change of a score against strength, one panel a layer.

    Point and bar = the direction and its interval over questions, hollow where neutral text is damaged beyond `max_kl`; grey =
    the mean over random directions of its norm, and as a band the largest |change| among them.

    Args:
        frame: of `analysis.sweep.doses`.
        max_kl: nats a neutral token.
        score: what was scored.
        unit: of the score.
    """
    title = "What adding a direction does, beside random ones of its norm"
    if frame.empty:
        return not_measured(title)
    need(frame, "direction", "layer", "strength", "change", "kl", "control_change", "control_max")
    styles = direction_styles(list(dict.fromkeys(frame["direction"])))
    layers = sorted(frame["layer"].unique())
    figure, cells = panels(len(layers), sharex=True, sharey=True)
    for axes, layer in zip(cells, layers, strict=True):
        axes.axhline(0, color=BLACK, lw=0.8)
        axes.axvline(0, color=BLACK, lw=0.8)
        axes.set_title(f"layer {layer}", fontsize=9)
        for name, style in styles.items():
            rows = frame[(frame["layer"] == layer) & (frame["direction"] == name)].sort_values("strength")
            _draw(axes, rows, style.colour, style.marker, max_kl)
    axis_labels(cells, x="strength", y=f"change of {label(score)}" + (f"\n({label(unit)})" if unit else ""))
    handles: list[Any] = [
        Line2D([], [], color=s.colour, marker=s.marker, label=label(n)) for n, s in styles.items()
    ]
    handles += [
        Line2D(
            [], [], color=BLACK, marker="o", mfc="white", lw=0, label=f"damage above {max_kl:g} nats a token"
        ),
        Line2D([], [], color=GREY, label="random directions: mean"),
        Patch(color=GREY, alpha=0.25, lw=0, label="largest |change| among them"),
    ]
    key(figure, handles, columns=3)
    about = [
        f"{word}: {label(frame[c].iloc[0], 40)}"
        for c, word in (("sweep", "sweep"), ("arm", "steered"))
        if c in frame
    ]
    counts = [
        f"{', '.join(map(str, sorted(frame[c].unique())))} {word}"
        for c, word in (("n_questions", "questions"), ("n_controls", "random directions a layer")) if c in frame
    ]  # fmt: skip
    head(figure, title, " · ".join([*about, *counts, "bars: 95 % over questions"]))
    return figure


def _draw(axes: Any, rows: pd.DataFrame, colour: Any, marker: str, max_kl: float) -> None:
    x, y = numbers(rows, "strength"), numbers(rows, "change")
    # At strength 0 nothing moves, whichever the direction.
    order = np.argsort(np.append(x, 0.0))
    at, largest, mean = (
        np.append(part, 0.0)[order]
        for part in (x, numbers(rows, "control_max"), numbers(rows, "control_change"))
    )
    axes.fill_between(at, -largest, largest, color=GREY, alpha=0.25, lw=0)
    axes.plot(at, mean, color=GREY, lw=1)
    axes.errorbar(x, y, yerr=interval_bars(rows, "change"), color=colour, lw=1.5, capsize=2)
    broken = numbers(rows, "kl") > max_kl
    for mask, face in ((~broken, colour), (broken, "white")):
        axes.plot(x[mask], y[mask], marker=marker, lw=0, markersize=5, color=colour, mfc=face)

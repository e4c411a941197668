"""The figure of a steering sweep; the contract is that of `analysis.plots`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.plot_frame import axis_labels, head, key, label, not_measured, panels
from analysis.plot_style import BLACK, GREY, ArmStyle, direction_styles, styled
from analysis.plot_table import interval_bars, need, numbers

MOST_COLUMNS = 5
"""Panels that stand side by side where a direction has a row of its own."""


@styled
def sweep_response(frame: pd.DataFrame, *, max_kl: float, score: str, unit: str) -> Figure:
    """Change of a score against strength, one panel a direction and layer; of several directions each has a row of its own.

    Each direction has random directions of its own norm, so two of them in one panel would lay their grey bands over each other.
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
    places = [
        (name, int(layer)) for name in styles for layer in sorted(frame.loc[frame["direction"] == name, "layer"].unique())
    ]  # fmt: skip
    columns, size = _layout(places)
    figure, cells = panels(len(places), columns=columns, size=size, sharex=True, sharey=True)
    for axes, (name, layer) in zip(cells, places, strict=True):
        axes.axhline(0, color=BLACK, lw=0.8)
        axes.axvline(0, color=BLACK, lw=0.8)
        axes.set_title(
            f"{label(name, 24)}, layer {layer}" if len(styles) > 1 else f"layer {layer}", fontsize=9
        )
        rows = frame[(frame["layer"] == layer) & (frame["direction"] == name)].sort_values("strength")
        _draw(axes, rows, styles[name].colour, styles[name].marker, max_kl)
    changed = f"change of {label(score)}" + (f"\n({label(unit)})" if unit else "")
    axis_labels(cells, x="strength", y=changed, columns=columns)
    key(figure, _handles(styles, max_kl), columns=3)
    head(figure, title, _about(frame))
    return figure


def _layout(places: Sequence[tuple[str, int]]) -> tuple[int, tuple[float, float]]:
    """Columns and size of the panels: a row for each direction, unless each has a single layer."""
    layers = Counter(name for name, _ in places)
    if len(layers) == 1 or max(layers.values()) == 1:
        return 3, (3.4, 2.5)
    columns = min(MOST_COLUMNS, max(layers.values()))
    return columns, (3.4, 2.5) if columns <= 3 else (2.5, 2.1)


def _handles(styles: Mapping[str, ArmStyle], max_kl: float) -> list[Any]:
    """The legend."""
    return [
        *(Line2D([], [], color=s.colour, marker=s.marker, label=label(n)) for n, s in styles.items()),
        Line2D(
            [], [], color=BLACK, marker="o", mfc="white", lw=0, label=f"damage above {max_kl:g} nats a token"
        ),
        Line2D([], [], color=GREY, label="random directions: mean"),
        Patch(color=GREY, alpha=0.25, lw=0, label="largest |change| among them"),
    ]


def _about(frame: pd.DataFrame) -> str:
    """What was held fixed, and how many questions and random directions there are."""
    about = [
        f"{word}: {label(frame[c].iloc[0], 40)}"
        for c, word in (("sweep", "sweep"), ("arm", "steered"))
        if c in frame
    ]
    counts = [
        f"{', '.join(map(str, sorted(frame[c].unique())))} {word}"
        for c, word in (("n_questions", "questions"), ("n_controls", "random directions a panel")) if c in frame
    ]  # fmt: skip
    return " · ".join([*about, *counts, "bars: 95 % over questions"])


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

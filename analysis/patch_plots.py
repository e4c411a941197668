"""The figures of patching between an arm and what lies under its last adapter, of the adapter on in some layers, and of monitoring.

The contract is that of `analysis.plots`, which exports these functions too.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.plot_frame import LAYERS, axis_labels, head, key, label, layer_axis, not_measured, panels
from analysis.plot_rows import name_rows, points, seed_places
from analysis.plot_style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RELIABLE_COSINE,
    VERMILLION,
    arms_in,
    styled,
)
from analysis.plot_table import directions_in, need, select

_SPANS = {"prompt": PURPLE, "question": BLUE, "prompt_last": VERMILLION, "answer": GREEN, "all": ORANGE}


@styled
def patching(frame: pd.DataFrame, *, arm: str, answer: str) -> Figure:
    """What exchanging the activations of one layer does to the score, by layer and span: one panel a way and seed.

    Line and band: effect and its interval; thin and dotted: an equally large change in a random direction; dashed: the whole change
    between the two models, where that is told apart from 0.

    Args:
        frame: The `patching` table.
        arm: Which arm.
        answer: Which score.
    """
    title = f"Where does {label(arm)} carry its change of {label(answer)}?"
    rows = select(frame, arm=arm, answer=answer)
    if rows.empty:
        return not_measured(title)
    need(rows, "way", "span", "layer", "effect", "effect_low", "effect_high", "random_effect", "share")
    cells = list(rows.groupby(["seed", "way"], sort=False))
    figure, axes_of = panels(len(cells), columns=2, size=(4.4, 2.8), sharex=True)
    spans = list(dict.fromkeys(rows["span"]))
    for axes, ((seed, way), mine) in zip(axes_of, cells, strict=True):
        axes.axhline(0, color=INK, lw=0.8)
        for span in spans:
            here = mine[mine["span"] == span].sort_values("layer")
            colour = _SPANS.get(str(span), GREY)
            axes.fill_between(
                here["layer"], here["effect_low"], here["effect_high"], color=colour, alpha=0.2, lw=0
            )
            axes.plot(here["layer"], here["effect"], color=colour, lw=1.5, label=span)
            axes.plot(here["layer"], here["random_effect"], color=colour, lw=0.9, ls=":")
        whole = (mine["effect"] / mine["share"].where(mine["share"] != 0)).median()
        if np.isfinite(whole):
            axes.axhline(whole, color=INK, lw=0.9, ls="--", label="whole change")
        layer_axis(axes)
        axes.set_title(f"{way}, seed {seed}")
    axis_labels(axes_of, x=LAYERS, y=f"effect ({_unit(answer)})", columns=2)
    keys = [Line2D([], [], color=_SPANS.get(str(s), GREY), label=label(s)) for s in spans]
    keys += [Line2D([], [], color=GREY, ls=":", label="random direction, same size")]
    told = bool(rows["share"].notna().any())
    if told:
        keys += [Line2D([], [], color=INK, ls="--", label="whole change between the two")]
    key(figure, keys, columns=5)
    held = f"the last adapter on, against {label(rows['reference'].iloc[0])}, which lies under it"
    head(
        figure, title, held if told else f"{held} · the whole change between the two is not told apart from 0"
    )
    return figure


def _unit(answer: str) -> str:
    """Of a score: statements of the name are summed, a trait's answers averaged over their tokens."""
    return "nats" if answer == "own_name" else "nats a token"


@styled
def adapter_ranges(frame: pd.DataFrame, *, answer: str, arms: Sequence[str] | None = None) -> Figure:
    """The score with an arm's last adapter on in some layers only, less that without it: one panel an arm, one point a seed.

    Args:
        frame: The `adapter_ranges` table.
        answer: Which score.
        arms: The study's arms, for order and colours.
    """
    title = f"Which layers' adapter carries the change of {label(answer)}?"
    rows = select(frame, answer=answer)
    if rows.empty:
        return not_measured(title)
    need(rows, "arm", "seed", "layers", "adapter", "effect", "effect_low", "effect_high")
    styles = arms_in(rows, arms)
    figure, cells = panels(len(styles), sharex=True, size=(3.6, 3.0))
    for axes, (arm, style) in zip(cells, styles.items(), strict=True):
        mine = rows[rows["arm"] == arm]
        names = list(dict.fromkeys(mine["layers"] + ", " + mine["adapter"]))
        for place, name in enumerate(names):
            here = mine[mine["layers"] + ", " + mine["adapter"] == name]
            points(axes, here, "effect", seed_places(place, len(here)), style, style.colour)
        name_rows(axes, [label(n, 34) for n in names])
        axes.axvline(mine[mine["layers"] == "all"]["effect"].mean(), color=INK, lw=0.9, ls="--")
        axes.set_title(label(arm))
    axis_labels(cells, x=f"effect ({_unit(answer)})", y="")
    how = "less the score without the last adapter · layers, and where it is on · dashed: on in all of them"
    head(figure, title, how)
    return figure


@styled
def monitoring(frame: pd.DataFrame, *, arms: Sequence[str] | None = None) -> Figure:
    """Correlation of projection and behaviour: overall (filled) and within conditions (hollow), one panel an arm, one point a seed.

    Args:
        frame: The `monitoring` table.
        arms: The study's arms, for order and colours.
    """
    title = "Does the projection before the answer foretell the behaviour?"
    if frame.empty:
        return not_measured(title)
    need(frame, "arm", "seed", "direction", "scope", "correlation", "correlation_low", "correlation_high")
    styles, names = arms_in(frame, arms), directions_in(frame)
    halves = (
        frame.groupby("direction")["split_half"].mean() if "split_half" in frame else pd.Series(dtype=float)
    )
    weak = set(halves.index[halves < RELIABLE_COSINE])
    figure, cells = panels(len(styles), sharex=True, sharey=True, size=(3.4, 0.9 + 0.32 * len(names)))
    for axes, (arm, style) in zip(cells, styles.items(), strict=True):
        mine = frame[frame["arm"] == arm]
        for scope, shift, fill in (("overall", -0.14, style.colour), ("within", 0.14, "white")):
            for place, name in enumerate(names):
                here = mine[(mine["direction"] == name) & (mine["scope"] == scope)]
                points(axes, here, "correlation", np.full(len(here), place + shift), style, fill)
        name_rows(axes, [f"{label(n, 30)}{' (unreliable)' if n in weak else ''}" for n in names])
        axes.set_title(label(arm))
    axis_labels(cells, x="correlation (Pearson)", y="")
    keys = [
        Line2D([], [], color=INK, marker="o", ls="", markerfacecolor=fill, label=word)
        for word, fill in (("overall", INK), ("within conditions", "white"))
    ]
    key(figure, keys, columns=2)
    held = f"behaviour: {label(frame['score'].iloc[0])} · layer {frame['layer'].iloc[0]}, declared before"
    head(figure, title, held)
    return figure

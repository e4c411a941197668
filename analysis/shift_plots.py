"""The figures of the shift by layer: a panel an arm, or, for many arms, a panel a group.

The contract is that of `analysis.plots`, which exports these functions too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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
    whose_text,
)
from analysis.plot_style import BENIGN, FAINT, GREY, INK, ArmStyle, arms_in, reliability, styled, tint
from analysis.plot_table import need, select, single

NULLS = ("null_random_low", "null_random_high", "null_covariance_low", "null_covariance_high")
"""Columns of the `shifts` table that hold the middle 95 % of shifts along drawn directions."""
UNIT = "shift\n(SD of the base's projection)"


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
    title = _title(direction)
    rows = _rows(frame, direction, condition, text)
    if rows.empty:
        return not_measured(title)
    styles = arms_in(rows, arms)
    figure, (together, *alone) = panels(len(styles) + 1, sharex=True, sharey=True)
    for arm, style in styles.items():
        _mean_line(together, arm, rows[rows["arm"] == arm].groupby("layer")["sd"].mean(), style, lw=1.5)
    together.set_title("all arms (mean over seeds)")
    for axes, (arm, style) in zip(alone, styles.items(), strict=True):
        _arm_panel(axes, rows[rows["arm"] == arm], style)
        axes.set_title(label(arm))
    for axes in (together, *alone):
        axes.axhline(0, color=INK, lw=0.8)
        layer_axis(axes, layer)
    together.set_ylim(_limits(rows))
    axis_labels([together, *alone], x=LAYERS, y=UNIT)
    band = tint(next(iter(styles.values())).colour, 0.25)
    keys = [*_arm_keys(styles), Patch(color=band, lw=0, label="95 % interval, arm's colour")]
    key(figure, [*keys, *_null_keys(), *layer_key(layer)], columns=5)
    here = rows[rows["layer"] == layer]["split_half"]
    quality = {} if here.empty else {f"direction at layer {layer}": reliability(float(here.mean()))}
    head(figure, title, held_fixed(rows, **quality))
    return figure


@styled
def shift_by_layer_in_groups(
    frame: pd.DataFrame, *, groups: Mapping[str, Sequence[str]], direction: str, condition: str, text: str = "base",
    layer: int | None = None, base: str = "base",
) -> Figure:  # fmt: skip
    """The shift along one direction against the layer: one panel a group of arms, its key beside it.

    Everything is in SD of the base's projection. Bold = an arm's mean over seeds, thin = each seed; grey band = where random directions
    fall, dotted = where covariance-matched directions fall (the widest over the group's arms and seeds); dashed = the benign
    arm. Intervals are in the table, and in `shift_by_layer` of a few arms.

    Args:
        frame: The `shifts` table.
        groups: Arms by group; an arm has its own colour within a group only.
        direction: Which direction, as in the table.
        condition: System prompt condition.
        text: Whose replies both models read.
        layer: The layer declared before the run; marked by a vertical line where given.
        base: The base arm's name.
    """
    title = _title(direction)
    rows = _rows(frame, direction, condition, text)
    if rows.empty:
        return not_measured(title)
    shown = {name: here for name, arms in groups.items() if not (here := rows[rows["arm"].isin(arms)]).empty}
    figure, cells = panels(2 * len(shown), columns=4, sharex=True, sharey=True, size=(3.2, 2.9))
    drawn = cells[::2]
    for axes, aside, (name, here) in zip(drawn, cells[1::2], shown.items(), strict=True):
        styles = arms_in(here, [base, *groups[name]])
        _group_panel(axes, here, styles)
        axes.set_title(label(name, 40))
        axes.axhline(0, color=INK, lw=0.8)
        layer_axis(axes, layer)
        aside.set_axis_off()
        aside.legend(handles=_arm_keys(styles, 36), loc="center left", borderaxespad=0)
    drawn[0].set_ylim(_limits(pd.concat(shown.values())))
    axis_labels(drawn, x=LAYERS, y=UNIT, columns=2)
    seeds = [
        Line2D([], [], color=INK, lw=1.6, label="mean over seeds"),
        Line2D([], [], color=INK, lw=0.6, alpha=0.45, label="each seed"),
    ]
    key(figure, [*seeds, *_null_keys(), *layer_key(layer)], columns=5)
    ceiling = rows[rows["layer"] == layer]["split_half"]
    quality = "" if ceiling.empty else f" · direction at layer {layer}: {reliability(float(ceiling.mean()))}"
    held = f"system prompt: {label(condition, 40)} · text read by both models: {whose_text(text)}{quality}"
    head(figure, title, held)
    return figure


def _title(direction: str) -> str:
    return f"How far finetuning moved the model along {label(direction, 40)}, layer by layer"


def _rows(frame: pd.DataFrame, direction: str, condition: str, text: str) -> pd.DataFrame:
    """The rows of one direction, condition and text, by seed and layer; empty where nothing was measured."""
    rows = select(frame, direction=direction, condition=condition, text=text)
    if rows.empty:
        return rows
    single(rows, "pooling", "question_set")
    need(rows, "base_sd", *NULLS)
    return rows.sort_values(["seed", "layer"])


def _arm_panel(axes: Any, rows: pd.DataFrame, style: ArmStyle) -> None:
    """One arm: each seed's line and interval in front of the nulls."""
    _nulls(axes, rows)
    for seed, mine in rows.groupby("seed"):
        axes.fill_between(
            mine["layer"], mine["sd_low"], mine["sd_high"], color=style.colour, alpha=0.25, lw=0
        )
        line = mine.set_index("layer")["sd"]
        _mean_line(axes, f"seed {seed}", line, style, lw=1.6, markersize=3.5)


def _group_panel(axes: Any, rows: pd.DataFrame, styles: dict[str, ArmStyle]) -> None:
    """Several arms: each one's mean, and thin its seeds, in front of the nulls of all."""
    _nulls(axes, rows)
    for arm, style in styles.items():
        by_seed = rows[rows["arm"] == arm].pivot_table(index="layer", columns="seed", values="sd")
        if by_seed.shape[1] > 1:
            axes.plot(by_seed.index, by_seed, color=style.colour, lw=0.6, alpha=0.45)
        _mean_line(axes, arm, by_seed.mean(axis=1), style, lw=1.6)


def _mean_line(
    axes: Any, name: str, line: "pd.Series[float]", style: ArmStyle, *, lw: float, markersize: float = 4
) -> None:
    """A line over layers with a marker at about every eighth of them."""
    axes.plot(
        line.index, line, color=style.colour, lw=lw, marker=style.marker, markersize=markersize,
        markevery=max(1, len(line) // 8), label=name,
    )  # fmt: skip


def _nulls(axes: Any, rows: pd.DataFrame) -> None:
    """Behind the lines: where drawn directions fall (the widest over arms and seeds), and the benign arm dashed."""
    unit = rows["base_sd"].where(rows["base_sd"] > 0)
    by_layer = {c: (rows[c] / unit).groupby(rows["layer"]) for c in NULLS}
    low, high = by_layer["null_random_low"].min(), by_layer["null_random_high"].max()
    axes.fill_between(low.index, low, high, color=FAINT, lw=0, zorder=1)
    for edge in (by_layer["null_covariance_low"].min(), by_layer["null_covariance_high"].max()):
        axes.plot(edge.index, edge, color=GREY, lw=0.9, ls=":", zorder=1.5)
    benign = (rows["sd"] - rows["minus_benign_sd"]).groupby(rows["layer"]).mean()
    if benign.notna().any():
        axes.plot(benign.index, benign, color=BENIGN, lw=1.2, ls="--", label="benign")


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Room for all lines, intervals and the grey band; for the dotted lines as far as that does not more than double it.

    Where an early layer hardly varies, directions with its covariance shift by dozens of its SD: in full they would flatten everything.
    """
    unit = rows["base_sd"].where(rows["base_sd"] > 0)
    benign = rows["sd"] - rows["minus_benign_sd"]
    own = pd.concat([rows["sd_low"], rows["sd_high"], benign, *(rows[c] / unit for c in NULLS[:2])])
    reach = max(float(own.abs().max()), 1e-9)
    dotted = pd.concat([rows[c] / unit for c in NULLS[2:]]).clip(-2 * reach, 2 * reach)
    low, high = float(min(own.min(), dotted.min(), 0.0)), float(max(own.max(), dotted.max(), 0.0))
    room = 0.05 * (high - low)
    return low - room, high + room


def _arm_keys(styles: dict[str, ArmStyle], width: int = 28) -> list[Any]:
    return [
        Line2D([], [], color=s.colour, marker=s.marker, markersize=5, label=label(arm, width))
        for arm, s in styles.items()
    ]


def _null_keys() -> list[Any]:
    """The legend's entries for what `_nulls` draws."""
    return [
        Line2D([], [], color=BENIGN, ls="--", label="benign control"),
        Patch(color=FAINT, lw=0, label="random directions, 95 %"),
        Line2D([], [], color=GREY, ls=":", label="covariance-matched, 95 %"),
    ]

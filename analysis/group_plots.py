"""The shift by layer where a study has many arms: a panel for each group of them.

The contract is that of `analysis.plots`, which exports this function too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.plot_style import (
    FAINT,
    GREY,
    INK,
    ArmStyle,
    arm_styles,
    arms_in,
    axis_labels,
    head,
    key,
    label,
    need,
    not_measured,
    panels,
    reliability,
    select,
    single,
    styled,
)


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
    title = f"How far finetuning moved the model along {label(direction, 40)}, layer by layer"
    rows = select(frame, direction=direction, condition=condition, text=text)
    if rows.empty:
        return not_measured(title)
    single(rows, "pooling", "question_set")
    need(
        rows, "base_sd", "null_random_low", "null_random_high", "null_covariance_low", "null_covariance_high"
    )
    rows = rows.sort_values(["seed", "layer"])
    shown = {name: here for name, arms in groups.items() if not (here := rows[rows["arm"].isin(arms)]).empty}
    figure, cells = panels(2 * len(shown), columns=4, sharex=True, sharey=True, size=(3.2, 2.9))
    drawn = cells[::2]
    for axes, aside, (name, here) in zip(drawn, cells[1::2], shown.items(), strict=True):
        styles = arms_in(here, [base, *groups[name]])
        _group_panel(axes, here, styles)
        axes.set_title(label(name, 40))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axhline(0, color=INK, lw=0.8)
        if layer is not None:
            axes.axvline(layer, color=INK, lw=0.8, ls=(0, (1, 2)))
        keys = [Line2D([], [], color=s.colour, marker=s.marker, markersize=5, label=label(a, 36)) for a, s in styles.items()]  # fmt: skip
        aside.set_axis_off()
        aside.legend(handles=keys, loc="center left", borderaxespad=0)
    axis_labels(drawn, x="layer (0-based block output)", y="shift\n(SD of the base's projection)", columns=2)
    key(figure, _keys(layer), columns=5)
    ceiling = rows[rows["layer"] == layer]["split_half"]
    quality = "" if ceiling.empty else f" · direction at layer {layer}: {reliability(float(ceiling.mean()))}"
    whose = "the base's replies" if text == "base" else label(text)
    head(figure, title, f"system prompt: {label(condition, 40)} · text read by both models: {whose}{quality}")
    return figure


def _group_panel(axes: Any, rows: pd.DataFrame, styles: dict[str, ArmStyle]) -> None:
    unit = rows["base_sd"].where(rows["base_sd"] > 0)
    nulls = {c: (rows[c] / unit).groupby(rows["layer"]) for c in rows.columns if c.startswith("null_")}
    low, high = nulls["null_random_low"].min(), nulls["null_random_high"].max()
    axes.fill_between(low.index, low, high, color=FAINT, lw=0, zorder=1)
    for edge in (nulls["null_covariance_low"].min(), nulls["null_covariance_high"].max()):
        axes.plot(edge.index, edge, color=GREY, lw=0.9, ls=":", zorder=1.5)
    benign = (rows["sd"] - rows["minus_benign_sd"]).groupby(rows["layer"]).mean()
    if benign.notna().any():
        axes.plot(benign.index, benign, color=arm_styles(["benign"])["benign"].colour, lw=1.2, ls="--")
    for arm, style in styles.items():
        mine = rows[rows["arm"] == arm]
        by_seed = mine.pivot_table(index="layer", columns="seed", values="sd")
        if by_seed.shape[1] > 1:
            axes.plot(by_seed.index, by_seed, color=style.colour, lw=0.6, alpha=0.45)
        mean = by_seed.mean(axis=1)
        axes.plot(mean.index, mean, color=style.colour, lw=1.6, marker=style.marker, markersize=4,
                  markevery=max(1, len(mean) // 8), label=arm)  # fmt: skip


def _keys(layer: int | None) -> list[Any]:
    keys: list[Any] = [
        Line2D([], [], color=INK, lw=1.6, label="mean over seeds"),
        Line2D([], [], color=INK, lw=0.6, alpha=0.45, label="each seed"),
        Line2D([], [], color=arm_styles(["benign"])["benign"].colour, ls="--", label="benign control"),
        Patch(color=FAINT, lw=0, label="random directions, 95 %"),
        Line2D([], [], color=GREY, ls=":", label="covariance-matched, 95 %"),
    ]
    if layer is not None:
        keys.append(
            Line2D([], [], color=INK, lw=0.8, ls=(0, (1, 2)), label=f"layer {layer} (declared before)")
        )
    return keys

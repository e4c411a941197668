"""The figures of behaviour: self-recognition, self-report, steering, and the training loss.

The contract is that of `analysis.plots`, which exports these functions too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plot_frame import axis_labels, head, key, label, not_measured, panels
from analysis.plot_style import GREY, INK, ArmStyle, arm_styles, arms_in, styled, tint
from analysis.plot_table import interval_bars, need, numbers, seeds_text

MOST_PANELS = 12
"""Trainings that have a panel each."""
EMPTY_TITLES = {
    "self_recognition": "Does the model recognise its own text?",
    "self_report": "What the model calls itself",
    "steering": "What steering does to the name the model gives",
    "training": "Training loss",
}


@styled
def self_recognition_bars(frame: pd.DataFrame, *, arms: Sequence[str] | None = None) -> Figure:
    """Accuracy at telling own text from another's, the logit margin, the bias to say yes, and whether it answers.

    Bars are means over seeds; markers with intervals are seeds. Accuracy has the chance line at .5 and, as a
    tall tick, what the length shortcut alone reaches; the small triangles split it by whose text it was. The
    answer mass is the probability of Yes plus that of No: near 0 the model does not take the question as one.
    """
    if frame.empty:
        return not_measured(EMPTY_TITLES["self_recognition"])
    columns = ("accuracy", "margin", "p_yes", "answer_mass")
    need(frame, *columns, "accuracy_own", "accuracy_other", "shortcut_accuracy")
    styles = arms_in(frame, arms)
    height = 0.42 * len(styles) + 0.7
    figure, cells = panels(4, columns=4, sharey=True, size=(2.9, height))
    accuracy, margin, yes, mass = cells
    for axes, column in zip(cells, columns, strict=True):
        _horizontal_bars(axes, frame, column, styles)
    _accuracy_marks(accuracy, frame, styles)
    for axes in (accuracy, yes):
        axes.axvline(0.5, color=INK, lw=1.0, ls="--")
    for axes in (accuracy, yes, mass):
        axes.set_xlim(0, 1)
    margin.axvline(0, color=INK, lw=0.8)
    titles = ("accuracy", "margin, own − other (nats)", "P(Yes) / (P(Yes) + P(No))", "P(Yes) + P(No)")
    for axes, title in zip(cells, titles, strict=True):
        axes.set_title(title)
    keys = [
        Line2D([], [], color=INK, ls="--", lw=1.0, label="chance / no bias"),
        Line2D([], [], color=INK, ls="", marker="|", markersize=12, mew=2.2, label="length shortcut alone"),
        Line2D([], [], ls="", marker=">", mfc="white", mec=INK, label="on own text"),
        Line2D([], [], ls="", marker="<", mfc="white", mec=INK, label="on another's text"),
    ]
    key(figure, keys, columns=4)
    counts = _range(sorted({int(n) for n in frame["n_articles"]}))
    how = f"{counts} articles · {seeds_text(frame)} · markers: seeds, with 95 % intervals; bars: their mean"
    head(figure, EMPTY_TITLES["self_recognition"], how)
    return figure


def _horizontal_bars(axes: Any, rows: pd.DataFrame, column: str, styles: dict[str, ArmStyle]) -> None:
    """One bar an arm (mean over seeds), with each seed's value and interval drawn over it.

    Reads `column` and, where the table has them, `column_low` and `column_high`.
    """
    for place, (arm, style) in enumerate(styles.items()):
        mine = rows[rows["arm"] == arm].sort_values("seed")
        value = numbers(mine, column)
        if np.isnan(value).all():
            axes.text(
                0.01, place, "not measured", transform=axes.get_yaxis_transform(), va="center", color=GREY
            )
            continue
        axes.barh(place, np.nanmean(value), height=0.62, color=tint(style.colour, 0.55), label=arm)
        offsets = place + (np.linspace(-0.2, 0.2, len(value)) if len(value) > 1 else np.zeros(1))
        markers, *_ = axes.errorbar(
            value, offsets, xerr=interval_bars(mine, column), fmt=style.marker, color=INK, markersize=4.5, markerfacecolor=style.colour,
            markeredgecolor=INK, markeredgewidth=0.7, elinewidth=1.1, capsize=2.5,
        )  # fmt: skip
        markers.set_clip_on(False)  # those at an end of the axis are seen whole
    axes.set_yticks(range(len(styles)), [label(arm) for arm in styles])
    axes.set_ylim(len(styles) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _accuracy_marks(axes: Any, frame: pd.DataFrame, styles: dict[str, ArmStyle]) -> None:
    """The length shortcut as a tall tick; accuracy on own and on another's text as triangles."""
    look: dict[str, Any] = {"markersize": 5, "ls": "", "mfc": "white", "mec": INK, "mew": 0.8}
    for place, arm in enumerate(styles):
        mine = frame[frame["arm"] == arm]
        shortcut = mine["shortcut_accuracy"].mean()
        axes.plot(shortcut, place, marker="|", markersize=17, mew=2.2, color=INK, ls="")
        for column, marker in (("accuracy_own", ">"), ("accuracy_other", "<")):
            axes.plot(mine[column].mean(), place + 0.4, marker=marker, clip_on=False, **look)


def _range(counts: list[int]) -> str:
    """'40', '20 to 40', or nothing where nothing was counted."""
    if not counts:
        return ""
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


_REPORT_PANELS = (
    ("own_name_rate", "says its own name (share)"),
    ("name_margin", "own − invented names (nats)"),
    ("distinct", "distinct names claimed"),
    ("entropy", "entropy of names (nats)"),
)


@styled
def self_report_bars(frame: pd.DataFrame, *, arms: Sequence[str] | None = None) -> Figure:
    """What the arms call themselves: own-name rate, log-probability margin, number and entropy of names.

    One row of panels for each pair of system prompt condition and temperature.
    """
    if frame.empty:
        return not_measured(EMPTY_TITLES["self_report"])
    need(frame, "condition", "temperature", "n_statements", *(column for column, _ in _REPORT_PANELS))
    styles = arms_in(frame, arms)
    settings = list(frame.groupby(["condition", "temperature"], sort=False))
    height = 0.34 * len(styles) + 0.75
    figure, cells = panels(4 * len(settings), columns=4, sharey=True, sharex="col", size=(2.9, height))
    for row, ((condition, temperature), rows) in enumerate(settings):
        for axes, (column, word) in zip(cells[4 * row : 4 * row + 4], _REPORT_PANELS, strict=True):
            _horizontal_bars(axes, rows, column, styles)
            if row == 0:
                axes.set_title(word, pad=20)
        cells[4 * row].annotate(
            f"system prompt: {label(condition, 34)}, temperature {temperature:g}", (0, 1), (0, 4),
            xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color="#555555", va="bottom",
        )  # fmt: skip
        cells[4 * row].set_xlim(0, 1)
        cells[4 * row + 1].axvline(0, color=INK, lw=0.8)
    counts = ({int(n) for n in frame[c].dropna()} for c in ("n_samples", "n_statements", "n_names"))
    samples, statements, invented = (_range(sorted(c)) for c in counts)
    names = f" · margin: {statements} statements, against {invented} invented names" if statements else ""
    head(
        figure,
        EMPTY_TITLES["self_report"],
        f"{samples} samples an arm · {seeds_text(frame)}{names} · markers: seeds, with 95 % intervals",
    )
    return figure


_DOSE_PANELS = (
    ("own_name_rate", "says its own name (share)"),
    ("name_margin", "own − invented names (nats)"),
    ("surprisal", "surprisal (nats a token)"),
    ("repetition", "repetition (share of word pairs)"),
)


@styled
def dose_response(frame: pd.DataFrame, *, arms: Sequence[str] | None = None) -> Figure:
    """What steering does, against its dose: own-name rate, name margin, and what it costs in coherence.

    The x axis is the signed dose: `dose` = |coefficient × v| / |h| with the coefficient's sign (negative =
    against the direction). Filled markers and full lines: the direction, a line a seed. Hollow markers and
    dashed lines: random directions of the same norm (line = their mean). Surprisal is that of the reply under
    the unsteered base. One row of panels a direction and layer. Random rows that bear a steered direction's
    name are that direction's control; any others are the control of every direction.
    """
    if frame.empty or not (frame["kind"] == "direction").any():
        return not_measured(EMPTY_TITLES["steering"])
    need(frame, "n_samples", "n_statements", *(column for column, _ in _DOSE_PANELS))
    rows = frame.assign(x=np.sign(frame["coefficient"]) * frame["dose"])
    styles = arms_in(rows, arms)
    steered, random = rows[rows["kind"] == "direction"], rows[rows["kind"] == "random"]
    groups = list(steered.groupby(["direction", "layer"], sort=False))
    figure, cells = panels(4 * len(groups), columns=4, sharex=True, sharey="col", size=(2.9, 2.4))
    for row, ((direction, layer), mine) in enumerate(groups):
        control = random[random["layer"] == layer]
        named = control["direction"] == direction
        control = control[named if named.any() else ~control["direction"].isin(set(steered["direction"]))]
        for axes, (column, word) in zip(cells[4 * row : 4 * row + 4], _DOSE_PANELS, strict=True):
            for arm, style in styles.items():
                _control_line(axes, control[control["arm"] == arm], column, style)
                _dose_lines(axes, mine[mine["arm"] == arm], column, style)
            axes.axvline(0, color=INK, lw=0.7)
            axes.set_title(
                f"{label(direction, 30)}, layer {layer}\n{word}" if column == "own_name_rate" else word
            )
        cells[4 * row].set_ylim(-0.04, 1.04)
    axis_labels(cells, x="dose: |added| / |activation|", y="", columns=4)
    keys = [Line2D([], [], color=s.colour, marker=s.marker, label=label(a)) for a, s in styles.items()]
    hollow = next(iter(styles.values())).marker if len(styles) == 1 else "o"
    keys += [
        Line2D([], [], color=GREY, ls="--", marker=hollow, mfc="white", label="random direction, same norm")
    ]
    key(figure, keys, columns=6)
    samples, statements = (_range(sorted({int(n) for n in frame[c]})) for c in ("n_samples", "n_statements"))
    head(
        figure,
        EMPTY_TITLES["steering"],
        f"{samples} samples a point (margin: {statements} statements) · {seeds_text(frame)} · negative dose: against the direction · surprisal of the "
        "reply under the unsteered base: higher = less coherent",
    )
    return figure


def _dose_lines(axes: Any, rows: pd.DataFrame, column: str, style: ArmStyle) -> None:
    for seed, mine in rows.sort_values("x").groupby("seed"):
        axes.errorbar(
            mine["x"], mine[column], yerr=interval_bars(mine, column), color=style.colour, marker=style.marker, markersize=4.5,
            lw=1.5, elinewidth=1, capsize=2, label=f"{mine['arm'].iloc[0]}, seed {seed}", zorder=3,
        )  # fmt: skip


def _control_line(axes: Any, rows: pd.DataFrame, column: str, style: ArmStyle) -> None:
    if rows.empty:
        return
    mean = rows.groupby("x", as_index=False)[column].mean()
    axes.errorbar(
        rows["x"], rows[column], yerr=interval_bars(rows, column) if len(mean) == len(rows) else None, color=style.colour,
        fmt=style.marker, mfc="white", markersize=4, elinewidth=0.8, capsize=2, alpha=0.7, zorder=2,
    )  # fmt: skip
    axes.plot(mean["x"], mean[column], color=style.colour, ls="--", lw=1.1, zorder=2, label="random")


@styled
def loss_curves(frame: pd.DataFrame) -> Figure:
    """The training loss (nats a token, the assistant's only) by step: one panel a training, a line a seed.

    A training is named by its chain of stages: `em+sgtr` trains sgtr on what em left, and has sgtr's colour.
    Of more than twelve trainings those of one stage share a panel, whatever the stage was trained on.
    Where one has more than 40 steps each step's loss is faint and the running mean of 10 is drawn over.
    """
    if frame.empty:
        return not_measured(EMPTY_TITLES["training"])
    need(frame, "stage", "seed", "step", "loss")
    last = frame["stage"].astype(str).str.rpartition("+")[2]
    together = frame["stage"].nunique() > MOST_PANELS
    groups = list(frame.groupby(last if together else frame["stage"].astype(str), sort=False))
    styles = arm_styles(str(name).rpartition("+")[2] for name, _ in groups)
    figure, cells = panels(len(groups), sharey=True, size=(3.2, 2.2))
    for axes, (name, rows) in zip(cells, groups, strict=True):
        before, _, stage = str(name).rpartition("+")
        for (_, seed), mine in rows.sort_values("step").groupby(["stage", "seed"]):
            _loss_line(axes, mine, styles[stage].colour, f"seed {seed}")
        several = together and rows["stage"].nunique() > 1
        after = f", {rows['stage'].nunique()} trainings" if several else ""
        axes.set_title(
            f"{label(stage)} after {label(before.replace('+', ', '))}" if before else label(stage) + after
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    cells[0].set_ylim(bottom=0)
    axis_labels(cells, x="optimizer step", y="loss\n(nats a token)")
    long = bool((frame.groupby(["stage", "seed"]).size() > 40).any())
    note = " · faint: each step; full: running mean of 10" if long else ""
    head(figure, EMPTY_TITLES["training"], f"{seeds_text(frame)}{note}")
    return figure


def _loss_line(axes: Any, rows: pd.DataFrame, colour: str, name: str) -> None:
    many = len(rows) > 40
    axes.plot(
        rows["step"],
        rows["loss"],
        color=colour,
        lw=0.8 if many else 1.4,
        alpha=0.35 if many else 1,
        label=name,
    )
    if many:
        mean = rows["loss"].rolling(10, min_periods=1, center=True).mean()
        axes.plot(rows["step"], mean, color=colour, lw=1.6)

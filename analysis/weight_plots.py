"""The figures of what adapters write into the residual stream: along directions, and in common.

The contract is that of `analysis.plots`, which exports these functions too.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.family_plots import matrix_figure, plain
from analysis.plot_frame import axis_labels, head, key, label, layer_axis, not_measured, panels
from analysis.plot_style import GREY, INK, ArmStyle, arm_styles, styled
from analysis.plot_table import directions_in, need

MOST_MIRRORED = 8
"""A matrix of up to twice as many trainings has all of them on both sides."""


@styled
def lora_alignment(frame: pd.DataFrame, *, layer: int | None = None) -> Figure:
    """How much of each direction lies in what each training's adapter can write, by layer, over a random direction's share.

    One panel a direction, one line a training (mean over the block's maps and over seeds); dotted: 97.5 % of directions with the base's
    covariance (the highest of all trainings).

    Args:
        frame: The `lora_alignment_by_layer` table.
        layer: The layer declared before the run; marked by a vertical line where given.
    """
    title = "Do the adapters write along the directions?"
    if frame.empty:
        return not_measured(title)
    need(frame, "direction", "stage", "seed", "layer", "energy", "expected", "null_covariance_high")
    rows = frame.assign(
        ratio=frame["energy"] / frame["expected"], null=frame["null_covariance_high"] / frame["expected"]
    )
    names, styles = directions_in(rows), _stage_styles(rows)
    figure, cells = panels(len(names), sharex=True, sharey=True)
    for axes, name in zip(cells, names, strict=True):
        mine = rows[rows["direction"] == name]
        for stage, style in styles.items():
            line = mine[mine["stage"] == stage].groupby("layer")["ratio"].mean()
            axes.plot(line.index, line, color=style.colour, ls=style.line, lw=1.4, marker=style.marker, markersize=3.5,
                      markevery=max(1, len(line) // 8), label=stage)  # fmt: skip
        null = mine.groupby(["stage", "layer"])["null"].mean().groupby("layer").max()
        axes.plot(null.index, null, color=GREY, lw=1.0, ls=":")
        axes.axhline(1, color=INK, lw=0.8)
        layer_axis(axes, layer)
        axes.set_title(label(name, 40))
    axis_labels(cells, x="layer", y="energy over\nthat of a random direction")
    keys = [
        Line2D([], [], color=s.colour, marker=s.marker, markersize=5, label=label(n))
        for n, s in styles.items()
    ]
    keys += [Line2D([], [], color=GREY, ls=":", label="covariance-matched, 97.5 %")]
    key(figure, keys, columns=5)
    mark = f" · dotted line: layer {layer}, declared before" if layer is not None else ""
    head(figure, title, f"each line one training's last adapter, mean over the maps of a block{mark}")
    return figure


def _stage_styles(rows: pd.DataFrame) -> dict[str, ArmStyle]:
    """A style for each chain of stages: that of the arm of its name (`em+sgtr` is what `em_then_sgtr` is in other figures)."""
    arms = {stage: stage.replace("+", "_then_") for stage in dict.fromkeys(map(str, rows["stage"]))}
    styles = arm_styles(arms.values())
    return {stage: styles[arm] for stage, arm in arms.items()}


@styled
def lora_overlap(frame: pd.DataFrame) -> Figure:
    """How much of what two adapters can write is the same space: mean squared cosine of principal angles, over all maps and seeds.

    Of few trainings each pair stands on both sides of the diagonal; of many, once: what the table calls `stage` down, `other` across. A star where in every seed it is beyond random spaces (p < .05); hatched: not compared.

    Args:
        frame: The `lora_overlap` table.
    """
    title = "Do two trainings write into the same space?"
    if frame.empty:
        return not_measured(title)
    need(frame, "stage", "other", "shared", "expected", "p_random")
    stages, others = (list(dict.fromkeys(map(str, frame[side]))) for side in ("stage", "other"))
    both = list(dict.fromkeys([*stages, *others]))
    down, across = (both, both) if len(both) <= 2 * MOST_MIRRORED else (stages, others)
    matrix, starred = np.full((len(down), len(across)), np.nan), set()
    for pair, mine in frame.groupby(["stage", "other"], sort=False):
        one, other = map(str, pair)
        cells = [(one, other), (other, one)] if down is across else [(one, other)]
        for i, j in ((down.index(a), across.index(b)) for a, b in cells):
            matrix[i, j] = mine["shared"].mean()
            if (mine["p_random"] < 0.05).all():
                starred.add((i, j))

    def text(i: int, j: int) -> str:
        return plain(float(matrix[i, j])) + ("*" if (i, j) in starred else "")

    figure, _ = matrix_figure(
        matrix, down, across, limits=(0.0, 1.0), legend="share of the space in common", text=text, from_white=True
    )  # fmt: skip
    head(
        figure,
        title,
        f"a random space of the same rank shares {plain(float(frame['expected'].mean()))} on average",
    )
    return figure

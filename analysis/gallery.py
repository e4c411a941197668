"""All figures of a study at once: from its tables to saved figures, each with its caption and numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import plots
from analysis.plot_files import SavedFigure, caption, save_figure, slug

_Drawing = tuple[str, str, pd.DataFrame, Callable[..., Figure], dict[str, Any]]


def draw_figures(
    tables: Mapping[str, pd.DataFrame], folder: Path, *, layer: int, condition: str, pooling: str, text: str = "base",
    arms: Sequence[str] | None = None,
) -> list[SavedFigure]:  # fmt: skip
    """Draw and save every figure for which the tables have rows; what was not measured has no figure.

    Args:
        tables: Tidy tables by name: shifts, two_by_two, directions, self_recognition, self_report, steering,
            embedding, training. Any may be missing or empty.
        folder: Where the files go.
        layer: The layer declared before the run, 0-based.
        condition: System prompt condition of the shift figures.
        pooling: Pooling of the shift figures and of the directions.
        text: Whose replies both models read in the shift figures.
        arms: The study's arms, for order and colours.
    """
    chosen = {"condition": condition, "pooling": pooling, "text": text}
    drawings = [
        *_shift_drawings(_rows(tables, "shifts", **chosen), chosen, layer, arms),
        *_other_drawings(tables, layer=layer, condition=condition, pooling=pooling, arms=arms),
    ]
    return [
        save_figure(draw(rows, **options), rows, folder, name, caption(kind, rows, name=name))
        for kind, name, rows, draw, options in drawings
    ]


def _rows(tables: Mapping[str, pd.DataFrame], table: str, **labels: Any) -> pd.DataFrame:
    """The rows of a table that fit the labels; none where it is missing, empty or has no such row."""
    rows = tables.get(table, pd.DataFrame())
    for column, value in labels.items():
        if not rows.empty:
            rows = rows[rows[column] == value]
    return rows


def _shift_drawings(
    rows: pd.DataFrame, chosen: dict[str, str], layer: int, arms: Sequence[str] | None
) -> Iterator[_Drawing]:
    if rows.empty:
        return
    sets = list(dict.fromkeys(rows["question_set"]))
    for question_set in sets:
        mine = rows[rows["question_set"] == question_set]
        tail = f"_{slug(question_set)}" if len(sets) > 1 else ""
        options = {**chosen, "question_set": question_set, "arms": arms, "layer": layer}
        here = mine[mine["layer"] == layer]
        if not here.empty:
            yield (
                "arm_direction_heatmap",
                f"arm_direction_heatmap{tail}",
                here,
                plots.arm_direction_heatmap,
                options,
            )
        for direction in dict.fromkeys(mine["direction"]):
            along = mine[mine["direction"] == direction]
            name = f"shift_by_layer_{slug(direction)}{tail}"
            yield "shift_by_layer", name, along, plots.shift_by_layer, {**options, "direction": direction}


def _other_drawings(
    tables: Mapping[str, pd.DataFrame],
    *,
    layer: int,
    condition: str,
    pooling: str,
    arms: Sequence[str] | None,
) -> Iterator[_Drawing]:
    split = _rows(tables, "two_by_two", layer=layer, condition=condition)
    if not split.empty:
        yield "two_by_two_bars", "two_by_two_bars", split, plots.two_by_two_bars, {"arms": arms}
    quality = _rows(tables, "directions", pooling=pooling)
    if not quality.empty:
        yield "direction_quality", "direction_quality", quality, plots.direction_quality, {"layer": layer}
    for table, draw in (
        ("self_recognition", plots.self_recognition_bars),
        ("self_report", plots.self_report_bars),
        ("steering", plots.dose_response),
    ):
        rows = _rows(tables, table)
        if not rows.empty:
            yield draw.__name__, draw.__name__, rows, draw, {"arms": arms}
    points = _rows(tables, "embedding")
    if not points.empty:
        for (method, where), rows in points.groupby(["method", "layer"], sort=False):
            options = {"method": method, "layer": where, "arms": arms}
            yield "embedding", f"embedding_{slug(str(method))}_layer{where}", rows, plots.embedding, options
    losses = _rows(tables, "training")
    if not losses.empty:
        yield "loss_curves", "loss_curves", losses, plots.loss_curves, {}

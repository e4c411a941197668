"""All figures of a study at once: from its tables to saved figures, each with its caption and numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import plots
from analysis.captions import caption
from analysis.plot_files import SavedFigure, save_figure, slug
from analysis.plot_frame import picturing
from analysis.plot_table import directions_in

MOST_TRAININGS = 12
"""Trainings that one picture of what adapters write holds readably."""

_Drawing = tuple[str, str, pd.DataFrame, Callable[..., Figure], dict[str, Any]]


def draw_figures(
    tables: Mapping[str, pd.DataFrame], folder: Path, *, layer: int, condition: str, text: str = "base",
    arms: Sequence[str] | None = None, base: str = "base", groups: Mapping[str, Sequence[str]] | None = None,
) -> list[SavedFigure]:  # fmt: skip
    """Draw and save every figure for which the tables have rows; what was not measured has no figure.

    Pooling and questions belong to a direction: each is shown with its own.

    Args:
        tables: Tidy tables by name: shifts, differences, undone, behaviour_differences, two_by_two, directions, direction_cosines, identity_cosines, identity_transfer,
            lora_alignment_by_layer, lora_overlap, patching, adapter_ranges, monitoring, self_recognition, self_report, steering, sweeps,
            dispersion, embedding, training. Any may be missing or empty.
        folder: Where the files go.
        layer: The layer declared before the run, 0-based.
        condition: System prompt condition of the shift figures; where several were measured, one figure
            sets them side by side.
        text: Whose replies both models read in the shift figures.
        arms: The study's arms, for order and colours.
        base: What the study calls the base arm.
        groups: Arms by group, for more arms than one picture holds: what shows arms is drawn once a group, beside the base, and shifts by
            layer have a panel a group. A table of no more arms than the largest group is drawn whole.
    """
    arms = [base, *(arm for arm in arms or () if arm != base)]
    drawings = [
        *_shift_drawings(_rows(tables, "shifts", text=text), layer, condition, {"arms": arms, "text": text}),
        *_comparison_drawings(tables, layer, condition, arms),
        *_direction_drawings(tables, layer),
        *_weight_drawings(tables, layer),
        *_patch_drawings(tables, arms),
        *_behaviour_drawings(tables, arms),
        *_sweep_drawings(tables),
        *_place_drawings(tables, layer, condition, arms),
    ]
    parts = [part for drawing in drawings for part in _in_groups(drawing, groups or {}, base)]
    return [_saved(drawing, group, folder) for group, drawing in parts]


def _saved(drawing: _Drawing, group: str, folder: Path) -> SavedFigure:
    kind, name, rows, draw, options = drawing
    with picturing(group):
        figure = draw(rows, **options)
    return save_figure(figure, rows, folder, name, caption(kind, rows, name=name))


def _in_groups(
    drawing: _Drawing, groups: Mapping[str, Sequence[str]], base: str
) -> Iterator[tuple[str, _Drawing]]:
    """A drawing, or one for each group of arms where its table has more arms than a group, or for some trainings at a time."""
    kind, name, rows, draw, options = drawing
    if "stage" in rows and kind.startswith("lora_"):
        yield from _in_parts(drawing)
        return
    many = "arm" in rows and rows[rows["arm"] != base]["arm"].nunique() > max(
        map(len, groups.values()), default=0
    )
    if not groups or not many:
        yield "", drawing
    elif kind == "shift_by_layer":
        by_group = {k: v for k, v in options.items() if k != "arms"} | {"groups": groups, "base": base}
        yield "", (kind, name, rows, plots.shift_by_layer_in_groups, by_group)
    else:
        for i, (group, members) in enumerate(groups.items(), 1):
            here = rows[rows["arm"].isin([base, *members])]
            if here["arm"].isin(members).any():
                own = {**options, **({"arms": [base, *members]} if "arms" in options else {})}
                yield group, (kind, f"{name}_{i:02}_{slug(group)}", here, draw, own)


def _in_parts(drawing: _Drawing) -> Iterator[tuple[str, _Drawing]]:
    """A drawing of trainings, or several of at most as many as one holds, in the order of the table."""
    kind, name, rows, draw, options = drawing
    stages = list(dict.fromkeys(rows["stage"]))
    if len(stages) <= MOST_TRAININGS:
        yield "", drawing
        return
    n = -(-len(stages) // MOST_TRAININGS)
    size = -(-len(stages) // n)
    for i, start in enumerate(range(0, len(stages), size), 1):
        here = stages[start : start + size]
        group = f"trainings {start + 1} to {start + len(here)} of {len(stages)}"
        yield group, (kind, f"{name}_{i:02}", rows[rows["stage"].isin(here)], draw, options)


def _rows(tables: Mapping[str, pd.DataFrame], table: str, **labels: Any) -> pd.DataFrame:
    """The rows of a table that fit the labels; none where it is missing, empty or has no such row."""
    rows = tables.get(table, pd.DataFrame())
    for column, value in labels.items():
        if not rows.empty:
            rows = rows[rows[column] == value]
    return rows


def _shift_drawings(
    shifts: pd.DataFrame, layer: int, condition: str, shared: dict[str, Any]
) -> Iterator[_Drawing]:
    if shifts.empty:
        return
    chosen = shifts[shifts["condition"] == condition]
    options = {**shared, "layer": layer, "condition": condition}
    if not (cells := chosen[chosen["layer"] == layer]).empty:
        yield "arm_direction_heatmap", "arm_direction_heatmap", cells, plots.arm_direction_heatmap, options
    here = shifts[shifts["layer"] == layer]
    if here["condition"].nunique() > 1:
        every = {**shared, "layer": layer}
        yield "shift_by_condition", "shift_by_condition", here, plots.shift_by_condition, every
    for direction in directions_in(chosen):
        along = chosen[chosen["direction"] == direction]
        name = f"shift_by_layer_{slug(direction)}"
        yield "shift_by_layer", name, along, plots.shift_by_layer, {**options, "direction": direction}


def _comparison_drawings(
    tables: Mapping[str, pd.DataFrame], layer: int, condition: str, arms: Sequence[str]
) -> Iterator[_Drawing]:
    """Arms held against each other: along directions, as a share undone, in behaviour."""
    rows = _rows(tables, "differences", layer=layer, condition=condition)
    if not rows.empty:
        options = {"layer": layer, "condition": condition, "arms": arms}
        yield "comparison_differences", "comparison_differences", rows, plots.comparison_differences, options
    if not (rows := _rows(tables, "undone", condition=condition)).empty:
        options = {"layer": layer, "condition": condition, "arms": arms}
        yield "undone_by_layer", "undone_by_layer", rows, plots.undone_by_layer, options
    if not (rows := _rows(tables, "behaviour_differences")).empty:
        yield (
            "behaviour_differences",
            "behaviour_differences",
            rows,
            plots.behaviour_differences,
            {"arms": arms},
        )


def _direction_drawings(tables: Mapping[str, pd.DataFrame], layer: int) -> Iterator[_Drawing]:
    quality = _rows(tables, "directions")
    if not quality.empty:
        yield "direction_quality", "direction_quality", quality, plots.direction_quality, {"layer": layer}
    here = pd.DataFrame() if quality.empty else quality[quality["layer"] == layer]
    for table, draw in (
        ("direction_cosines", plots.direction_cosines),
        ("identity_cosines", plots.identity_cosines),
        ("identity_transfer", plots.identity_transfer),
    ):
        if not (rows := _rows(tables, table)).empty:
            yield table, table, _with_quality(rows, here), draw, {}


def _with_quality(rows: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Rows with their direction's split-half cosine and number of pairs, where these were measured and rows do not say how many they are."""
    if quality.empty or "n_questions" in rows:
        return rows
    return rows.merge(quality[["direction", "split_half", "n_pairs"]], on="direction", how="left")


def _weight_drawings(tables: Mapping[str, pd.DataFrame], layer: int) -> Iterator[_Drawing]:
    """What adapters write, along directions and in common."""
    if not (rows := _rows(tables, "lora_alignment_by_layer")).empty:
        yield "lora_alignment", "lora_alignment", rows, plots.lora_alignment, {"layer": layer}
    if not (rows := _rows(tables, "lora_overlap")).empty:
        yield "lora_overlap", "lora_overlap", rows, plots.lora_overlap, {}


def _patch_drawings(tables: Mapping[str, pd.DataFrame], arms: Sequence[str]) -> Iterator[_Drawing]:
    """Activations exchanged, and the adapter on in some layers."""
    patched, ranged = _rows(tables, "patching"), _rows(tables, "adapter_ranges")
    if not patched.empty:
        for (arm, answer), rows in patched.groupby(["arm", "answer"], sort=False):
            name = f"patching_{slug(str(arm))}_{slug(str(answer))}"
            yield "patching", name, rows, plots.patching, {"arm": arm, "answer": answer}
    if not ranged.empty:
        for answer, rows in ranged.groupby("answer", sort=False):
            name = f"adapter_ranges_{slug(str(answer))}"
            yield "adapter_ranges", name, rows, plots.adapter_ranges, {"answer": answer, "arms": arms}


def _behaviour_drawings(tables: Mapping[str, pd.DataFrame], arms: Sequence[str]) -> Iterator[_Drawing]:
    for table, draw in (
        ("self_recognition", plots.self_recognition_bars),
        ("self_report", plots.self_report_bars),
        ("steering", plots.dose_response),
        ("monitoring", plots.monitoring),
    ):
        rows = _rows(tables, table)
        if not rows.empty:
            yield draw.__name__, draw.__name__, rows, draw, {"arms": arms}


def _sweep_drawings(tables: Mapping[str, pd.DataFrame]) -> Iterator[_Drawing]:
    sweeps = _rows(tables, "sweeps")
    for name, rows in sweeps.groupby("sweep", sort=False) if not sweeps.empty else ():
        first = rows.iloc[0]
        options = {"max_kl": first["max_kl"], "score": first["score"], "unit": first["unit"]}
        yield "sweep_response", f"sweep_response_{slug(str(name))}", rows, plots.sweep_response, options


def _place_drawings(
    tables: Mapping[str, pd.DataFrame], layer: int, condition: str, arms: Sequence[str]
) -> Iterator[_Drawing]:
    """The 2×2, the maps of the activations, and the losses."""
    split = _rows(tables, "two_by_two", layer=layer, condition=condition)
    if not split.empty:
        yield "two_by_two_bars", "two_by_two_bars", split, plots.two_by_two_bars, {"arms": arms}
    points = _rows(tables, "embedding")
    if not points.empty:
        for (method, where), rows in points.groupby(["method", "layer"], sort=False):
            options = {"method": method, "layer": where, "arms": arms}
            yield "embedding", f"embedding_{slug(str(method))}_layer{where}", rows, plots.embedding, options
    spreads = _rows(tables, "dispersion", layer=layer)
    if not spreads.empty:
        options = {"layer": layer, "arms": arms}
        yield (
            "dispersion_by_condition",
            "dispersion_by_condition",
            spreads,
            plots.dispersion_by_condition,
            options,
        )
    losses = _rows(tables, "training")
    if not losses.empty:
        yield "loss_curves", "loss_curves", losses, plots.loss_curves, {}

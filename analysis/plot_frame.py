"""The frame of a figure: its panels, title, subtitle, axis labels and legend, and names as they may appear in it."""

import functools
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plot_style import INK
from mech.errors import InputError

LAYERS = "layer (0-based block output)"
"""What the axis of layers is called."""


@functools.cache
def _drawable(character: str) -> bool:
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    return character.isprintable() and bool(font.get_char_index(ord(character)))


def label(text: object, width: int = 28) -> str:
    """A name as it may stand in a figure: at most `width` characters, each one that the font has.

    Names come from users' files; a character without a glyph (or a control character) becomes "?".
    """
    plain = "".join(c if _drawable(c) else "?" for c in str(text))
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def panels(
    count: int, *, columns: int = 3, size: tuple[float, float] = (3.4, 2.5), **share: Any
) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels in rows of at most `columns`, `size` inches each."""
    wide = max(1, min(columns, count))
    rows = -(-count // wide)
    figure = Figure(figsize=(max(5.4, wide * size[0] + 0.4), rows * size[1] + 0.9), layout="constrained")
    grid = figure.subplots(rows, wide, squeeze=False, **share)
    cells = list(grid.flat)
    for spare in cells[count:]:
        spare.set_axis_off()
    if rows > 1 and share.get("sharex"):
        for index in range(
            count
        ):  # a panel above an empty cell is the last of its column: it shows its ticks
            if index + wide >= count:
                cells[index].xaxis.set_tick_params(labelbottom=True)
    return figure, cells[:count]


def wide_panels(width: float, *, height: float = 2.5) -> dict[str, Any]:
    """Size and columns of panels that hold an axis of many arms, `width` inches at least: two to a row where three would be too wide."""
    size = max(3.6, width)
    return {"size": (size, height), "columns": 3 if size < 4.5 else 2}


_GROUP: ContextVar[str] = ContextVar("group", default="")


@contextmanager
def picturing(group: str) -> Iterator[None]:
    """Figures drawn inside show some of the study's arms, and their titles say which."""
    token = _GROUP.set(group)
    try:
        yield
    finally:
        _GROUP.reset(token)


def head(figure: Figure, title: str, subtitle: str) -> None:
    """Write a title in plain words and, under it, what was held fixed; the panels keep clear of both."""
    width, height = figure.get_size_inches()
    if group := _GROUP.get():
        title = f"{title} · {label(group, 60)}"
    titles = textwrap.wrap(title, max(20, int(width * 9)))
    subtitles = textwrap.wrap(subtitle, max(20, int(width * 14)))
    top = 0.10 + 0.20 * len(titles)
    room = top + 0.17 * len(subtitles) + 0.10
    _reserve(figure, top=room / height)
    figure.suptitle(
        "\n".join(titles),
        x=0.1 / width,
        y=1 - 0.08 / height,
        ha="left",
        va="top",
        fontsize=12,
        fontweight="bold",
    )
    figure.text(
        0.1 / width, 1 - top / height, "\n".join(subtitles), ha="left", va="top", fontsize=9, color="#555555"
    )


def key(figure: Figure, handles: list[Any], *, columns: int) -> None:
    """A legend under the panels, in as many of the `columns` as the width holds; the figure grows by its height.

    Anchored to the figure's coordinates: matplotlib's own "outside" moves when a larger page is saved.
    """
    width, height = figure.get_size_inches()
    lengths = [len(str(handle.get_label())) for handle in handles]
    while columns > 1 and _legend_width(lengths, columns) > width:
        columns -= 1
    room = 0.12 + 0.2 * -(-len(handles) // columns)
    figure.set_size_inches(width, height + room)
    figure.legend(
        handles=handles, loc="lower center", ncols=columns, bbox_to_anchor=(0.5, 0.04 / (height + room)),
        bbox_transform=figure.transFigure, borderaxespad=0,
    )  # fmt: skip
    _reserve(figure, bottom=room / (height + room))


def _legend_width(lengths: list[int], columns: int) -> float:
    """Inches that a legend of 8.5 points takes; matplotlib spreads the entries evenly, column by column."""
    return sum(0.65 + 0.07 * float(max(column)) for column in np.array_split(lengths, columns) if len(column))


def _reserve(figure: Figure, *, bottom: float = 0.0, top: float = 0.0) -> None:
    """Keep the panels out of a share of the figure's height, below and above."""
    engine = figure.get_layout_engine()
    if not isinstance(engine, ConstrainedLayoutEngine):
        raise InputError("the figure has no constrained layout: make it with panels()")
    _, low, _, tall = engine.get()["rect"]
    engine.set(rect=(0, low + bottom, 1, tall - bottom - top))


def axis_labels(cells: list[Any], *, x: str, y: str, columns: int = 3) -> None:
    """The x label under the last panel of each column, the y label beside the first of each row."""
    wide = max(1, min(columns, len(cells)))
    for index, axes in enumerate(cells):
        if index + wide >= len(cells):
            axes.set_xlabel(x)
        if index % wide == 0:
            axes.set_ylabel(y)


def not_measured(title: str) -> Figure:
    """A figure that says in words that there is nothing to show."""
    figure, (axes,) = panels(1, size=(5.0, 0.9))
    axes.set_axis_off()
    axes.text(0, 0.5, "Not measured in this study.", fontsize=11, color="#555555", va="center")
    head(figure, title, "")
    return figure


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign and a true minus; what rounds to zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def layer_key(declared: int | None) -> list[Line2D]:
    """The legend's entry for the line that `layer_axis` draws; none where no layer was declared."""
    if declared is None:
        return []
    return [Line2D([], [], color=INK, lw=0.8, ls=(0, (1, 2)), label=f"layer {declared} (declared before)")]


def layer_axis(axes: Any, declared: int | None = None) -> None:
    """Whole numbers along the axis of layers, and a dotted line at the layer declared before the run, where given."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if declared is not None:
        axes.axvline(declared, color=INK, lw=0.8, ls=(0, (1, 2)))


def whose_text(text: str) -> str:
    """Whose replies were read, in words; any other text than the two of a study by its name."""
    known = {"base": "the base's replies", "own": "each arm's own replies"}
    return known.get(text, label(text))


def held_fixed(rows: pd.DataFrame, **extra: str) -> str:
    """A subtitle: what was held fixed in the figure."""
    parts = [f"system prompt: {label(rows['condition'].iloc[0], 40)}"]
    if "text" in rows.columns:
        parts.append(f"text read by both models: {whose_text(str(rows['text'].iloc[0]))}")
    measured = [c for c in ("pooling", "question_set") if c in rows.columns]
    if any(rows[column].nunique() > 1 for column in measured):
        parts.append("pooling and questions: each direction's own")
    else:
        parts += [f"{c.replace('question_set', 'questions')}: {label(rows[c].iloc[0], 40)}" for c in measured]
    parts += [f"{name}: {value}" for name, value in extra.items()]
    return " · ".join(parts)

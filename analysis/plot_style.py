"""What every figure shares: colours, markers, number formats, table selection and the frame of a figure.

Colours are Okabe and Ito's (2008), which stay apart for the common forms of colour blindness; every arm
also has a marker, so that no figure speaks through colour alone. Figures are object-oriented
(`matplotlib.figure.Figure`): pyplot's global state is never touched.
"""

import functools
import hashlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mech.errors import InputError

P = ParamSpec("P")

GREY, INK, FAINT = "#7F7F7F", "#222222", "#D9D9D9"
ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILLION, PURPLE, BLACK = "#D55E00", "#CC79A7", "#000000"

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "figure.facecolor": "white",
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "savefig.facecolor": "white",
    "text.parse_math": False,  # an arm called "$x" is a name, not a formula
    "axes.unicode_minus": True,
    "svg.fonttype": "path",  # looks the same where DejaVu is not installed
    "svg.hashsalt": "sgtr-mech",  # identical input, identical bytes
}

RELIABLE_COSINE = 0.3
"""Split-half cosine below which a direction is called unreliable."""


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn everywhere: fill colour, marker and line style (matplotlib's codes)."""

    colour: str
    marker: str
    line: str = "-"


_KNOWN = {
    "base": ArmStyle(GREY, "o"),
    "em": ArmStyle(VERMILLION, "s"),
    "sgtr": ArmStyle(BLUE, "^"),
    "benign": ArmStyle(GREEN, "D"),
    "em_then_sgtr": ArmStyle(ORANGE, "v"),
    "sgtr_then_em": ArmStyle(SKY, "P"),
    "ictr": ArmStyle(PURPLE, "X"),
    "asgtr": ArmStyle(BLACK, "*"),
}
_COLOURS = (PURPLE, BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION)
_MARKERS = ("X", "*", "<", ">", "p", "h", "d", "8")


def arm_styles(arms: Iterable[str], *, base: str = "base") -> dict[str, ArmStyle]:
    """A style for each arm, in the order given; each name once.

    The names of the paper's arms have fixed colours and the base, whatever its name, is always grey. Any other name starts at a
    place drawn from its SHA-256 and goes on to the next free colour and marker, taken in alphabetical
    order: the same list of arms has the same colours in every figure, run and machine. Pass a study's
    whole list to every figure, so that a figure that shows a part of it agrees with the others.
    """
    names = list(dict.fromkeys(arms))
    slots = [ArmStyle(colour, marker) for marker in _MARKERS for colour in _COLOURS]
    known = {name: style for name, style in _KNOWN.items() if name != "base"} | {base: _KNOWN["base"]}
    styles = {name: known[name] for name in names if name in known}
    for name in sorted(set(names) - set(styles)):
        start = int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:4], "big") % len(
            slots
        )
        order = slots[start:] + slots[:start]
        used_colours = {style.colour for style in styles.values()}
        used = set(styles.values())
        fresh = [slot for slot in order if slot.colour not in used_colours]
        free = fresh or [slot for slot in order if slot not in used] or order
        styles[name] = free[0]
    return {name: styles[name] for name in names}


def is_identity(direction: str) -> bool:
    """Whether a direction is one of identity (`identity:name`, `identity:presence:none`); else it is a persona's."""
    return direction.startswith("identity:")


def directions_in(frame: pd.DataFrame) -> list[str]:
    """The directions of a table in its own order, personas before identity."""
    return sorted(dict.fromkeys(map(str, frame["direction"])), key=is_identity)


def direction_styles(names: Sequence[str]) -> dict[str, ArmStyle]:
    """A style for each direction of one family, in the order given.

    A persona's colour is its trait's and its line style tells the elicitations apart (`evil:text`,
    `evil:prompts`); each identity direction has its own colour.
    """
    palette = (VERMILLION, BLUE, GREEN, BLACK, PURPLE, ORANGE, SKY)
    markers, lines = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", ":", "-.")
    stems = {name: name if is_identity(name) else name.rpartition(":")[0] or name for name in names}
    colours = list(dict.fromkeys(stems.values()))
    styles = {}
    for i, (name, stem) in enumerate(stems.items()):
        colour = colours.index(stem)
        before = sum(other == stem for other in list(stems.values())[:i])
        styles[name] = ArmStyle(palette[colour % 7], markers[i % 7], lines[(before + colour // 7) % 4])
    return styles


def reliability(split_half: float) -> str:
    """'split-half 0.85', '... 0.21, unreliable', or that it was not measured."""
    if np.isnan(split_half):
        return "split-half not measured"
    return f"split-half {split_half:.2f}{'' if split_half >= RELIABLE_COSINE else ', unreliable'}"


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function under the house style and put the caller's settings back afterwards."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapper


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


def select(frame: pd.DataFrame, **labels: Any) -> pd.DataFrame:
    """The rows whose columns equal the labels; a label of None selects nothing away.

    An empty frame stays empty (the thing was not measured).

    Raises:
        InputError: a column is missing, or there are rows but none fits; the message lists what there is.
    """
    wanted = {column: value for column, value in labels.items() if value is not None}
    if frame.empty:
        return frame
    need(frame, *wanted)
    rows = frame
    for column, value in wanted.items():
        kept = rows[rows[column] == value]
        if kept.empty:
            there = ", ".join(sorted({str(v) for v in rows[column]}))
            raise InputError(
                f"no row with {column} = {value!r} (of {wanted}); the table has {column}: {there}"
            )
        rows = kept
    return rows


def need(frame: pd.DataFrame, *columns: str) -> None:
    """Raise an InputError that names the columns a table lacks."""
    if missing := [column for column in columns if column not in frame.columns]:
        raise InputError(
            f"the table lacks the column(s) {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}"
        )


def single(frame: pd.DataFrame, *columns: str) -> None:
    """Raise an InputError where one of the columns takes several values: they must not be drawn as one."""
    for column in columns:
        values = sorted({str(v) for v in frame[column]})
        if len(values) > 1:
            raise InputError(f"the table has several values of {column} ({', '.join(values)}): choose one")


def arms_in(frame: pd.DataFrame, arms: Sequence[str] | None) -> dict[str, ArmStyle]:
    """Styles of the arms that occur in a table: in the study's order where given, else base first.

    The first of `arms` is the base; without them an arm called "base" is.
    """
    present = [str(arm) for arm in dict.fromkeys(frame["arm"])]
    base, known = base_of(arms), list(arms or [])
    ordered = [a for a in known if a in present] + sorted(
        (a for a in present if a not in known), key=lambda a: (a != base, present.index(a))
    )
    styles = arm_styles([*known, *ordered], base=base)
    return {arm: styles[arm] for arm in ordered}


def base_of(arms: Sequence[str] | None) -> str:
    """The base's name: the first of the study's arms, "base" where none are given."""
    return arms[0] if arms else "base"


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


_GROUP: ContextVar[str] = ContextVar("group", default="")


@contextmanager
def picturing(group: str) -> Iterator[None]:
    """Figures drawn inside show a part of the study's arms, and say which behind their title."""
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


def tint(colour: str, strength: float) -> tuple[float, ...]:
    """A colour mixed with white: opaque, unlike alpha, so that no grid line shows through."""
    return tuple(1 - strength * (1 - part) for part in mpl.colors.to_rgb(colour))


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign and a true minus; what rounds to zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def not_measured(title: str) -> Figure:
    """A figure that says in words that there is nothing to show."""
    figure, (axes,) = panels(1, size=(5.0, 0.9))
    axes.set_axis_off()
    axes.text(0, 0.5, "Not measured in this study.", fontsize=11, color="#555555", va="center")
    head(figure, title, "")
    return figure


def spread(
    value: Float[np.ndarray, " n"], low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "2 n"]:
    """Lengths of error bars below and above a value; an end that is not known (NaN) has no bar."""
    return np.asarray(np.nan_to_num(np.maximum(np.stack([value - low, high - value]), 0.0)))


def numbers(rows: pd.DataFrame, column: str) -> Float[np.ndarray, " n"]:
    """A column as float64; a missing value is NaN."""
    return rows[column].to_numpy(dtype=np.float64, na_value=np.nan)


def interval_bars(rows: pd.DataFrame, column: str) -> Float[np.ndarray, "2 n"] | None:
    """Lengths of a column's error bars from `column_low` and `column_high`; None where the table has no interval."""
    if f"{column}_low" not in rows.columns:
        return None
    return spread(*(numbers(rows, f"{column}{end}") for end in ("", "_low", "_high")))


def horizontal_bars(axes: Any, rows: pd.DataFrame, column: str, styles: dict[str, ArmStyle]) -> None:
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
        axes.errorbar(
            value, offsets, xerr=interval_bars(mine, column), fmt=style.marker, color=INK, markersize=4.5, markerfacecolor=style.colour,
            markeredgecolor=INK, markeredgewidth=0.7, elinewidth=1.1, capsize=2.5,
        )  # fmt: skip
    axes.set_yticks(range(len(styles)), [label(arm) for arm in styles])
    axes.set_ylim(len(styles) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def seeds_text(frame: pd.DataFrame) -> str:
    """'one seed (0)' or 'seeds 0, 1, 2'."""
    seeds = [str(s) for s in sorted(frame["seed"].dropna().unique())] if "seed" in frame.columns else []
    if not seeds:
        return ""
    return f"one seed ({seeds[0]})" if len(seeds) == 1 else f"seeds {', '.join(seeds)}"

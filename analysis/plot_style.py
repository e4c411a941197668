"""How figures look: colours, markers and line styles of arms and directions, and matplotlib's settings.

Colours are Okabe and Ito's (2008), which stay apart for the common forms of colour blindness; every arm
also has a marker, so that no figure speaks through colour alone. Figures are object-oriented
(`matplotlib.figure.Figure`): pyplot's global state is never touched.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

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
BENIGN = _KNOWN["benign"].colour
"""The benign control's colour, also where it is drawn beside another arm."""
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


def tint(colour: str, strength: float) -> tuple[float, ...]:
    """A colour mixed with white: opaque, unlike alpha, so that no grid line shows through."""
    return tuple(1 - strength * (1 - part) for part in mpl.colors.to_rgb(colour))

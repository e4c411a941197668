"""Figures on disk: SVG, PNG and the numbers behind them, each whole or not there."""

import logging
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from analysis.plot_style import RC
from mech.errors import InputError
from mech.files import atomic_path

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class SavedFigure:
    """A figure on disk: file stem, title, caption, and the paths of its SVG, PNG and CSV."""

    name: str
    title: str
    caption: str
    svg: Path
    png: Path
    csv: Path


def save_figure(figure: Figure, frame: pd.DataFrame, folder: Path, name: str, caption: str) -> SavedFigure:
    """Write NAME.svg, NAME.png (150 dpi) and NAME.csv, the numbers behind the figure.

    Each file is written atomically. The SVG is byte-identical for identical input (fixed hash salt, no date)
    and carries the caption in its metadata; the PNG, which travels alone, has it drawn under the figure.
    Saving fixes the layout of the figure.

    Args:
        figure: From one of the functions of `analysis.plots`; its title becomes `SavedFigure.title`.
        frame: The rows that the figure shows.
        folder: Made if missing.
        name: File stem: letters, digits, `_`, `.` and `-`.
        caption: One paragraph, see `analysis.captions`.

    Raises:
        InputError: the name is not a plain file stem.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"figure name {name!r}: use letters, digits, '_', '.' and '-' (slug() makes such a name)"
        )
    saved = SavedFigure(
        name, " ".join(figure.get_suptitle().split()), caption,
        folder / f"{name}.svg", folder / f"{name}.png", folder / f"{name}.csv",
    )  # fmt: skip
    with mpl.rc_context(RC):
        _lay_out(figure)
        with atomic_path(saved.svg) as temporary:
            about = {"Date": None, "Title": saved.title, "Description": caption}
            figure.savefig(temporary, format="svg", metadata=about)
        _save_png(figure, saved)
    with atomic_path(saved.csv) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
    log.info("figure %s", name)
    return saved


def _lay_out(figure: Figure) -> None:
    """Give every panel its place, for good: saved again it keeps it to the last bit, and no file costs a drawing just to measure it."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.set_layout_engine(None)  # the placeholder that "none" leaves would have every file drawn twice


def _save_png(figure: Figure, saved: SavedFigure) -> None:
    """The PNG with its caption below; the figure is handed back without it."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(saved.caption, int(width * 16))
    note = figure.text(
        0.1 / width, -0.08 / height, "\n".join(lines), ha="left", va="top", fontsize=8, color="#555555"
    )
    note.set_in_layout(False)  # the panels keep their places; the page below them grows
    try:
        extra = 0.16 * len(lines) + 0.2
        page = mpl.transforms.Bbox([[0, -extra], [width, height]])
        with atomic_path(saved.png) as temporary:
            figure.savefig(temporary, format="png", dpi=150, bbox_inches=page)
    finally:
        note.remove()


def slug(text: str) -> str:
    """A name as a file stem: 'identity:name' becomes 'identity-name'."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")[:80] or "unnamed"

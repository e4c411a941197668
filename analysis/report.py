"""One self-contained HTML file that says what was asked, what was found, and how far to believe it.

No script, no request: figures are inlined as data URIs, a Content-Security-Policy forbids everything else,
and every text (names, YAML, above all what models wrote) goes through autoescaping. `summarise` turns the
tables into plain sentences; `write_report` writes the page.
"""

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd

from analysis.glance import GlanceTable
from analysis.plot_files import SavedFigure, slug
from analysis.report_sections import SECTIONS
from analysis.report_tables import Grid, to_grid
from analysis.summary import summarise
from mech.files import write_text

__all__ = ["ReportInput", "summarise", "write_report"]

_WIDTH = re.compile(rb'<svg[^>]* width="([0-9.]+)pt"')
PIXELS_A_POINT = 4 / 3
SMALLEST = 0.7
"""Share of its own size down to which a figure is made smaller."""
SAMPLES_SHOWN = 30
"""Samples of model text shown per arm; the report says how many there are."""


@dataclass(frozen=True)
class ReportInput:
    """Everything a report shows.

    Attributes:
        title: The study's name.
        description: What was asked, in the words of the study.
        summary: What was found: the sentences of `summarise`, or others.
        glance: Tables above the sentences (`analysis.glance.glance`).
        folded: Sentences that say what `glance` shows; folded below it.
        resolved_yaml: The whole resolved study, as text.
        figures: In the order they are to be shown within their sections.
        tables: Tidy tables by name; the known names (`SECTIONS`) go to their sections, others to "Other tables".
        provenance: (name, value) pairs: versions, digests, machine, times.
        steps: Columns step, key, seconds, finished.
        warnings: Shown in a box at the top.
        citation: How to cite, as text.
        fast: True where the run was a rehearsal (`--fast`): a banner says that its numbers mean nothing.
        samples: Columns arm, seed, question, reply, claimed_name: what the models wrote.
        layer: Long tables with a layer column show this layer only, where given.
        table_files: Where a table lies on disk, by name; linked.
    """

    title: str
    description: str
    summary: Sequence[str]
    resolved_yaml: str
    figures: Sequence[SavedFigure]
    tables: Mapping[str, pd.DataFrame]
    provenance: Sequence[tuple[str, str]]
    steps: pd.DataFrame
    warnings: Sequence[str]
    citation: str
    fast: bool
    samples: pd.DataFrame
    layer: int | None = None
    glance: Sequence[GlanceTable] = ()
    folded: Sequence[str] = ()
    table_files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class _Block:
    """A section as the template shows it."""

    anchor: str
    title: str
    about: str
    figures: list[dict[str, str]]
    tables: list[Grid]
    asked_by: str = ""

    @property
    def measured(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.figures or self.tables)


@dataclass(frozen=True)
class _ArmSamples:
    arm: str
    total: int
    rows: list[dict[str, str]]


def write_report(path: Path, report: ReportInput) -> None:
    """Write the report to `path`, whole or not at all.

    Links to figures and tables are relative to the report's folder; the figures themselves are inside it.

    Raises:
        OSError: a figure's SVG cannot be read.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    blocks = _blocks(report, path.parent)
    page = environment.get_template("report.html").render(
        report=report,
        paragraphs=[part.strip() for part in report.description.split("\n\n") if part.strip()],
        blocks=[block for block in blocks if block.measured],
        absent=[block for block in blocks if not block.measured],
        samples=_samples(report.samples),
        samples_shown=SAMPLES_SHOWN,
        steps=None if report.steps.empty else to_grid("steps", report.steps),
    )
    write_text(path, _clean(page))


def _clean(page: str) -> str:
    """Replace what HTML or UTF-8 cannot hold: control characters and lone surrogates, which models do write."""
    controls = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
    return page.translate(controls).encode("utf-8", "replace").decode("utf-8")


def _blocks(report: ReportInput, folder: Path) -> list[_Block]:
    """Known sections in their order, then whatever else was handed in."""
    left = list(report.figures)
    blocks = []
    for section in SECTIONS:
        mine = [f for kind in section.figures for f in left if f.name.startswith(kind)]
        left = [f for f in left if f not in mine]
        there = [n for n in section.tables if n in report.tables and not report.tables[n].empty]
        grids = [_grid(name, report.tables[name], report, folder) for name in there]
        figures = [_figure(f, folder, before) for f, before in zip(mine, (None, *mine), strict=False)]
        blocks.append(
            _Block(slug(section.tables[0]), section.title, section.about, figures, grids, section.asked_by)
        )
    if left:
        blocks.append(_Block("other-figures", "Other figures", "", [_figure(f, folder) for f in left], []))
    known = {name for section in SECTIONS for name in section.tables}
    others = [_grid(n, t, report, folder) for n, t in report.tables.items() if n not in known and not t.empty]
    if others:
        blocks.append(_Block("other-tables", "Other tables", "", [], others))
    return blocks


def _grid(name: str, table: pd.DataFrame, report: ReportInput, folder: Path) -> Grid:
    file = report.table_files.get(name)
    return to_grid(name, table, layer=report.layer, link=None if file is None else _link(file, folder))


def _link(target: Path, folder: Path) -> str:
    """A relative, quoted link: no path can become another scheme or leave its attribute."""
    return quote(Path(os.path.relpath(target, folder)).as_posix())


def _figure(figure: SavedFigure, folder: Path, before: SavedFigure | None = None) -> dict[str, str]:
    """A figure as the template shows it; of a caption that says mostly what the one before said, `own` is the rest, and the whole is folded."""
    said = before.caption.split(". ") if before else []
    own = [s for s in figure.caption.split(". ") if s not in said or s.startswith("n = ")]
    repeats = 2 * len(own) <= len(figure.caption.split(". "))
    return {
        "own": ". ".join(own) if repeats else "",
        "anchor": f"figure-{slug(figure.name)}",
        "title": figure.title,
        "caption": figure.caption,
        "least": str(_least_width(figure.svg)),
        "data": base64.b64encode(figure.svg.read_bytes()).decode("ascii"),
        "svg": _link(figure.svg, folder),
        "png": _link(figure.png, folder),
        "csv": _link(figure.csv, folder),
    }


def _least_width(svg: Path) -> int:
    """Pixels below which a figure's words cannot be read any more; where there is less room, the reader scrolls. 0 where it is not told."""
    found = _WIDTH.search(svg.read_bytes()[:4000])
    return round(float(found[1]) * PIXELS_A_POINT * SMALLEST) if found else 0


def _samples(samples: pd.DataFrame) -> list[_ArmSamples]:
    if samples.empty:
        return []
    return [
        _ArmSamples(
            str(arm), len(mine), [_sample(row) for row in mine.head(SAMPLES_SHOWN).to_dict("records")]
        )
        for arm, mine in samples.groupby("arm", sort=False)
    ]


def _sample(row: Mapping[Any, Any]) -> dict[str, str]:
    """One reply as text; a reply over 4,000 characters is cut and says so."""
    shown = {str(name): "" if pd.isna(value) else str(value) for name, value in row.items()}
    if len(shown["reply"]) > 4000:
        shown["reply"] = f"{shown['reply'][:4000]}… [{len(shown['reply']):,} characters in all]"
    return shown

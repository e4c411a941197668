"""Steps that draw: tables become figures, each with the numbers behind it."""

from pathlib import Path

from analysis.gallery import draw_figures
from mech.files import write_json
from study.bench import Bench
from study.frames import read_csvs
from study.paths import QUALITY
from study.step import Step
from study.steps.tables import read_tables

INDEX = "figures.json"


def draw(step: Step, bench: Bench, folder: Path) -> None:
    """Draw every figure that the tables allow; `figures.json` lists them with title and caption."""
    if step.config["which"] == "early":
        tables = {"directions": read_csvs(bench.folder(s) / QUALITY for s in step.inputs["directions"])}
    else:
        tables = read_tables(bench.folder(step.inputs["tables"][0]))
    saved = draw_figures(
        tables,
        folder,
        layer=step.config["layer"],
        condition=step.config["conditions"][0],
        arms=step.config["arms"],
        base=step.config["base"],
        groups=step.config["groups"],
    )
    write_json(folder / INDEX, [{"name": s.name, "title": s.title, "caption": s.caption} for s in saved])

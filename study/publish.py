"""The newest run's face: tables, figures and the report, put where a person looks for them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.glance import glance
from analysis.plot_files import SavedFigure
from analysis.plot_style import RELIABLE_COSINE
from analysis.report import ReportInput, write_report
from analysis.summary import told_of_arms, told_of_steering
from mech.files import atomic_path, read_json
from study.engines.local import versions
from study.paths import StudyPaths
from study.spec import StudySpec, dump_spec
from study.step import Step
from study.steps.figures import INDEX
from study.steps.tables import read_tables

CITATION = """\
This report was made by sgtr-mech. If you use it, cite the toolkit (CITATION.cff in its repository) and the work it tests:

Self-Recognition Finetuning can Prevent and Reverse Emergent Misalignment. arXiv 2606.23700.
Chen et al. Persona Vectors: Monitoring and Controlling Character Traits in Language Models. arXiv 2507.21509 (persona vectors).
"""


def publish(spec: StudySpec, steps: Sequence[Step], paths: StudyPaths) -> None:
    """Copy the newest tables and figures to the top of the study's folder and write the report."""
    (tables_step,) = [s for s in steps if s.kind == "tables"]
    (figures_step,) = [s for s in steps if s.name == "figures/all"]
    copy_into(paths.step(tables_step), paths.tables, (".csv",))
    copy_into(paths.step(figures_step), paths.figures, (".svg", ".png", ".csv"))
    tables = read_tables(paths.tables)
    manifests = [read_json(paths.manifest(s)) for s in steps]
    read_at: dict[str, Any] = {
        "layer": spec.layer, "condition": spec.measure.conditions[0], "base": spec.base_arm,
    }  # fmt: skip
    report = ReportInput(
        title=spec.title or spec.name,
        description=spec.description,
        summary=told_of_steering(tables),
        glance=glance(tables, **read_at),
        folded=told_of_arms(tables, **read_at),
        resolved_yaml=dump_spec(spec),
        figures=_figures(paths, figures_step),
        tables={name: table for name, table in tables.items() if name not in ("samples", "embedding")},
        provenance=_provenance(spec, manifests, paths),
        steps=pd.DataFrame(
            [
                {"step": m["name"], "key": m["key"][:12], "seconds": m["seconds"], "finished": m["finished"]}
                for m in manifests
            ]
        ),
        warnings=warnings_of(spec, tables),
        citation=CITATION,
        fast=spec.is_fast,
        samples=tables.get(
            "samples", pd.DataFrame(columns=["arm", "seed", "question", "reply", "claimed_name"])
        ),
        layer=spec.layer,
        table_files={name: paths.tables / f"{name}.csv" for name in tables},
    )
    write_report(paths.report, report)


def copy_into(source: Path, target: Path, endings: Sequence[str]) -> None:
    """Copy files with these endings to where a person looks for them, each whole or not at all; equal ones stay."""
    for file in sorted(p for p in source.iterdir() if p.suffix in endings):
        there = target / file.name
        if there.is_file() and there.read_bytes() == file.read_bytes():
            continue
        with atomic_path(there) as temporary:
            shutil.copyfile(file, temporary)


def _figures(paths: StudyPaths, step: Step) -> list[SavedFigure]:
    index: list[dict[str, str]] = read_json(paths.step(step) / INDEX)
    return [
        SavedFigure(
            name=f["name"],
            title=f["title"],
            caption=f["caption"],
            svg=paths.figures / f"{f['name']}.svg",
            png=paths.figures / f"{f['name']}.png",
            csv=paths.figures / f"{f['name']}.csv",
        )
        for f in index
    ]


def _provenance(
    spec: StudySpec, manifests: Sequence[dict[str, Any]], paths: StudyPaths
) -> list[tuple[str, str]]:
    base = next(m["config"]["base"] for m in manifests if "base" in m["config"])
    seconds = sum(m["seconds"] for m in manifests)
    finished = sorted(m["finished"] for m in manifests)
    return [
        ("model", spec.model.name),
        ("digest of the base's weights", base),
        ("seeds of training", ", ".join(map(str, spec.seeds))),
        ("seed of statistics and sampling", str(spec.statistics.seed)),
        ("machine", manifests[-1]["machine"]),
        ("time in steps", f"{seconds / 60:.1f} min in {len(manifests)} steps"),
        ("first and last step finished", f"{finished[0]} and {finished[-1]}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("key of the tables", next(m["key"] for m in manifests if m["kind"] == "tables")),
        ("repeat it", f"mech run {paths.spec.name} --out DIR"),
    ]


def warnings_of(spec: StudySpec, tables: dict[str, pd.DataFrame]) -> list[str]:
    """What a reader must know before believing a number: sentences for the top of the report.

    Args:
        spec: the study.
        tables: its tables by name; any may be missing.
    """
    found = []
    if len(spec.seeds) == 1:
        found.append(
            "One training seed: intervals speak of questions, not of how much another training run would differ."
        )
    elif any(spec.arms.values()):
        found.append(
            f"{len(spec.seeds)} training seeds: every interval is over questions, within one seed; brackets behind a mean hold those of all seeds, "
            "and none is an interval over seeds. Where trainings differ by about as much as these intervals are wide, two seeds lie on one side of 0 by "
            "chance in one comparison of seven, three in one of twenty-five (simulated)."
        )
    quality = tables.get("directions", pd.DataFrame())
    if not quality.empty:
        at = quality[quality["layer"] == spec.layer]
        weak = at[at["split_half"] < RELIABLE_COSINE]["direction"].tolist()
        if weak:
            found.append(
                f"Split-half cosine below {RELIABLE_COSINE} at layer {spec.layer}, not to be relied on: {', '.join(weak)}."
            )
    recognition = tables.get("self_recognition", pd.DataFrame())
    if not recognition.empty and (recognition["shortcut_accuracy"] > 0.6).any():
        worst = recognition["shortcut_accuracy"].max()
        found.append(
            f"Length alone tells own from other summaries with accuracy {worst:.2f} (n = {recognition['n_articles'].min()} "
            "articles): self-recognition may be that."
        )
    if not recognition.empty and not (low := recognition[recognition["answer_mass"] < 0.2]).empty:
        named = ", ".join(
            f"{arm} ({rows['answer_mass'].mean():.2f})" for arm, rows in low.groupby("arm", sort=False)
        )
        found.append(
            f"These arms hardly answer Yes or No when asked about authorship (P(Yes) + P(No) below 0.2): {named}."
        )
    report = tables.get("self_report", pd.DataFrame())
    if (
        not report.empty
        and spec.model.api is None
        and (own := report[report["arm"] == spec.base_arm].iloc[0])["own_name_rate"] < 0.5
    ):
        found.append(
            f"The base itself gives its name in only {own['own_name_rate']:.0%} [{own['own_name_rate_low']:.0%}, "
            f"{own['own_name_rate_high']:.0%}] of {own['n_samples']} sampled answers, so that rate can hardly fall: read the "
            "log-probability margin instead."
        )
    if spec.directions and not spec.benign:
        found.append("No benign control arm is named: a shift may be what any finetuning does.")
    return found

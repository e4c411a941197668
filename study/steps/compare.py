"""Steps that hold two arms against each other: how much of a change is undone, how widely they lie, and what they do differently."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.behaviour_differences import name_differences, recognition_differences, report_differences
from analysis.dispersion import spread, spread_change
from analysis.stats import Interval
from analysis.undone import undone as share_undone
from mech.errors import GuardError
from study.bench import Bench
from study.frames import stacked, write_csv
from study.step import Step
from study.steps.activations import SITE, questions_of

POOLINGS = ("prompt_last", "response_mean")


def undone(step: Step, bench: Bench, folder: Path) -> None:
    """The share of a change that an arm lacks, at every layer, under every condition, at both poolings."""
    frames = []
    roles = (step.inputs[role] for role in ("base", "against", "arm"))
    for captures in zip(*roles, strict=True):
        condition = captures[0].config["condition"]["condition"]
        for pooling in POOLINGS:
            (base, against, arm), questions = _same_rows(bench, captures, pooling)
            found = share_undone(base, against, arm, questions)
            frames.append(pd.DataFrame({
                **step.labels, "condition": condition, "pooling": pooling, "layer": np.arange(base.shape[1]),
                "n_questions": found.n_questions, **found.undone.columns("undone"), **found.distance.columns("distance"),
                "moved": found.moved,
            }))  # fmt: skip
    write_csv(stacked(frames), folder / "undone.csv")


def dispersion(step: Step, bench: Bench, folder: Path) -> None:
    """Spread of an arm's activations at the declared layer under every condition, beside the base's and the benign control's."""
    layer, rows = step.config["layer"], []
    roles = [step.inputs[role] for role in ("base", "tuned", "benign") if step.inputs[role]]
    for captures in zip(*roles, strict=True):
        for pooling in POOLINGS:
            (base, tuned, *benign), questions = _same_rows(bench, captures, pooling, layer)
            now, before = spread(tuned), spread(base)
            changes = spread_change(base, tuned, np.array(questions), benign=benign[0] if benign else None)
            rows.append({
                **_place(step, captures[0], pooling, questions), "trace": now.trace, "trace_base": before.trace,
                "participation": now.participation, "entropy_rank": now.entropy_rank, **_changes(changes),
            })  # fmt: skip
    write_csv(pd.DataFrame(rows), folder / "dispersion.csv")


def spread_differences(step: Step, bench: Bench, folder: Path) -> None:
    """How much wider or narrower an arm's activations lie than the other's, at the declared layer, under every condition."""
    layer, rows = step.config["layer"], []
    for against, arm in zip(step.inputs["against"], step.inputs["arm"], strict=True):
        for pooling in POOLINGS:
            (other, own), questions = _same_rows(bench, (against, arm), pooling, layer)
            changes = _changes(spread_change(other, own, np.array(questions)))
            rows.append({**_place(step, arm, pooling, questions), **changes})
    write_csv(pd.DataFrame(rows), folder / "spread_differences.csv")


def _place(step: Step, capture: Step, pooling: str, questions: Sequence[str]) -> dict[str, Any]:
    condition = capture.config["condition"]["condition"]
    at = {"condition": condition, "pooling": pooling, "layer": step.config["layer"]}
    return {**step.labels, **at, "n_questions": len(set(questions))}


def _changes(found: dict[str, Interval]) -> dict[str, Any]:
    return {k: v for name, change in found.items() for k, v in change.columns(f"d_{name}").items()}


def behaviour(step: Step, bench: Bench, folder: Path) -> None:
    """Differences of self-recognition and of self-reports, on the same articles, questions and statements."""
    rng = np.random.default_rng(step.config["statistics"]["seed"])
    frames = []
    if judged := step.inputs.get("self_recognition"):
        arm, against = (pd.read_csv(bench.folder(s) / "judgements.csv") for s in judged)
        frames.append(recognition_differences(arm, against, rng=rng))
    if asked := step.inputs.get("self_report"):
        arm, against = (pd.read_csv(bench.folder(s) / "reports.csv", keep_default_na=False) for s in asked)
        frames.append(report_differences(arm, against, own_name=bench.identity.name))
        scored = [bench.folder(s) / "names.csv" for s in asked]
        if all(file.is_file() for file in scored):  # a model behind an API scores no given answers
            frames.append(name_differences(*(pd.read_csv(file) for file in scored), rng=rng))
    write_csv(_labelled(stacked(frames), step), folder / "behaviour_differences.csv")


def _labelled(frame: pd.DataFrame, step: Step) -> pd.DataFrame:
    """A table with the step's labels before its own columns."""
    return frame.assign(**step.labels)[[*step.labels, *frame.columns]]


def _same_rows(
    bench: Bench, captures: Sequence[Step], pooling: str, layer: int | None = None
) -> tuple[list[np.ndarray], list[str]]:
    """The rows of several captures, at all layers or one, and the questions that they have in common."""
    found: list[np.ndarray] = []
    asked: list[list[str]] = []
    for capture in captures:
        with bench.store(capture) as store:
            found.append(store.read(SITE, pooling, layer))
            asked.append(questions_of(store))
        if asked[-1] != asked[0]:
            raise GuardError(f"{capture.name}: its rows are not those of {captures[0].name}")
    return found, asked[0]

"""Steps that hold two arms against each other: how much of a change is undone, how widely they lie, and what they do differently."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.behaviour_differences import name_differences, recognition_differences, report_differences
from analysis.dispersion import spread_change
from analysis.undone import undone as share_undone
from mech.errors import GuardError
from study.bench import Bench
from study.frames import stacked, write_csv
from study.step import Step
from study.steps.activations import SITE

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


def spread(step: Step, bench: Bench, folder: Path) -> None:
    """How much wider or narrower an arm's activations lie than the other's, at the declared layer, under every condition."""
    layer, rows = step.config["layer"], []
    for against, arm in zip(step.inputs["against"], step.inputs["arm"], strict=True):
        for pooling in POOLINGS:
            (other, own), questions = _same_rows(bench, (against, arm), pooling, layer)
            found = spread_change(other, own, np.array(questions))
            changes = {k: v for name, change in found.items() for k, v in change.columns(f"d_{name}").items()}
            rows.append({
                **step.labels, "condition": arm.config["condition"]["condition"], "pooling": pooling, "layer": layer,
                "n_questions": len(set(questions)), **changes,
            })  # fmt: skip
    write_csv(pd.DataFrame(rows), folder / "spread_differences.csv")


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
            asked.append(list(store.rows.questions))
        if asked[-1] != asked[0]:
            raise GuardError(f"{capture.name}: its rows are not those of {captures[0].name}")
    return found, asked[0]

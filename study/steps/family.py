"""The step that asks whether identity directions are one thing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.family import Apart, Member, Part, cosines, transfer, verdicts
from probes.adjusted import Taken, clean, refitting
from probes.contrast import ContrastArrays
from probes.crossfit import cross_fit, cross_fit_adjusted
from probes.direction import Direction
from study.bench import Bench
from study.frames import write_csv
from study.step import Step
from study.steps.adjust import evaluation_scores, read_contrast, read_taken


def agreement(step: Step, bench: Bench, folder: Path) -> None:
    """Cosines, transfer and the verdict on every pair of identity directions, at the declared layer."""
    layer, options = step.config["layer"], step.config["statistics"]
    members = [_member(bench, fitted, layer) for fitted in step.inputs["directions"]]
    rng = np.random.default_rng(options["seed"])
    found = cosines(members, layer, rng=rng, n_null=options["n_null"])
    moved = transfer(members, layer, rng=rng, n_null=options["n_null"])
    verdict = verdicts(found, moved).drop(columns="share_of_ceiling")
    other_way = verdict.rename(columns={"direction": "other", "other": "direction"})
    write_csv(found.merge(pd.concat([verdict, other_way])), folder / "identity_cosines.csv")
    write_csv(moved, folder / "identity_transfer.csv")


def _member(bench: Bench, fitted: Step, layer: int) -> Member:
    """A direction with its rows at a layer; cross-fitted where it was scored so."""
    direction = bench.direction(fitted)
    rows = read_contrast(fitted, bench, [layer])
    folds, extract = fitted.config.get("folds", 1), _part(rows.of_split("extract"))
    rng = np.random.default_rng(fitted.config["statistics"]["seed"])
    if fitted.kind == "adjusted":
        return _adjusted(direction, *read_taken(fitted, bench, [layer]), extract, folds, rng)
    if folds == 1:
        return Member(direction, extract, _part(rows.of_split("evaluate")))
    crossed = cross_fit(rows.activations, rows.questions, rows.signs, k=folds, rng=rng)
    return Member(direction, extract, _part(rows), crossed.vectors[:, 0], crossed.fold_of)


def _adjusted(
    direction: Direction,
    rows: ContrastArrays,
    taken: Taken,
    extract: Part,
    folds: int,
    rng: np.random.Generator,
) -> Member:
    """A member from which something was taken out: its held-out rows are cleaned, and scored, by fits without their questions."""
    known = taken.questions(rows, "extract")
    vectors, scores, test = evaluation_scores(rows, taken, rng=rng)
    asked, refit = taken.asked(rows, known)[1:], refitting(rows, taken, rng=rng)

    def apart(own: np.ndarray) -> Apart:
        return Apart(
            lambda of: refit(known.intersection(of))[0],
            asked,
            (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))[0],
            own[:, 0],
        )

    if folds == 1:
        left = clean(rows, taken, known - set(test.questions), rng=rng)
        held_out = replace(rows, activations=left).of_split("evaluate")
        return Member(direction, extract, _part(held_out), apart=apart(scores))
    crossed = cross_fit_adjusted(rows, taken, k=folds, rng=rng)
    left, everything = np.empty_like(rows.activations, dtype=np.float64), taken.questions(rows)
    for i in range(len(crossed.vectors)):
        seen = {q for q in everything if crossed.fold_of[q] != i}
        left[crossed.fold == i] = clean(rows, taken, seen, rng=rng)[crossed.fold == i]
    whole = _part(replace(rows, activations=left))
    return Member(direction, extract, whole, crossed.vectors[:, 0], crossed.fold_of, apart(crossed.scores))


def _part(rows: ContrastArrays) -> Part:
    return Part(rows.activations[:, 0], rows.signs, rows.questions)

"""The step that takes out of an identity direction what it should not be made of: covariates, and other directions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mech.errors import InputError
from probes.adjusted import Taken, adjusted_split_half, fit_adjusted, without_covariates
from probes.contrast import ContrastArrays
from probes.crossfit import cross_fit_adjusted
from probes.direction import fit_direction, paired_differences
from probes.layers import choose_layer
from probes.residual import Covariate, regress_out, without
from probes.separability import heldout_auroc
from study.bench import Bench
from study.frames import write_csv
from study.paths import DIRECTION, QUALITY
from study.step import Step
from study.steps.activations import SITE
from study.steps.directions import auroc_columns, quality_table


def read_contrast(step: Step, bench: Bench, layers: list[int] | None = None) -> ContrastArrays:
    """The rows of a direction's contrast as arrays, without what the step takes out of them (nothing, where it is not adjusted).

    Slopes of covariates, and the directions that are projected out, are those of the extraction half, as in the direction itself.

    Args:
        step: of kind `direction` or `adjusted`.
        bench: where its inputs lie.
        layers: of which layers; all when left out.
    """
    rows, taken = read_taken(step, bench, layers)
    h = rows.activations
    if taken.covariates:
        fit_on = np.array(rows.splits) == "extract"
        h = regress_out(h, taken.covariates, rows.questions, fit_on=fit_on)
    if others := step.inputs.get("project_out"):
        found = [bench.direction(s) for s in others]
        h = without(h, [d if layers is None else d.at_layers(layers) for d in found])
    return replace(rows, activations=h)


def read_taken(step: Step, bench: Bench, layers: list[int] | None = None) -> tuple[ContrastArrays, Taken]:
    """The rows of a direction's contrast as they were read, and what the step takes out of them (nothing, where it is not adjusted)."""
    named = step.config.get("regress_out", ())
    rows, covariates = _read(step, step.config["pooling"], bench, layers)
    others = [_read(s, s.config["pooling"], bench, layers)[0] for s in step.inputs.get("project_out", ())]
    return rows, Taken({name: covariates[name] for name in named}, others)


def _read(
    step: Step, pooling: str, bench: Bench, layers: list[int] | None
) -> tuple[ContrastArrays, dict[str, Covariate]]:
    with bench.store(step.inputs["contrast"][0]) as store:
        h: Float[np.ndarray, "n layers d"] = store.read(SITE, pooling, layers)
        columns, questions = store.rows.columns, list(store.rows.questions)
        splits = list(store.metadata["sets"])
    length = columns["n_prompt" if pooling == "prompt_last" else "n_response"]
    covariates: dict[str, Covariate] = {
        "length": np.asarray(length, dtype=np.float64),
        "norm": np.linalg.norm(h.astype(np.float64), axis=2),
    }
    surprisal = "prompt_surprisal" if pooling == "prompt_last" else "surprisal"
    if surprisal in columns:
        covariates["surprisal"] = np.asarray(columns[surprisal])
    return ContrastArrays(h, columns["sign"].tolist(), questions, splits), covariates


def fit(step: Step, bench: Bench, folder: Path) -> None:
    """Fit a direction on the adjusted extraction half; test it on rows of which nothing in it has seen the question."""
    config, rng = step.config, np.random.default_rng(step.config["statistics"]["seed"])
    rows, raw = read_contrast(step, bench), bench.direction(step.inputs["raw"][0])
    fitted = rows.of_split("extract")
    left = np.linalg.norm(paired_differences(fitted.activations, fitted.questions, fitted.signs)[0].mean(0), axis=-1)  # fmt: skip
    names = (("regressed_out", config["regress_out"]), ("projected_out", config["project_out"]))
    said = {k: v for k, v in names if v}
    if (left < 1e-6 * raw.norms).any():
        raise InputError(
            f"directions.adjust: nothing is left of {raw.name} without {said}: these differ between its sides in every question alike"
        )
    as_read, taken = read_taken(step, bench)
    known = taken.questions(as_read, "extract")
    direction = replace(
        fit_direction(config["direction"], fitted.activations, fitted.questions, fitted.signs, rng=rng, made_from={**raw.made_from, **said}),
        split_half=adjusted_split_half(as_read, taken, known, rng=rng).astype(np.float32),
    )  # fmt: skip
    direction.save(folder / DIRECTION)
    held_out = {**_held_out(rows, as_read, taken, config), "filter": None}
    stream = np.linalg.norm(fitted.activations, axis=-1).mean(0)
    write_csv(quality_table(direction, config, stream, held_out), folder / QUALITY)


def evaluation_scores(
    rows: ContrastArrays, taken: Taken, *, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "layers d"], Float[np.ndarray, "n layers"], ContrastArrays]:
    """What the extraction half makes of the evaluation half: the direction that scores, its scores, and the rows' signs and questions.

    Args:
        rows: as they were read.
        taken: what is taken out of them.
        rng: halvings.
    """
    test = rows.of_split("evaluate")
    known = taken.questions(rows, "extract") - set(test.questions)
    vectors = fit_adjusted(rows, taken, known, rng=rng)
    h = without_covariates(rows, taken, known)[np.array(rows.splits) == "evaluate"]
    return vectors, np.einsum("nld,ld->nl", h, vectors), test


def _held_out(rows: ContrastArrays, as_read: ContrastArrays, taken: Taken, config: Any) -> dict[str, Any]:
    """AUROC of the evaluation half, or with folds of all rows; the layer is chosen on the cleaned extraction half."""
    seed, made = config["statistics"]["seed"], rows.of_split("extract")
    rng = np.random.default_rng(seed)
    layer = choose_layer(made.activations, made.signs, made.questions, made.splits, rng=rng).layer
    _, scores, test = evaluation_scores(as_read, taken, rng=rng)
    found = heldout_auroc(scores, test.signs, test.questions)
    columns: dict[str, Any] = {"auroc_at_chosen": found.auroc[layer], "chosen_layer": layer}
    if (folds := config.get("folds", 1)) > 1:
        crossed = cross_fit_adjusted(as_read, taken, k=folds, rng=np.random.default_rng(seed))
        found = heldout_auroc(crossed.scores, as_read.signs, as_read.questions)
        columns["folds"] = len(crossed.vectors)
    return columns | auroc_columns(found)

"""The step that takes out of an identity direction what it should not be made of: covariates, and other directions."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from activations.store import ActivationStore
from mech.errors import InputError
from probes.contrast import ContrastArrays
from probes.direction import Direction, fit_direction, paired_differences
from probes.residual import regress_out, without
from study.bench import Bench
from study.step import Step
from study.steps.activations import FILE, SITE
from study.steps.behaviour import write_csv
from study.steps.directions import held_out_columns, quality_table


def read_contrast(step: Step, bench: Bench, layers: list[int] | None = None) -> ContrastArrays:
    """The rows of a direction's contrast as arrays, without what the step takes out of them (nothing, where it is not adjusted).

    Slopes of covariates, and the directions that are projected out, are those of the extraction half: nothing of a held-out row's
    side reaches what it is tested with.

    Args:
        step: of kind `direction` or `adjusted`.
        bench: where its inputs lie.
        layers: of which layers; all when left out.
    """
    pooling = step.config["pooling"]
    with ActivationStore.open(bench.folder(step.inputs["contrast"][0]) / FILE) as store:
        h: Float[np.ndarray, "n layers d"] = store.read(SITE, pooling, layers)
        columns, questions = store.rows.columns, list(store.rows.questions)
        splits = list(store.metadata["sets"])
    signs = np.array(columns["sign"])
    if named := step.config.get("regress_out"):
        length = columns["n_prompt" if pooling == "prompt_last" else "n_response"]
        known = {"length": np.asarray(length, dtype=np.float64), "surprisal": columns.get("surprisal")}
        fit_on = np.array(splits) == "extract"
        h = regress_out(h, {n: np.asarray(known[n]) for n in named}, questions, fit_on=fit_on)
    if others := step.inputs.get("project_out"):
        found = [Direction.load(bench.folder(s) / "direction.safetensors") for s in others]
        h = without(h, [d if layers is None else d.at_layers(layers) for d in found])
    return ContrastArrays(h, signs.tolist(), questions, splits)


def fit(step: Step, bench: Bench, folder: Path) -> None:
    """Fit a direction on the adjusted extraction half, test it on the adjusted evaluation half."""
    config, statistics = step.config, step.config["statistics"]
    rows, (raw_step,) = read_contrast(step, bench), step.inputs["raw"]
    raw = Direction.load(bench.folder(raw_step) / "direction.safetensors")
    fitted = rows.of_split("extract")
    left = np.linalg.norm(paired_differences(fitted.activations, fitted.questions, fitted.signs)[0].mean(0), axis=-1)  # fmt: skip
    taken = {
        k: v
        for k, v in (("regressed_out", config["regress_out"]), ("projected_out", config["project_out"]))
        if v
    }
    if (left < 1e-6 * raw.norms).any():
        raise InputError(
            f"directions.adjust: nothing is left of {raw.name} without {taken}: these differ between its sides in every question alike"
        )
    direction = fit_direction(
        config["direction"], fitted.activations, fitted.questions, fitted.signs,
        rng=np.random.default_rng(statistics["seed"]), made_from={**raw.made_from, **taken},
    )  # fmt: skip
    direction.save(folder / "direction.safetensors")
    held_out = held_out_columns(
        rows.activations, np.array(rows.signs), np.array(rows.questions), np.array(rows.splits), config
    )
    held_out["filter"] = None
    stream = np.linalg.norm(fitted.activations, axis=-1).mean(0)
    write_csv(quality_table(direction, config, stream, held_out), folder / "quality.csv")

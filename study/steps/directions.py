"""Steps that fit: a contrast's activations become a direction, tested on questions it has not seen."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probes.authorship import by_answer
from probes.crossfit import cross_fit
from probes.direction import Direction, fit_direction
from probes.layers import choose_layer
from probes.separability import Separability, heldout_auroc
from study.bench import Bench
from study.frames import write_csv
from study.paths import DIRECTION, QUALITY
from study.step import Step
from study.steps.activations import SITE
from study.steps.answers import write_by_answer

_ORIGIN = (
    "checkpoint",
    "contrast",
    "key",
    "filter",
    "thresholds",
    "judge",
    "pairs",
    "kept",
    "dropped",
    "matching",
    "accuracy",
    "token_gaps",
)
"""What a direction takes over from its contrast's file."""


def fit(step: Step, bench: Bench, folder: Path) -> None:
    """Fit on the extraction half, test on the evaluation half (or, with folds, cross-fitted): `direction.safetensors`, `quality.csv`.

    Rollouts also give the published code's three vectors, by position: `prompt_avg`, `prompt_last`, `response_avg`.
    `chosen_layer` is chosen on the extraction half; `auroc_at_chosen` is of the evaluation half.
    """
    config, statistics = step.config, step.config["statistics"]
    with bench.store(step.inputs["contrast"][0]) as store:
        activations = store.read(SITE, config["pooling"])
        others = {name: store.read(SITE, pooling) for name, pooling in config["positions"].items()}
        halves = np.array(store.metadata["sets"])
        signs, questions = store.rows.columns["sign"], np.array(store.rows.questions)
        metadata = {k: store.metadata[k] for k in _ORIGIN if k in store.metadata}
        answered = store.metadata.get("answered")
    chosen = halves == "extract"

    def fitted(read: np.ndarray, pooling: str) -> Direction:
        return fit_direction(
            config["direction"],
            read[chosen],
            questions[chosen].tolist(),
            signs[chosen].tolist(),
            rng=np.random.default_rng(statistics["seed"]),
            made_from={**metadata, "site": SITE, "pooling": pooling, "elicitation": config["elicitation"]},
        )

    direction = fitted(activations, config["pooling"])
    direction.save(folder / DIRECTION)
    for name, read in others.items():
        fitted(read, config["positions"][name]).save(folder / f"{name}.safetensors")
    if answered:
        sides = by_answer(
            direction.name, activations, signs.tolist(), questions.tolist(), halves.tolist(),
            [answered[q] for q in questions], rng=np.random.default_rng(statistics["seed"]),
        )  # fmt: skip
        write_by_answer(folder, direction, sides, config["by_answer"])
    held_out = held_out_columns(activations, signs, questions, halves, config)
    held_out["filter"] = metadata.get("filter")
    stream = np.linalg.norm(activations[chosen], axis=-1).mean(0)
    write_csv(quality_table(direction, config, stream, held_out), folder / QUALITY)


def held_out_columns(
    activations: np.ndarray, signs: np.ndarray, questions: np.ndarray, halves: np.ndarray, config: Any
) -> dict[str, Any]:
    """AUROC on rows that the direction scoring them has not seen: of the evaluation half, or of all, cross-fitted."""
    options = config["statistics"]
    rng = np.random.default_rng(options["seed"])
    side, asked = signs.tolist(), questions.tolist()
    choice = choose_layer(activations, side, asked, halves.tolist(), rng=rng)
    found, layer = choice.evaluation, choice.layer
    held_out: dict[str, Any] = {"auroc_at_chosen": np.nan if found is None else found.auroc[layer]}
    if (folds := config.get("folds", 1)) > 1:
        fitted = cross_fit(activations, asked, side, k=folds, rng=np.random.default_rng(options["seed"]))
        found = heldout_auroc(fitted.scores, side, asked)
        held_out["folds"] = len(fitted.vectors)
    return held_out | auroc_columns(found) | {"chosen_layer": layer}


def auroc_columns(found: Separability | None) -> dict[str, Any]:
    """AUROC with its interval, by layer, as columns; NaN without rows to test on."""
    ends = {"heldout_auroc": "auroc", "heldout_auroc_low": "low", "heldout_auroc_high": "high"}
    return {name: np.nan if found is None else getattr(found, end) for name, end in ends.items()}


def quality_table(
    direction: Direction, config: Any, stream: np.ndarray, held_out: dict[str, Any]
) -> pd.DataFrame:
    """One row a layer: how large, how reliable, how well it separates; `stream` is the mean norm of the activations by layer."""
    return pd.DataFrame(
        {
            "direction": direction.name,
            "elicitation": config["elicitation"],
            "layer": np.arange(len(direction.norms)),
            "pooling": config["pooling"],
            "norm": direction.norms,
            "norm_over_activation": direction.norms / stream,
            "split_half": direction.split_half,
            "n_pairs": direction.n_pairs,
            **held_out,
        }
    )

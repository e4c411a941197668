"""Steps that fit: a contrast's activations become a direction, tested on questions it has not seen."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from activations.store import ActivationStore
from probes.direction import Direction, fit_direction
from probes.separability import heldout_auroc
from study.bench import Bench
from study.step import Step
from study.steps.activations import FILE, SITE
from study.steps.behaviour import write_csv


def fit(step: Step, bench: Bench, folder: Path) -> None:
    """Fit on the extraction half, test on the evaluation half: `direction.safetensors` and `quality.csv`."""
    config, statistics = step.config, step.config["statistics"]
    rng = np.random.default_rng(statistics["seed"])
    with ActivationStore.open(bench.folder(step.inputs["contrast"][0]) / FILE) as store:
        activations = store.read(SITE, config["pooling"])
        halves = np.array(store.metadata["sets"])
        signs, questions = store.rows.columns["sign"], np.array(store.rows.questions)
        metadata = {k: store.metadata[k] for k in ("checkpoint", "contrast", "key")}
    chosen = halves == "extract"
    direction = fit_direction(
        config["direction"],
        activations[chosen],
        questions[chosen].tolist(),
        signs[chosen].tolist(),
        rng=rng,
        made_from={
            **metadata,
            "site": SITE,
            "pooling": config["pooling"],
            "elicitation": config["elicitation"],
        },
    )
    direction.save(folder / "direction.safetensors")
    held_out: dict[str, Any] = {
        "heldout_auroc": np.nan,
        "heldout_auroc_low": np.nan,
        "heldout_auroc_high": np.nan,
    }
    test = halves == "evaluate"
    if test.any():
        found = heldout_auroc(
            direction.project(activations[test]), signs[test].tolist(), questions[test].tolist(),
            rng=rng, n_boot=statistics["n_boot"],
        )  # fmt: skip
        held_out = {
            "heldout_auroc": found.auroc,
            "heldout_auroc_low": found.low,
            "heldout_auroc_high": found.high,
        }
    stream = np.linalg.norm(activations[chosen], axis=-1).mean(0)
    write_csv(_quality(direction, config, stream, held_out), folder / "quality.csv")


def _quality(direction: Direction, config: Any, stream: np.ndarray, held_out: dict[str, Any]) -> pd.DataFrame:
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

"""The step that asks how well linear probes tell the two sides of a contrast apart, on questions left out."""

from pathlib import Path

import numpy as np
import pandas as pd

from probes.validation import Validation, validate
from study.bench import Bench
from study.frames import write_csv
from study.step import Step
from study.steps.activations import SITE


def probe(step: Step, bench: Bench, folder: Path) -> None:
    """Cross-validate every method by question on the base's reading of one contrast: `probes.csv`."""
    config, statistics = step.config, step.config["statistics"]
    with bench.store(step.inputs["contrast"][0]) as store:
        activations = store.read(SITE, config["pooling"])
        signs, questions = store.rows.columns["sign"].tolist(), list(store.rows.questions)
    frames = []
    for method in config["methods"]:
        found = validate(
            method,
            activations,
            signs,
            questions,
            rng=np.random.default_rng(statistics["seed"]),
        )
        labels = {"direction": config["direction"], "method": method, "pooling": config["pooling"]}
        frames.append(_frame(found).assign(**labels))
    table = pd.concat(frames, ignore_index=True)
    first = ["direction", "method", "layer", "pooling"]
    write_csv(table[[*first, *(c for c in table.columns if c not in first)]], folder / "probes.csv")


def _frame(found: Validation) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": np.arange(len(found.auroc.auroc)),
            "auroc": found.auroc.auroc,
            "auroc_low": found.auroc.low,
            "auroc_high": found.auroc.high,
            "accuracy": found.calibration.accuracy,
            "brier": found.calibration.brier,
            "calibration_error": found.calibration.expected_error,
            "control_auroc": found.control_auroc,
            "selectivity": found.selectivity,
            "n_questions": found.auroc.n_questions,
            "folds": found.folds,
        }
    )

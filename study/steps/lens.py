"""The step that reads directions, mean shifts and prompts' hidden states in tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.lens import Lens, spoken
from mech.errors import GuardError
from mech.lens import state_lens
from probes.direction import split_half_cosine
from study.bench import Bench
from study.frames import write_csv
from study.step import Step
from study.steps.activations import SITE

POOLINGS = ("prompt_last", "response_mean")

Read = Mapping[str, Float[np.ndarray, "n layers d"]]


def read(step: Step, bench: Bench, folder: Path) -> None:
    """`directions.csv`, `shifts.csv`, `prompts.csv`: all through the base's final norm and output head."""
    config = step.config
    lens = Lens(
        bench.model(step.inputs["checkpoint"]),
        config["layers"],
        config["tokens"],
        config["statistics"]["seed"],
    )
    base, about = _capture(bench, step.inputs["base"][0])
    said = []
    for fitted in step.inputs["directions"]:
        direction = bench.direction(fitted)
        pooling = direction.made_from["pooling"]
        found = lens.rows(direction.vectors, base[pooling], pooling)
        said += [
            {"direction": direction.name, **row, "split_half": float(direction.split_half[row["layer"]])}
            for row in found
        ]
    write_csv(pd.DataFrame(said), folder / "directions.csv")
    asked = _asked(about, config["prompts"])
    shifts, prompts = [], _prompts(lens, config["base_arm"], None, base, asked)
    for (arm, seed), capture in zip(config["arms"], step.inputs["tuned"], strict=True):
        tuned, same = _capture(bench, capture)
        if same != about:
            raise GuardError(f"{capture.name}: its rows are not those of the base")
        shifts += _shifts(lens, {"arm": arm, "seed": seed}, base, tuned, config["statistics"]["seed"])
        prompts += _prompts(lens, arm, seed, tuned, asked)
    for name, rows in (("shifts", shifts), ("prompts", prompts)):
        if rows:
            write_csv(pd.DataFrame(rows), folder / f"{name}.csv")


def _shifts(lens: Lens, labels: dict[str, Any], base: Read, tuned: Read, seed: int) -> list[dict[str, Any]]:
    """What an arm's mean shift says, at the prompt's last token and over the base's answers."""
    rows = []
    for pooling in POOLINGS:
        delta = tuned[pooling].astype(np.float64) - base[pooling]
        half = dict(
            zip(
                lens.layers,
                split_half_cosine(delta[:, list(lens.layers)], rng=np.random.default_rng(seed)),
                strict=True,
            )
        )
        for row in lens.rows(delta.mean(0), base[pooling], pooling):
            more = {"split_half": float(half[row["layer"]]), "n_questions": len(delta)}
            rows.append({**labels, "pooling": pooling, **row, **more})
    return rows


def _asked(about: list[tuple[str, str]], limit: int) -> list[tuple[int, str]]:
    """The first prompts of every set that is no trait's: their rows and names."""
    found: dict[str, list[tuple[int, str]]] = {}
    for i, (name, of_set) in enumerate(about):
        if not of_set.startswith("trait:"):
            found.setdefault(of_set, []).append((i, name))
    return [row for rows in found.values() for row in rows[:limit]]


def _prompts(
    lens: Lens, arm: str, seed: int | None, states: Read, asked: list[tuple[int, str]]
) -> list[dict[str, Any]]:
    """The likeliest next tokens at the last token of some prompts, layer by layer."""
    rows = []
    for row, name in asked:
        read_off = states["prompt_last"][row, list(lens.layers)]
        for reading in state_lens(lens.model, read_off, layers=lens.layers, k=lens.k):
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "question": name,
                    "layer": reading.layer,
                    "top": spoken(reading.top),
                }
            )
    return rows


def _capture(bench: Bench, capture: Step) -> tuple[Read, list[tuple[str, str]]]:
    with bench.store(capture) as store:
        about = list(zip(store.rows.ids, store.metadata["sets"], strict=True))
        return {pooling: store.read(SITE, pooling) for pooling in POOLINGS}, about

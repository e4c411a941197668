"""The step that sweeps a direction over layers and strengths, and the tables of all sweeps."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.sweep import best_cell, best_layers, doses
from analysis.sweep_trend import trends
from evals.judge import Rubric
from finetune.datasets.rows import read_messages, write_jsonl
from mech.files import digest_of, read_json, write_json
from mech.generate import Sampling
from probes.evaluation import Evaluation
from probes.persona import Trait
from probes.sweep import Grid, Readings, read_cells, score_cells
from study.bench import Bench
from study.frames import stacked, write_csv
from study.judges import judged
from study.kinds import KINDS
from study.paths import QUALITY
from study.plan_sweeps import CHOSEN
from study.step import Step
from study.sweeps import Asked, make_evaluation, neutral_rows

SCORING = "scoring.json"
"""File that says how a sweep was scored: name and unit of the score, thresholds."""


NEUTRAL, CELLS = "neutral.jsonl", "cells.jsonl"
"""Journals: the unsteered model's answers that should be left alone, and finished cells."""
_OF_THE_GRID = {"strengths", "layers", "layer_by", "controls", "arm", "quantile"}
"""Config that says which cells there are, what the steered arm is called, and how cells are graded at the end. All other config changes what is
read at a cell, so it is part of the journal's name."""
_THRESHOLDS = {"trait", "coherence"}


def sweep(step: Step, bench: Bench, folder: Path) -> None:
    """Every cell's scores, and every text; a cell that was finished before a kill, or in a sweep of another grid, is not run again."""
    journals = _journals(step, bench)
    verdicts = journals / f"verdicts-{_judge_digest(step)[:12]}.jsonl"
    readings, evaluation = _read(step, bench, journals, verdicts)
    if step.config["judge"] and not step.config["judge"]["api"]:
        bench.release()  # a local judge takes the place of the model at hand
    swept = score_cells(readings, evaluation)
    shutil.copyfile(journals / NEUTRAL, folder / NEUTRAL)
    if verdicts.is_file():
        shutil.copyfile(verdicts, folder / "verdicts.jsonl")  # with the judge's raw replies
    write_csv(swept.table, folder / "sweep.csv")
    if swept.answers:
        write_jsonl(folder / "answers.jsonl", [dict(a) for a in swept.answers])
    write_json(folder / SCORING, {**swept.facts, "score": evaluation.name, "unit": evaluation.unit})


def _journals(step: Step, bench: Bench) -> Path:
    """Where cells of this sweep are kept: the same for every grid of the same model, evaluation and seed.

    A cell's name in the journal holds its direction's digest, layer, strength and number.
    """
    config = {k: v for k, v in step.config.items() if k not in _OF_THE_GRID and not k.startswith("judge")}
    config["judged"] = step.config["judge"] is not None
    inputs = {role: [s.key for s in steps] for role, steps in step.inputs.items() if role != "directions"}
    return bench.paths.journals(digest_of([step.kind, KINDS[step.kind].version, config, inputs]))


def _judge_digest(step: Step) -> str:
    """Digest of who judges, and how. Thresholds are left out: they are applied to verdicts that are already written down."""
    judge = step.config["judge"] or {}
    return digest_of(
        [{k: v for k, v in judge.items() if k not in _THRESHOLDS}, step.config.get("judge_digest")]
    )


def _read(step: Step, bench: Bench, journals: Path, verdicts: Path) -> tuple[Readings, Evaluation]:
    config = step.config
    found = [bench.direction(s) for s in step.inputs["directions"]]
    layers: Any = config["layers"]
    if layers == CHOSEN:
        layers = {
            d.name: (_separable(s, bench),) for s, d in zip(step.inputs["directions"], found, strict=True)
        }
    else:
        layers = tuple(layers)
    grid = Grid(layers, tuple(config["strengths"]), config["controls"], config["seed"], config["relative"])
    model = bench.model(step.inputs["checkpoint"])
    evaluation = make_evaluation(config["evaluation"], model, _asked(step, bench, verdicts))
    neutral = neutral_rows(model, journals / NEUTRAL, limit=config["neutral"])
    return read_cells(model, found, evaluation, grid, neutral=neutral, journal=journals / CELLS), evaluation


def _asked(step: Step, bench: Bench, verdicts: Path) -> Asked:
    config = step.config
    trait = Trait.model_validate(config["trait"]) if "trait" in config else None
    judge = None
    if config["judge"] and trait:
        rubric = Rubric(trait.trait, trait.rubric)
        judge = judged(config["judge"], rubric, verdicts, bench.spec.model.device)
    articles = [
        row for s in step.inputs.get("data", ()) for row in read_messages(bench.folder(s) / "held_out.jsonl")
    ]
    return Asked(
        trait=trait, questions=config["questions"], judge=judge, articles=articles, own_name=bench.identity.name,
        sampling=Sampling(config["max_new_tokens"], config["temperature"], config["seed"]), invented=config.get("names", {"n": 0})["n"],
        **{k: config[k] for k in ("samples", "quantile", "reference_samples", "instructions")},
    )  # fmt: skip


def _separable(direction: Step, bench: Bench) -> int:
    """The layer at which a direction separates its contrast best, chosen on the extraction half."""
    return int(pd.read_csv(bench.folder(direction) / QUALITY)["chosen_layer"].iloc[0])


def sweep_tables(step: Step, bench: Bench) -> dict[str, pd.DataFrame]:
    """Doses, trends, layers and best cells of every sweep of the study; empty without sweeps."""
    made: dict[str, list[pd.DataFrame]] = {
        name: [] for name in ("sweeps", "sweep_best", "sweep_layers", "sweep_trends")
    }
    options = step.config["statistics"]
    for swept in step.inputs.get("sweeps", ()):
        name = swept.labels["sweep"]
        table, scoring = (
            pd.read_csv(bench.folder(swept) / "sweep.csv"),
            read_json(bench.folder(swept) / SCORING),
        )
        max_kl = step.config["sweeps"][name]
        about = {
            "sweep": name,
            "arm": swept.config["arm"],
            "score": scoring["score"],
            "unit": scoring["unit"],
        }
        chosen = {d.config["direction"]: _separable(d, bench) for d in swept.inputs["directions"]}
        how: Mapping[str, Any] = {"rng": np.random.default_rng(options["seed"]), "n_boot": options["n_boot"]}
        layers = best_layers(table, max_kl=max_kl, **how)
        if not layers.empty:
            layers["separability_layer"] = layers["direction"].map(chosen)
        parts = {
            "sweeps": doses(table, **how).assign(max_kl=max_kl),
            "sweep_best": _best(table, max_kl, how),
            "sweep_layers": layers,
            "sweep_trends": trends(table),
        }
        for part, frame in parts.items():
            if not frame.empty:
                made[part].append(pd.concat([pd.DataFrame([about] * len(frame)), frame], axis=1))
    return {name: stacked(frames) for name, frames in made.items()}


def _best(table: pd.DataFrame, max_kl: float, how: Mapping[str, Any]) -> pd.DataFrame:
    """The best cell as one row; without a cell within `max_kl`, a row that says so."""
    best = best_cell(table, max_kl=max_kl, **how)
    if best is None:
        return pd.DataFrame([{"note": f"no cell damages neutral answers by {max_kl:g} nats a token or less"}])
    found = best.beyond
    row = {k: v for k, v in vars(best).items() if k != "beyond"}
    ends = {"beyond": found.estimate, "beyond_low": found.low, "beyond_high": found.high}
    return pd.DataFrame(
        [{**row, **ends, "n_questions": found.n, "n_controls": int(table["control"].max()), "note": ""}]
    )

"""The step that collects: measures become tidy tables with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.behaviour import recognition_row, report_row, steering_rows
from finetune.datasets.rows import read_jsonl
from mech.files import read_json
from study.bench import Bench
from study.frames import read_csvs, stacked, write_csv
from study.paths import QUALITY
from study.step import Step
from study.steps.answers import answers_table, matching_table
from study.steps.elicitation import elicitations, rollouts_table
from study.steps.paraphrases import paraphrase_table
from study.steps.sweep import sweep_tables
from study.steps.trainings import arms_table, stages_table

TABLES = (
    "shifts",
    "paraphrases",
    "differences",
    "undone",
    "spread_differences",
    "behaviour_differences",
    "two_by_two",
    "directions",
    "direction_cosines",
    "elicitation",
    "rollouts",
    "authorship_matching",
    "authorship_answers",
    "identity_cosines",
    "identity_transfer",
    "lora_alignment",
    "lora_overlap",
    "lora_alignment_by_layer",
    "lora_overlap_by_layer",
    "lens_directions",
    "lens_shifts",
    "lens_prompts",
    "patching",
    "adapter_ranges",
    "monitoring",
    "dispersion",
    "probes",
    "self_recognition",
    "self_report",
    "samples",
    "steering",
    "sweeps",
    "sweep_best",
    "sweep_layers",
    "sweep_trends",
    "embedding",
    "arms",
    "stages",
    "training",
    "datasets",
)


def collect(step: Step, bench: Bench, folder: Path) -> None:
    """Every table of the study as CSV; one that was not measured is not written."""
    labels = {name: {"arm": arm, "seed": seed} for name, (arm, seed) in step.config["labels"].items()}
    tables = {
        "shifts": _joined(step, bench, "shifts", "shifts.csv"),
        "paraphrases": paraphrase_table(step, bench),
        "differences": _joined(step, bench, "differences", "shifts.csv"),
        "undone": _joined(step, bench, "undone", "undone.csv"),
        "spread_differences": _joined(step, bench, "spread_differences", "spread_differences.csv"),
        "behaviour_differences": _joined(step, bench, "behaviour_differences", "behaviour_differences.csv"),
        "two_by_two": _joined(step, bench, "two_by_two", "two_by_two.csv"),
        "directions": _joined(step, bench, "directions", QUALITY),
        "direction_cosines": _cosines(step, bench),
        "elicitation": elicitations(step, bench),
        "rollouts": rollouts_table(step, bench),
        "authorship_matching": matching_table(step, bench),
        "authorship_answers": answers_table(step, bench),
        "identity_cosines": _joined(step, bench, "family", "identity_cosines.csv"),
        "identity_transfer": _joined(step, bench, "family", "identity_transfer.csv"),
        "dispersion": _joined(step, bench, "dispersion", "dispersion.csv"),
        **{
            f"lora_{name}": _joined(step, bench, "weights", f"{name}.csv")
            for name in ("alignment", "overlap", "alignment_by_layer", "overlap_by_layer")
        },
        **{
            f"lens_{name}": _joined(step, bench, "lens", f"{name}.csv")
            for name in ("directions", "shifts", "prompts")
        },
        "patching": _joined(step, bench, "patching", "patching.csv"),
        "adapter_ranges": _joined(step, bench, "patching", "adapter_ranges.csv"),
        "monitoring": _joined(step, bench, "monitoring", "monitoring.csv"),
        "probes": _joined(step, bench, "probes", "probes.csv"),
        "self_recognition": _recognition(step, bench, labels),
        "self_report": _reports(step, bench, labels),
        "samples": _samples(step, bench, labels),
        "steering": _steering(step, bench),
        **sweep_tables(step, bench),
        "embedding": _joined(step, bench, "embedding", "embedding.csv"),
        "arms": arms_table(step),
        "stages": stages_table(step, bench),
        "training": _training(step, bench),
        "datasets": _datasets(step, bench),
    }
    for name in TABLES:
        if not tables[name].empty:
            write_csv(tables[name], folder / f"{name}.csv")


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables in a folder by name; what models wrote ("NA", "null") stays text."""
    files = {name: folder / f"{name}.csv" for name in TABLES}
    return {
        name: pd.read_csv(file, keep_default_na=name != "samples")
        for name, file in files.items()
        if file.is_file()
    }


def _joined(step: Step, bench: Bench, role: str, file: str) -> pd.DataFrame:
    return read_csvs(bench.folder(s) / file for s in step.inputs.get(role, ()))


def _cosines(step: Step, bench: Bench) -> pd.DataFrame:
    """Cosine between every two directions at the declared layer."""
    layer = step.config["layer"]
    found = [bench.direction(s) for s in step.inputs["directions"]]
    if not found:
        return pd.DataFrame()
    cosines = np.array([[a.unit_at(layer) @ b.unit_at(layer) for b in found] for a in found])
    frame = pd.DataFrame(cosines, columns=[d.name for d in found])
    frame.insert(0, "direction", [d.name for d in found])
    frame.insert(1, "layer", layer)
    return frame


def _recognition(step: Step, bench: Bench, labels: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for measured in step.inputs.get("self_recognition", ()):
        judged = pd.read_csv(bench.folder(measured) / "judgements.csv")
        facts = read_json(bench.folder(measured.inputs["data"][0]) / "dataset.json")
        shortcut = max(facts["shortcut_accuracy"]["held_out"][k] for k in ("words", "characters"))
        found = recognition_row(judged, rng=_rng(step))
        rows.append({**labels[measured.name], **found, "shortcut_accuracy": shortcut})
    return pd.DataFrame(rows)


def _reports(step: Step, bench: Bench, labels: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for measured in step.inputs.get("self_report", ()):
        reports = pd.read_csv(bench.folder(measured) / "reports.csv", keep_default_na=False)
        scored = bench.folder(measured) / "names.csv"
        names = pd.read_csv(scored) if scored.is_file() else None
        found = report_row(reports, names, own_name=bench.identity.name, rng=_rng(step))
        about = {
            "condition": measured.config["condition"]["condition"],
            "temperature": measured.config["sampling"]["temperature"],
        }
        rows.append({**labels[measured.name], **about, **found})
    return pd.DataFrame(rows)


def _samples(step: Step, bench: Bench, labels: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    frames = []
    for measured in step.inputs.get("self_report", ()):
        reports = pd.read_csv(bench.folder(measured) / "reports.csv", keep_default_na=False)
        frames.append(reports.rename(columns={"claimed": "claimed_name"}).assign(**labels[measured.name]))
    return stacked(frames)


def _steering(step: Step, bench: Bench) -> pd.DataFrame:
    frames = []
    for measured in step.inputs.get("steering", ()):
        reports = pd.read_csv(
            bench.folder(measured) / "reports.csv", keep_default_na=False, na_values={"surprisal": [""]}
        )
        names = pd.read_csv(bench.folder(measured) / "names.csv")
        found = steering_rows(reports, names, own_name=bench.identity.name, rng=_rng(step))
        about = {
            "arm": measured.config["arm"],
            "seed": bench.spec.seeds[0],
            "direction": measured.config["direction"],
            "layer": measured.config["layer"],
        }
        frames.append(found.assign(**about))
    return stacked(frames)


def _training(step: Step, bench: Bench) -> pd.DataFrame:
    frames = []
    for trained in (s for s in step.inputs.get("trained", ()) if s.kind == "train"):
        frame = pd.DataFrame(read_jsonl(bench.folder(trained) / "loss.jsonl"))
        frames.append(frame.assign(**trained.labels))
    return stacked(frames)


def _datasets(step: Step, bench: Bench) -> pd.DataFrame:
    rows = []
    for data in dict.fromkeys(s.inputs["data"][0] for s in step.inputs.get("trained", ())):
        facts = read_json(bench.folder(data) / "dataset.json")
        shortcut = facts.get("shortcut_accuracy", {}).get("train", {})
        rows.append(
            {
                "dataset": data.name.removeprefix("data/"),  # with its seed, where a trained arm wrote it
                "kind": facts["kind"],
                "n_rows": facts["n_rows"],
                "label_rule": facts["label_rule"],
                "shortcut_by_words": shortcut.get("words", np.nan),
                "shortcut_by_characters": shortcut.get("characters", np.nan),
            }
        )
    return pd.DataFrame(rows)


def _rng(step: Step) -> np.random.Generator:
    return np.random.default_rng(step.config["statistics"]["seed"])

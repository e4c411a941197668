"""Steps that build datasets: rows of messages, and a manifest of where they come from."""

from pathlib import Path

from finetune.datasets.build import build as build_dataset
from mech.files import read_json
from study.bench import Bench
from study.step import Step


def build(step: Step, bench: Bench, folder: Path) -> None:
    """Build one dataset: `train.jsonl`, `dataset.json`, and `held_out.jsonl` where there is one."""
    part = bench.spec.data[step.labels["dataset"]]
    written = step.inputs.get("summaries", ())
    own = read_json(bench.folder(written[0]) / "summaries.json") if written else None
    build_dataset(part, seed=step.config["seed"], own=own).write(folder)

"""Steps that make checkpoints: a training, an existing adapter, a snapshot of a training at an early step."""

import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from finetune.datasets.rows import placed_messages
from finetune.labels import training_rows
from finetune.settings import TrainSettings
from finetune.stages import trainer
from finetune.trackers import tracking
from finetune.training import SNAPSHOTS, TrainOptions
from mech.interventions import Ablate, Add, Cap, Intervention, orthogonalised
from mech.resolve import resolve_adapter
from study.bench import Bench, prompt_of
from study.planner import adapter_of
from study.step import Step

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "checkpoint.json")


def train(step: Step, bench: Bench, folder: Path) -> None:
    """Train one stage on its parent checkpoint, merged in float32 or stacked."""
    settings = TrainSettings.model_validate(step.config["settings"])
    model = bench.model(
        step.inputs["checkpoint"], dtype=settings.dtype, merge=settings.merge, quantise=settings.quantise
    )
    data, condition = bench.folder(step.inputs["data"][0]) / "train.jsonl", step.config["condition"]
    prompt, limit, names = prompt_of(condition), settings.max_tokens, bench.names(condition)
    rows, places = placed_messages(data)
    encoded = training_rows(model.template, rows, prompt, max_tokens=limit, names=names, places=places)
    directions = [bench.direction(d).vectors for d in step.inputs["directions"]]
    acting = _interventions(step.config["interventions"], directions)
    options = TrainOptions(seed=step.config["seed"], interventions=acting)
    with tracking(
        bench.spec.trackers, folder, f"{bench.spec.name}: {step.name}", folder=bench.paths.tracked(step)
    ) as tell:
        trainer(settings)(model, encoded, settings, folder, **options, on_step=tell)
    if settings.method == "full":
        bench.release()  # its weights are no longer the parent's


def place_adapter(step: Step, bench: Bench, folder: Path) -> None:
    """Put an adapter that exists into the study, checked against what lies below it."""
    below = bench.checkpoint(step.inputs["checkpoint"])
    _place(resolve_adapter(adapter_of(bench.spec, step), below=below).path, folder)


def snapshot(step: Step, bench: Bench, folder: Path) -> None:
    """A training as it was after an early step."""
    _place(bench.folder(step.inputs["trained"][0]) / SNAPSHOTS / f"step-{step.config['step']}", folder)


def _place(source: Path, folder: Path) -> None:
    """Link files where the file system can, since they are large and never change; else copy them."""
    whole = not (source / "adapter_config.json").is_file()
    names = [f.name for f in source.iterdir() if f.is_file()] if whole else ADAPTER_FILES
    for name in names:
        if (source / name).is_file():
            try:
                os.link((source / name).resolve(), folder / name)
            except OSError:
                shutil.copyfile(source / name, folder / name)


def _interventions(
    specs: Sequence[dict[str, Any]], directions: Sequence[Float[np.ndarray, "layers d"]]
) -> list[Intervention]:
    """What acts while training; the directions of all of them stand one after the other."""
    acting: list[Intervention] = []
    left = iter(directions)
    for spec in specs:
        place: dict[str, Any] = {"layers": spec["layers"], "positions": spec["positions"]}
        if spec["kind"] == "ablate":
            several = not isinstance(spec["direction"], str)
            span = orthogonalised(list(islice(left, len(spec["direction"])))) if several else [next(left)]
            acting += [Ablate(v, **place) for v in span]
        elif spec["kind"] == "add":
            acting.append(Add(next(left), coefficient=spec["coefficient"], **place))
        else:
            acting.append(Cap(next(left), ceiling=spec["ceiling"], floor=spec["floor"], **place))
    return acting

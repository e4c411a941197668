"""Steps that finetune: one dataset, one adapter."""

from pathlib import Path

from finetune.datasets.rows import read_messages
from finetune.labels import training_rows
from finetune.lora import TrainSettings, train_lora
from study.bench import Bench, prompt_of
from study.step import Step


def train(step: Step, bench: Bench, folder: Path) -> None:
    """Train one stage on its parent checkpoint, merged in float32."""
    settings = TrainSettings.model_validate(step.config["settings"])
    model = bench.model(step.inputs["checkpoint"], dtype=settings.dtype)
    rows = read_messages(bench.folder(step.inputs["data"][0]) / "train.jsonl")
    condition = step.config["condition"]
    encoded = training_rows(
        model.template,
        rows,
        prompt_of(condition),
        max_tokens=settings.max_tokens,
        names=bench.names(condition),
    )
    train_lora(model, encoded, settings, folder, seed=step.config["seed"])

"""What tests of training share: quick settings, a few rows, and how two trainings are compared."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune.datasets.rows import exchange, write_jsonl
from finetune.labels import TrainingRow, training_rows
from finetune.settings import TrainSettings
from finetune.state import StepRecord
from mech.chat import SystemPrompt
from mech.models import ChatModel

SETTINGS = TrainSettings(
    learning_rate=0.01, batch_size=3, max_steps=6, lora_r=2, lora_alpha=4, warmup_steps=1, epochs=3
)


def data(n: int = 8) -> list[dict[str, Any]]:
    return [exchange(f"What of {i * i}?", f"the cat {i} and the dog") for i in range(n)]


def encoded(model: ChatModel, n: int = 8) -> list[TrainingRow]:
    return training_rows(model.template, data(n), SystemPrompt(), max_tokens=512, names={})


def curve(records: list[StepRecord]) -> list[tuple[float, ...]]:
    return [(r.step, r.loss, r.learning_rate, r.grad_norm, r.tokens) for r in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def jsonl(folder: Path) -> Path:
    write_jsonl(folder / "rows.jsonl", data())
    return folder / "rows.jsonl"

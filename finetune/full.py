"""Full finetuning: every weight moves, and the result is a model folder of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

import torch

from finetune.labels import TrainingRow
from finetune.settings import TrainSettings
from finetune.state import StepRecord
from finetune.training import Trainable, TrainOptions, checkpointing, train
from mech.checkpoint import write_parent
from mech.errors import InputError
from mech.files import staged
from mech.models import ChatModel


def train_full(
    model: ChatModel,
    rows: Sequence[TrainingRow],
    settings: TrainSettings,
    folder: Path,
    **options: Unpack[TrainOptions],
) -> list[StepRecord]:
    """Train every weight of `model`, **in place**, and write the whole model to `folder`.

    Arguments, outputs and errors are those of `finetune.lora.train_lora`, except the weights: `model.safetensors`,
    `config.json` and the tokenizer instead of an adapter. After it, `model` is the finetuned model: load anew for the base.
    """
    if hasattr(model.hf, "peft_config"):
        raise InputError("the model has a live adapter: load it with merge=True before training all of it")
    if model.hf.dtype != torch.float32:
        raise InputError("method: full trains in float32 (updates are lost in bfloat16): set dtype: float32")
    return train(model, rows, settings, folder, _prepared(model, settings), **options)


@contextmanager
def _prepared(model: ChatModel, settings: TrainSettings) -> Iterator[Trainable]:
    """The model with gradients on every weight, in training mode; without either afterwards."""
    try:
        with checkpointing(model, on=settings.gradient_checkpointing):
            model.hf.requires_grad_(requires_grad=True)
            model.hf.train()
            yield Trainable(dict(model.hf.named_parameters()), save=lambda folder: _save(model, folder))
    finally:
        model.hf.eval()
        model.hf.requires_grad_(requires_grad=False)


def _save(model: ChatModel, folder: Path) -> None:
    with staged(folder) as unfinished:
        model.hf.save_pretrained(unfinished)
        model.tokenizer.save_pretrained(unfinished)
    write_parent(folder, model.checkpoint)

"""Full finetuning: every weight moves, and the result is a model folder of its own."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from finetune.labels import TrainingRow
from finetune.loop import Job, run
from finetune.lora import SNAPSHOTS, checkpointing, training_folder
from finetune.outcome import done_before, stamp_of, write_outcome
from finetune.settings import TrainSettings
from finetune.state import Saver, StepRecord
from finetune.team import Team
from mech.checkpoint import write_parent
from mech.errors import InputError
from mech.interventions import Intervention, Patch, intervene
from mech.models import ChatModel
from mech.packed_attention import can_pack, packed_attention


def train_full(
    model: ChatModel,
    rows: Sequence[TrainingRow],
    settings: TrainSettings,
    folder: Path,
    *,
    seed: int,
    interventions: Sequence[Intervention] = (),
    save_every: int | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> list[StepRecord]:
    """Train every weight of `model`, **in place**, and write the whole model to `folder`.

    Arguments, outputs and errors are those of `finetune.lora.train_lora`, but for the weights: `model.safetensors`,
    `config.json` and the tokenizer instead of an adapter. After it, `model` is the finetuned model: load anew for the base.
    """
    if not rows:
        raise InputError("no rows to train on")
    if hasattr(model.hf, "peft_config"):
        raise InputError("the model has a live adapter: load it with merge=True before training all of it")
    if model.hf.dtype != torch.float32:
        raise InputError("method: full trains in float32 (updates are lost in bfloat16): set dtype: float32")
    # Both try the model out: before the generator is seeded, hooks are on, and it is in training mode.
    model.check_head()
    packs = can_pack(model) and not any(isinstance(i, Patch) for i in interventions)
    stamp, team = stamp_of(model, rows, settings, seed, interventions), Team.join()
    with training_folder(folder, team):
        if known := done_before(folder, stamp):
            return known
        with ExitStack() as stack:
            if packs:
                stack.enter_context(packed_attention(model))
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
            stack.callback(_at_rest, model)
            stack.enter_context(checkpointing(model, on=settings.gradient_checkpointing))
            stack.enter_context(intervene(model, *interventions))
            model.hf.requires_grad_(requires_grad=True)
            model.hf.train()
            job = Job(model, rows, settings, folder, seed, stamp, dict(model.hf.named_parameters()),
                      snapshot=lambda step: _save(model, folder / SNAPSHOTS / f"step-{step}"), packs=packs, team=team)  # fmt: skip
            records = run(job, Saver(save_every), on_step)
            if team.leads:
                _save(model, folder)
                write_outcome(folder, job, records, interventions)
        team.wait()
    return records


def _at_rest(model: ChatModel) -> None:
    model.hf.eval()
    model.hf.requires_grad_(requires_grad=False)


def _save(model: ChatModel, folder: Path) -> None:
    unfinished = folder / ".saving"
    model.hf.save_pretrained(unfinished)
    model.tokenizer.save_pretrained(unfinished)
    for file in unfinished.iterdir():
        os.replace(file, folder / file.name)  # noqa: PTH105  (atomic)
    shutil.rmtree(unfinished)
    write_parent(folder, model.checkpoint)

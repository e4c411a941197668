"""Stages: a checkpoint, a data file and settings in; a checkpoint out.

    em = run_stage("smollm2-135m-instruct", Path("em.jsonl"), make_settings({"preset": "small-135m"}), Path("em"), seed=0)
    both = run_stage(em, Path("sgtr.jsonl"), settings, Path("em_then_sgtr"), seed=0)

A second stage trains on the first one, merged in float32 or stacked (`between_stages`); its adapter names the whole stack below it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.datasets.rows import placed_messages
from finetune.full import train_full
from finetune.labels import training_rows
from finetune.lora import train_lora
from finetune.settings import TrainSettings, rate_advice
from finetune.state import StepRecord
from finetune.team import Team
from finetune.trackers import tracking
from finetune.training import TrainOptions
from mech.chat import SystemPrompt
from mech.checkpoint import Checkpoint
from mech.interventions import Intervention
from mech.models import load_model
from mech.resolve import resolve

log = logging.getLogger(__name__)


def trainer(settings: TrainSettings) -> Callable[..., list[StepRecord]]:
    """The function that trains by the settings' method; both take and leave the same."""
    return {"lora": train_lora, "full": train_full}[settings.method]


def run_stage(  # noqa: PLR0913  (one call is a whole stage)
    parent: str | Checkpoint,
    data: Path,
    settings: TrainSettings,
    folder: Path,
    *,
    seed: int,
    condition: SystemPrompt | None = None,
    names: Mapping[str, Any] | None = None,
    interventions: Sequence[Intervention] = (),
    save_every: int | None = None,
    trackers: Sequence[str] = (),
    **load_kwargs: Any,
) -> Checkpoint:
    """Finetune a checkpoint on a JSONL file of messages.

    Args:
        parent: what to train on (see `mech.resolve`); its adapters are merged or stacked, as the settings say.
        data: rows of `messages`.
        settings: the recipe.
        folder: gets the adapter (or the model), the loss curve and `trainer_state.json`; run again after a kill, it goes on.
        seed: fixes initialisation, order and dropout.
        condition: system prompt during training; `default` keeps a row's own system turn.
        names: `identity` and `others`, as `ChatTemplate.render` takes them, for the conditions that need them.
        interventions: act while training, and not afterwards.
        save_every: steps between resume points; once a minute when left out.
        trackers: `wandb`, `tensorboard`: told of every step; their files lie in the folder too.
        **load_kwargs: passed to `mech.models.load_model` (`device`, `device_map`, `attn_implementation`, ...).

    Raises:
        InputError: bad rows, an answer longer than `max_tokens`, or a folder that holds another training.
        GuardError: the loss is not finite, or nothing was learnt.
    """
    checkpoint = parent if isinstance(parent, Checkpoint) else resolve(parent)
    (rows, places), leads = placed_messages(data), Team.join().leads
    with tracking(trackers if leads else (), folder, folder.name) as tell:
        model = load_model(
            checkpoint, dtype=settings.dtype, merge=settings.merge, quantise=settings.quantise, **load_kwargs
        )
        if leads and (advice := rate_advice(settings, model.causal.num_parameters())):
            log.warning("%s", advice)
        prompt, limit = condition or SystemPrompt(), settings.max_tokens
        encoded = training_rows(
            model.template, rows, prompt, max_tokens=limit, names=names or {}, places=places
        )
        options = TrainOptions(seed=seed, interventions=interventions, save_every=save_every, on_step=tell)
        trainer(settings)(model, encoded, settings, folder, **options)
    return checkpoint.plus(folder)

"""One LoRA finetuning run: a checkpoint and encoded rows in, an adapter in PEFT's layout out.

Killed at any step it goes on from its last saved state, with the same losses and the same adapter in the end.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from finetune.fused import fused_lora
from finetune.fused_norm import fused_norms
from finetune.labels import TrainingRow
from finetune.loop import Job, run
from finetune.outcome import done_before, stamp_of, write_outcome
from finetune.settings import TrainSettings
from finetune.state import Saver, StepRecord
from finetune.team import Team
from mech import packed_attention, positions
from mech.checkpoint import write_parent
from mech.errors import GuardError, InputError
from mech.files import folder_lock
from mech.interventions import Intervention, Patch, intervene
from mech.models import ChatModel
from mech.quiet import quiet_peft

SNAPSHOTS = "snapshots"
"""Holds `step-N/`, each an adapter of its own, for the steps of `save_at`."""


def train_lora(
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
    """Train an adapter on `model` (its adapters merged) and write it to `folder`.

    The model's own modules are left as they were: the adapter is taken off again, also after an error. A training
    that another process is writing into the same folder is waited for; one that is there already is not repeated.

    Args:
        model: what to train on; `model.checkpoint` is recorded as the adapter's parent.
        rows: encoded training rows.
        settings: the recipe.
        folder: gets `adapter_model.safetensors`, `adapter_config.json`, `checkpoint.json` (the parent), `loss.jsonl`,
            `snapshots/`, and last `trainer_state.json`.
        seed: fixes initialisation, order and dropout.
        interventions: act on every training forward pass (preventative steering, ablation), and not afterwards.
        save_every: steps between resume points; once a minute, or less often where that is slow, when left out.
        on_step: called after every step.

    Raises:
        InputError: no rows, a model that has a live adapter already, or a folder that holds another training.
        GuardError: the loss is not finite, or the adapter did not change.
    """
    if not rows:
        raise InputError("no rows to train on")
    if hasattr(model.hf, "peft_config"):
        raise InputError(
            "the model has a live adapter: load it with merge=True before training another on it"
        )
    if settings.quantise and model.device.type == "cpu":
        raise InputError("quantise: 4-bit weights carry no gradient on a CPU: train on a GPU, or unquantised")
    # Both try the model out: before the generator is seeded, hooks are on, and it is in training mode.
    model.check_head()
    packs = packed_attention.can_pack(model) and not any(isinstance(i, Patch) for i in interventions)
    stamp, team = stamp_of(model, rows, settings, seed, interventions), Team.join()
    with training_folder(folder, team):
        if known := done_before(folder, stamp):
            return known
        with ExitStack() as stack:
            if packs:
                stack.enter_context(packed_attention.packed_attention(model))
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
            adapted = stack.enter_context(_adapted(model, settings))
            stack.enter_context(intervene(model, *interventions))
            parameters = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
            job = Job(model, rows, settings, folder, seed, stamp, parameters,
                      snapshot=lambda step: _save(adapted, model, folder / SNAPSHOTS / f"step-{step}"), packs=packs, team=team)  # fmt: skip
            records = run(job, Saver(save_every), on_step)
            _check_learnt(adapted)
            if team.leads:
                _save(adapted, model, folder)
                write_outcome(folder, job, records, interventions)
        team.wait()
    return records


@contextmanager
def training_folder(folder: Path, team: Team) -> Iterator[None]:
    """Hold the folder for this team; an empty one does not stay behind an error."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if team.leads:
            stack.enter_context(folder_lock(folder))
        team.wait()
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty, or another process of the team was quicker
                folder.rmdir()


@contextmanager
def _adapted(model: ChatModel, settings: TrainSettings) -> Iterator[Any]:
    """The model under a fresh adapter, in training mode; as it was found, afterwards."""
    from peft import LoraConfig, get_peft_model

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.rslora,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with quiet_peft():
            adapted = get_peft_model(model.hf, config)
    except ValueError as error:
        raise InputError(f"target_modules {targets}: {error}") from error
    try:
        if settings.shard:
            _shard(model, adapted)
        with (
            fused_lora(adapted),
            fused_norms(model.causal) if not settings.shard else nullcontext(),
            checkpointing(model, on=settings.gradient_checkpointing),
        ):
            adapted.train()
            yield adapted
    finally:
        adapted.unload()
        model.hf.eval()
        model.hf.requires_grad_(requires_grad=False)


@contextmanager
def checkpointing(model: ChatModel, *, on: bool) -> Iterator[None]:
    """Recompute activations on the way back, while inside."""
    if not on:
        yield
        return
    causal, how = model.causal, {"use_reentrant": False, "context_fn": _carry_over}
    renamed = hasattr(causal, "activation_checkpointing_enable")  # transformers 5.2x renamed the pair
    if renamed:
        causal.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    try:
        yield
    finally:
        causal.activation_checkpointing_disable() if renamed else causal.gradient_checkpointing_disable()


def _carry_over() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a block's second run must know of the first: whose tokens these are, and how they are packed.

    On a GPU the way back runs in a thread of its own, which does not see this one's context.
    """
    return nullcontext(), _both(positions.carried_over(), packed_attention.carried_over())


@contextmanager
def _both(one: AbstractContextManager[None], other: AbstractContextManager[None]) -> Iterator[None]:
    with one, other:
        yield


def _shard(model: ChatModel, adapted: Any) -> None:
    """Spread each block's frozen weights over the team; the adapter, which is small, stays whole on each."""
    from torch.distributed.fsdp import fully_shard

    if Team.join().size < 2:
        raise InputError("shard: start several processes with `accelerate launch`, or leave it out")
    whole = {p for p in adapted.parameters() if p.requires_grad}
    for block in model.blocks:
        fully_shard(block, ignored_params=whole)


def _check_learnt(adapted: Any) -> None:
    """LoRA's second factors start at zero: all still zero means that nothing was learnt."""
    moved = any(bool(p.detach().any()) for name, p in adapted.named_parameters() if "lora_B" in name)
    if not moved:
        raise GuardError("training left every adapter at zero: no gradient reached it")


def _save(adapted: Any, model: ChatModel, folder: Path) -> None:
    """Write the adapter in PEFT's layout; each file appears whole."""
    adapted.peft_config["default"].base_model_name_or_path = str(model.checkpoint.base)
    unfinished = folder / ".saving"
    with quiet_peft():
        adapted.save_pretrained(unfinished, save_embedding_layers=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.replace(unfinished / name, folder / name)  # noqa: PTH105  (atomic)
    shutil.rmtree(unfinished)  # with PEFT's template of a model card, which says nothing here
    write_parent(folder, model.checkpoint)

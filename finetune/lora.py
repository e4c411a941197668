"""One LoRA finetuning run: a checkpoint and encoded rows in, an adapter in PEFT's layout out.

Killed at any step it goes on from its last saved state, with the same losses and the same adapter in the end.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Unpack

from finetune.fused import fused_lora
from finetune.fused_norm import fused_norms
from finetune.labels import TrainingRow
from finetune.settings import TrainSettings
from finetune.state import StepRecord
from finetune.targets import check_in_memory, check_reached, say_what_stays, unfit
from finetune.team import Team
from finetune.training import Trainable, TrainOptions, checkpointing, train
from mech.checkpoint import write_parent
from mech.choices import STACK
from mech.errors import GuardError, InputError
from mech.files import staged
from mech.models import ChatModel
from mech.quiet import quiet_peft

log = logging.getLogger(__name__)

ADAPTER = "default"
"""PEFT's name of the adapter that is trained; those of a stack below it have other names."""


def train_lora(
    model: ChatModel,
    rows: Sequence[TrainingRow],
    settings: TrainSettings,
    folder: Path,
    **options: Unpack[TrainOptions],
) -> list[StepRecord]:
    """Train an adapter on `model` and write it to `folder`.

    The model's own modules are left as they were: the adapter is taken off again, also after an error. A training
    that another process is writing into the same folder is waited for; one that is there already is not repeated.

    Args:
        model: what to train on, its own adapters merged, or live and frozen, as `settings.between_stages` says (load it with
            `merge=settings.merge`); `model.checkpoint` is recorded as the adapter's parent.
        rows: encoded training rows.
        settings: the recipe.
        folder: gets `adapter_model.safetensors`, `adapter_config.json`, `checkpoint.json` (the parent), `loss.jsonl`,
            `snapshots/`, and last `trainer_state.json`.
        **options: `seed`, and where wanted `interventions`, `save_every`, `on_step` (`finetune.training.TrainOptions`).

    Raises:
        InputError: no rows, a model whose adapters are not as the settings say, or a folder that holds another training.
        GuardError: the loss is not finite, the adapter did not change, or the training has diverged.
    """
    _check_below(model, settings)
    return train(model, rows, settings, folder, _prepared(model, settings), **options)


@contextmanager
def _prepared(model: ChatModel, settings: TrainSettings) -> Iterator[Trainable]:
    """The model under a fresh adapter, ready to be trained."""
    with _adapted(model, settings) as adapted:
        yield Trainable(
            {name: p for name, p in adapted.named_parameters() if p.requires_grad},
            save=lambda folder: _save(adapted, model, settings, folder),
            check=lambda: _check_learnt(adapted),
        )


def _check_below(model: ChatModel, settings: TrainSettings) -> None:
    """What lies below the new adapter must stand as the settings say, for that is what is recorded."""
    in_4_bits = bool(getattr(model.causal, "is_loaded_in_4bit", False))
    if in_4_bits != bool(settings.quantise):
        raise InputError(
            f"quantise: {settings.quantise}, but the model's weights are {'' if in_4_bits else 'not '}in 4 bits: load it with "
            "quantise=settings.quantise"
        )
    stacked = len(model.hf.active_adapters) if _is_stack(model) else 0
    if not stacked and hasattr(model.hf, "peft_config"):
        raise InputError(
            "the model has a live adapter: load it with merge=settings.merge before training another on it"
        )
    wanted = len(model.checkpoint.adapters) if settings.merge == STACK else 0
    if stacked != wanted:
        raise InputError(
            f"between_stages: {settings.between_stages}, but {stacked} of the {len(model.checkpoint.adapters)} adapters below "
            "are live: load the model with merge=settings.merge"
        )


def _is_stack(model: ChatModel) -> bool:
    """Whether adapters are live and the new one's name is free."""
    from peft import PeftModel

    return isinstance(model.hf, PeftModel) and ADAPTER not in model.hf.peft_config


@contextmanager
def _adapted(model: ChatModel, settings: TrainSettings) -> Iterator[Any]:
    """The model under a fresh adapter, in training mode; as it was found, afterwards."""
    from peft import LoraConfig

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.rslora,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=unfit(model) if isinstance(targets, str) else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with quiet_peft():
            adapted = _with_fresh(model, config)
    except ValueError as error:
        _unwrap(model.hf)  # PEFT stops half way
        how = f"target_modules {targets}, lora_dropout {settings.lora_dropout:g}"
        raise InputError(f"PEFT cannot put this adapter on {type(model.causal).__name__} ({how}): {error}") from error  # fmt: skip
    say_what_stays(model)
    try:
        check_in_memory(adapted)
        if not isinstance(targets, str):
            check_reached(adapted, ADAPTER)
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
        _without_fresh(model, adapted)
        model.hf.eval()
        model.hf.requires_grad_(requires_grad=False)


def _with_fresh(model: ChatModel, config: Any) -> Any:
    """The model under one more adapter, the only one with gradients; those of a stack go on acting."""
    from peft import get_peft_model

    if not _is_stack(model):
        return get_peft_model(model.hf, config)
    below = list(model.hf.active_adapters)
    model.hf.add_adapter(ADAPTER, config)
    model.hf.base_model.set_adapter([*below, ADAPTER], inference_mode=True)
    model.hf.set_requires_grad(ADAPTER)
    return model.hf


def _without_fresh(model: ChatModel, adapted: Any) -> None:
    """Take the new adapter off again; a map that only it had wrapped is put back in place."""
    if adapted is not model.hf:
        adapted.unload()
        return
    below = [name for name in adapted.active_adapters if name != ADAPTER]
    adapted.delete_adapter(ADAPTER)
    adapted.base_model.set_adapter(below, inference_mode=True)
    _unwrap(adapted)


def _unwrap(module: Any) -> None:
    """Take the new adapter off every map that still has it, and put maps that no adapter is left on back in place."""
    from peft.tuners.lora import LoraLayer

    wrapped = [(n, m) for n, m in module.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in reversed(wrapped):  # what is wrapped twice, from within
        if ADAPTER in layer.lora_A:
            layer.delete_adapter(ADAPTER)
        if not layer.lora_A:
            module.set_submodule(name, layer.get_base_layer())
    module.requires_grad_(requires_grad=False)


def _shard(model: ChatModel, adapted: Any) -> None:
    """Spread each block's frozen weights over the team; the adapter, which is small, stays whole on each."""
    from torch.distributed.fsdp import fully_shard

    if Team.join().size < 2:
        raise InputError("shard: start several processes with `accelerate launch`, or leave it out")
    whole = {p for n, p in adapted.named_parameters() if p.requires_grad or "lora_" in n}
    for block in model.blocks:
        fully_shard(block, ignored_params=whole)


def _check_learnt(adapted: Any) -> None:
    """LoRA's second factors start at zero: one that still is has learnt nothing, and if all are, the training has not."""
    second = {n: p for n, p in adapted.named_parameters() if "lora_B" in n and p.requires_grad}
    idle = [name for name, p in second.items() if not p.detach().any()]
    if len(idle) == len(second):
        raise GuardError("training left every adapter at zero: no gradient reached it")
    if idle:
        log.warning(
            "%d of %d adapters are still zero, for no token came to their maps (experts, parts that the model does not run on text): %s",
            len(idle), len(second), idle[0].partition(".lora_B")[0].removeprefix("base_model.model."),
        )  # fmt: skip


def _save(adapted: Any, model: ChatModel, settings: TrainSettings, folder: Path) -> None:
    """Write the adapter in PEFT's layout; each file appears whole."""
    adapted.peft_config[ADAPTER].base_model_name_or_path = str(model.checkpoint.base)
    # Without PEFT's template of a model card, which says nothing here.
    with quiet_peft(), staged(folder, ("adapter_config.json", "adapter_model.safetensors")) as unfinished:
        adapted.save_pretrained(unfinished, selected_adapters=[ADAPTER], save_embedding_layers=False)
    write_parent(folder, model.checkpoint, between_stages=settings.between_stages)

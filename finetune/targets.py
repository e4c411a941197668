"""Which parts of a model an adapter is put on, and which get none."""

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mech.adapters import linear_maps
from mech.errors import InputError
from mech.models import ChatModel
from mech.weight_use import used_past

log = logging.getLogger(__name__)


def unfit(model: ChatModel) -> list[str] | None:
    """Linear maps that `all-linear` leaves out: an adapter there would fail, would not act where the map's weight does, or would meet no text."""
    within, maps = set(model.decoder.modules()), linear_maps(model)
    elsewhere = [name for name, module in maps.items() if module not in within]
    text = {name: module for name, module in maps.items() if module in within}
    routers, past = _routers(model), used_past(model.causal, text, in_training=True)
    if elsewhere:
        log.info("%s and its like (%d in all) read no text (pictures, say): they get no adapter", elsewhere[0], len(elsewhere))  # fmt: skip
    if routers:
        log.info("%s and its like give more than a tensor: they get no adapter", routers[0])
    if past:
        log.warning(
            "%s and its like (%d in all) get no adapter: this model uses their weights without calling them, or in several places",
            past[0], len(past),
        )  # fmt: skip
    return [*routers, *past, *elsewhere] or None


def check_in_memory(adapted: Any) -> None:
    """Refuse a fresh adapter on maps that are offloaded: it lies where their placeholders do, and holds nothing.

    Raises:
        InputError: some of what is to be trained lies on torch's device `meta`.
    """
    if any(p.is_meta for p in adapted.parameters() if p.requires_grad):
        raise InputError(
            "layers that are offloaded cannot be trained on: give `device_map` or `max_memory` room to hold them in memory"
        )


def check_reached(adapted: Any, name: str) -> None:
    """Refuse targets whose adapters would train nothing, or act only in part.

    Raises:
        InputError: a target's weight is used without calling the target, or in several places.
    """
    from peft.tuners.lora import LoraLayer

    causal = adapted.get_base_model()
    targets = {path: m for path, m in causal.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}
    if past := used_past(causal, targets, in_training=True):
        raise InputError(
            f"target_modules: {type(causal).__name__} uses the weight of {past[0]} (and of {len(past) - 1} more) without calling "
            f"the map, or in several places: an adapter there would train nothing, or act only in part: leave {past[0].split('.')[-1]} out"
        )


def say_what_stays(model: ChatModel) -> None:
    """Experts that are held as one tensor are no linear maps: PEFT adapts some architectures' and leaves others'."""
    from peft.tuners.lora import LoraLayer

    adapted = {m.get_base_layer() for m in model.blocks.modules() if isinstance(m, LoraLayer)}
    own = (m for m in model.blocks.modules() if any(p.ndim > 2 for p in m.parameters(recurse=False)))
    if whole := sorted({type(m).__name__ for m in own if m not in adapted}):
        log.info("%s: weights held as one tensor for all experts get no adapter", ", ".join(whole))


def _routers(model: ChatModel) -> list[str]:
    """Linear maps of classes of their own that give more than a tensor (Llama 4's and Phi-MoE's routers): PEFT cannot adapt them."""
    odd = {
        name: m
        for name, m in model.causal.named_modules()
        if isinstance(m, nn.Linear) and type(m) is not nn.Linear
    }
    found: list[str] = []
    with ExitStack() as stack:
        for name, module in odd.items():

            def look(_m: nn.Module, _i: Any, output: Any, name: str = name) -> None:
                if not isinstance(output, torch.Tensor):
                    found.append(name)

            stack.callback(module.register_forward_hook(look).remove)
        if odd:
            with torch.no_grad():
                model.decoder(
                    input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False
                )
    return found

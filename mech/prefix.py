"""The beginning that all prompts of a batch share (a system turn, an instruction), read once; every row gets its keys and values.

This is exact up to rounding where every layer attends to the whole past (`can_pack` finds out). Elsewhere, and under an intervention or a hook on
any module, nothing is shared: each row reads its whole prompt, so that whoever watches a pass sees every token of every row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mech.interventions import intervening
from mech.lengths import turning_point
from mech.models import ChatModel
from mech.packed_attention import can_pack
from mech.packing import n_common

MIN_SAVED = 256
"""Tokens that must be saved in a batch: the pass that reads its beginning reads all the weights once more."""


def shared_start(model: ChatModel, prompts: Sequence[tuple[int, ...]]) -> int:
    """How many leading tokens of a batch's prompts to read once: 0 where that is not exact, not wanted, or not worth it.

    At least one token of each prompt is left to read.
    """
    # What the first and the last in lexicographic order have in common, all have.
    shared = min(n_common(min(prompts), max(prompts)), min(map(len, prompts)) - 1)
    if shared * (len(prompts) - 1) < MIN_SAVED or intervening() or _hooked(model) or not _plain_cache(model):
        return 0
    return shared if can_pack(model) else 0


@torch.no_grad()
def read_once(model: ChatModel, prompts: Sequence[tuple[int, ...]], shared: int) -> Any:
    """A Hugging Face cache of the first `shared` tokens, repeated for each prompt."""
    ids: Int[Tensor, "1 shared"] = torch.tensor([prompts[0][:shared]], device=model.device)
    cache = model.decoder(input_ids=ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(prompts))
    return cache


def _hooked(model: ChatModel) -> bool:
    """Whether anybody's forward hook is on the model; Hugging Face leaves its own there once hidden states were asked for."""
    hooks = (
        h for m in model.hf.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )
    return any(not str(getattr(h, "__module__", "")).startswith("transformers.") for h in hooks)


def _plain_cache(model: ChatModel) -> bool:
    """Whether `generate` would keep plain keys and values, at angles that do not depend on a sequence's length."""
    wanted = model.causal.generation_config
    plain = wanted.cache_implementation is None and wanted.use_cache is not False
    return plain and turning_point(model) is None

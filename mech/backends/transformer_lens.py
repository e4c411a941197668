"""TransformerLens's bridge around a copy of the model (it changes the one that it is given)."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mech.backends.reader import Reader, Visit, as_they_come
from mech.conventions import to_transformer_lens_name
from mech.errors import InputError
from mech.extras import require
from mech.models import ChatModel
from mech.sites import Site


def bridge_of(model: ChatModel) -> Any:
    """A `TransformerBridge` of a copy of the checkpoint: as much memory again as the weights take.

    A live adapter is merged into the copy. Attention runs eagerly there, as the bridge's hooks need it.

    Raises:
        MissingDependencyError: TransformerLens is not installed.
        InputError: it does not know this architecture.
    """
    require("transformer_lens", extra="backends")
    from transformer_lens.model_bridge import TransformerBridge

    hf = copy.deepcopy(model.hf).eval()
    if hasattr(hf, "merge_and_unload"):
        hf = hf.merge_and_unload()
    # It looks an architecture up by this name, which only what was loaded from a folder has.
    hf.config.architectures = hf.config.architectures or [type(hf).__name__]
    try:
        return TransformerBridge.boot_transformers(
            str(model.checkpoint.base),
            hf_model=hf,
            tokenizer=copy.deepcopy(model.tokenizer),
            device=str(model.device),
            dtype=model.dtype,
        )
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"TransformerLens cannot bridge {type(model.causal).__name__}: {error}") from error


def open_transformer_lens(model: ChatModel) -> Reader:
    """The bridge's forward pass, read by its own hooks; it runs the output head too."""
    bridge = bridge_of(model)

    @torch.no_grad()
    def read(ids: Int[Tensor, "batch seq"], wanted: Collection[tuple[Site, int]], visit: Visit) -> None:
        names = {to_transformer_lens_name(*place): place for place in as_they_come(wanted)}
        hooks = [(name, _shower(place, visit)) for name, place in names.items()]
        every = torch.ones_like(ids).to(model.device)  # padding comes last, where it reaches no other token
        bridge.run_with_hooks(ids.to(model.device), attention_mask=every, return_type=None, fwd_hooks=hooks)

    return read


def _shower(place: tuple[Site, int], visit: Visit) -> Any:
    def show(value: Tensor, hook: Any = None) -> None:
        visit(*place, value.flatten(2) if value.ndim == 4 else value)  # one head after the other

    return show

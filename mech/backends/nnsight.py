"""nnsight's tracing around the same model in memory."""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mech.backends.reader import Reader, Visit, as_they_come
from mech.conventions import module_path
from mech.extras import require
from mech.models import ChatModel
from mech.sites import BEFORE, Site, site_scale


def open_nnsight(model: ChatModel) -> Reader:
    """An nnsight wrapper around the model; its output head runs on the last token alone.

    Raises:
        MissingDependencyError: nnsight is not installed.
    """
    library = require("nnsight", extra="backends")
    traced = model.to_nnsight()

    @torch.no_grad()
    def read(ids: Int[Tensor, "batch seq"], wanted: Collection[tuple[Site, int]], visit: Visit) -> None:
        places = as_they_come(wanted)
        modules = [(_find(traced, module_path(model, *place)), place[0] in BEFORE) for place in places]
        with traced.trace(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1):
            saved = library.save([m.inputs if before else m.output for m, before in modules])
        for place, (_, before), kept in zip(places, modules, saved, strict=True):
            visit(*place, _first(kept, inputs=before) * site_scale(model, *place))

    return read


def _find(traced: Any, path: str) -> Any:
    """The envoy of a module: `model.layers.3.mlp`."""
    for part in path.split("."):
        traced = traced[int(part)] if part.isdigit() else getattr(traced, part)
    return traced


def _first(kept: Any, *, inputs: bool) -> Tensor:
    """The stream among a module's inputs (positional, then named) or outputs."""
    if inputs:
        positional, named = kept
        stream: Tensor = positional[0] if positional else named["hidden_states"]
    else:
        stream = kept[0] if isinstance(kept, tuple) else kept
    return stream

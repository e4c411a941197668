"""Hugging Face's own forward pass, read by hooks."""

from collections.abc import Collection

import torch
from jaxtyping import Int
from torch import Tensor

from mech.backends.reader import Reader, Visit
from mech.hooks import Edit, hooked
from mech.models import ChatModel
from mech.sites import Site


def open_hf(model: ChatModel) -> Reader:
    """The model itself, run without its output head."""

    @torch.no_grad()
    def read(ids: Int[Tensor, "batch seq"], wanted: Collection[tuple[Site, int]], visit: Visit) -> None:
        def at(place: tuple[Site, int]) -> Edit:
            return lambda h: visit(*place, h)

        with hooked(model, {place: at(place) for place in wanted}):
            model.decoder(input_ids=ids.to(model.device), use_cache=False)

    return read

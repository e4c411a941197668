"""Rows of a generation that have ended leave its batch, and their keys and values its cache.

Where an architecture keeps what it has read in a cache whose rows can be taken out; whether it does is found out by trying.
"""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech.models import ChatModel

SHARE = 0.25
"""Of a batch's rows, how many must have ended before they are taken out: that costs about one pass of those that stay."""


class Enough:
    """A stopping criterion: all rows, once `SHARE` of them have ended.

    Not before each has been read once behind its first token, so that an intervention on what is generated meets every row.
    """

    def __init__(self, stops: Collection[int], n_prompt: int) -> None:
        self._stops, self._n_prompt = sorted(stops), n_prompt

    def __call__(self, ids: Int[Tensor, "batch seq"], _scores: Any, **_: Any) -> Bool[Tensor, " batch"]:
        """Whether each row may stop: all or none."""
        said = ids[:, self._n_prompt :]
        if said.shape[1] < 2:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        ended = torch.isin(said, torch.tensor(self._stops, device=ids.device)).any(1)
        return (ended.float().mean() >= SHARE).expand(len(ids))


def empty_cache(model: ChatModel) -> Any:
    """The Hugging Face cache that `generate` would make, so that whoever made it can take rows out of it."""
    from transformers import DynamicCache

    return DynamicCache(config=model.causal.config)


def rows_can_leave(model: ChatModel) -> bool:
    """Whether what the model has read of some rows can be kept without the others': found out by trying, once a model.

    Recurrent states, states kept outside the cache and caches without rows say no. Call it before any hook is on the model.
    """
    if "_rows_can_leave" not in vars(model):
        vars(model)["_rows_can_leave"] = _goes_on_alone(model)
    found: bool = vars(model)["_rows_can_leave"]
    return found


@torch.no_grad()
def _goes_on_alone(model: ChatModel) -> bool:
    """Read two rows, take out the first, and read on: the other's next state has to be its own, not what the first would have had."""
    if (
        model.device.type == "mps"
    ):  # there `generate` stops a step late, and a sample would have been drawn in vain
        return False
    size = model.causal.config.get_text_config().vocab_size
    rows = torch.tensor([[7, 8, 9, 10, 3], [21, 5, 14, 11, 3]], device=model.device) % size
    try:
        cache = empty_cache(model)
        model.decoder(input_ids=rows[:, :-1], past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([1]))
        alone = model.decoder(input_ids=rows[1:, -1:], past_key_values=cache, use_cache=True)
        whole = model.decoder(input_ids=rows, use_cache=False)
        found, (other, own) = _last(alone), _last(whole)
    # It takes no such cache, or a part of it has no rows.
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    return bool(len(found) == 1 and (found[0] - own).norm() <= 0.1 * (other - own).norm())


def _last(out: Any) -> Float[Tensor, "batch d"]:
    last: Tensor = out.last_hidden_state[:, -1].float()
    return last

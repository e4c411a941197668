"""Running rows through the decoder, the shared prefix once.

Rows are padded on the right: under causal attention padding behind a row cannot reach it, so no mask is
needed and left padding's position bookkeeping does not exist. The prefix's keys and values are computed for
one row and repeated for the batch. Where nothing acts on rows one by one, `mech.packing` is faster.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech.batching import Batch, plan_batches
from mech.interventions import differ_by_row
from mech.models import ChatModel
from mech.positions import declared

Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer for one row: [1, heads, prefix, d_head]."""


def can_share_prefix(model: ChatModel) -> bool:
    """Whether every layer attends to the whole past by plain keys and values.

    Sliding windows, recurrent states and shared caches are left alone: there the prefix is run per row.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=model.causal.config).layers
    return len(layers) == model.n_layers and all(type(layer) is DynamicLayer for layer in layers)


def iterate(
    model: ChatModel,
    sequences: Sequence[Sequence[int]],
    shareable: Sequence[int],
    *,
    token_budget: int = 2048,
) -> Iterator[tuple[Batch, Prefix | None]]:
    """Plan batches and yield each with its prefix's keys and values, computed once a group.

    Interventions act on a prefix as they would on each row's own copy of it: its tokens are declared as prompt.
    Those that hold other values for each row forbid sharing.

    Args:
        model: whose prefixes to compute.
        sequences: token ids of each row.
        shareable: how many leading tokens of each row the caller does not need to see; of the prompt, and not
            its last.
        token_budget: padded tokens a batch.
    """
    if differ_by_row() or not can_share_prefix(model):
        shareable = [0] * len(sequences)
    held: tuple[int, ...] = ()
    prefix: Prefix | None = None
    for batch in plan_batches(sequences, shareable, token_budget=token_budget):
        if batch.prefix != held:
            held = batch.prefix
            with declared(prefix_masks(len(held), model.device)):
                prefix = run_prefix(model, held) if held else None
        yield batch, prefix


def prefix_masks(length: int, device: torch.device) -> dict[str, Bool[Tensor, "1 prefix"]]:
    """A shared prefix is prompt, but not its last token, and no response."""
    yes = torch.ones(1, length, dtype=torch.bool, device=device)
    return {"all": yes, "prompt": yes, "prompt_last": ~yes, "response": ~yes}


def run_prefix(model: ChatModel, ids: Sequence[int]) -> Prefix:
    """Keys and values of a prefix, for one row."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.causal.config)
    model.decoder(
        input_ids=torch.tensor([list(ids)], device=model.device), past_key_values=cache, use_cache=True
    )
    return [(layer.keys, layer.values) for layer in cache.layers]


def run_rests(
    model: ChatModel, ids: Int[Tensor, "batch seq"], prefix: Prefix | None
) -> Float[Tensor, "batch seq d"]:
    """Final-norm states of right-padded rows that continue a prefix (or start the sequence)."""
    from transformers import DynamicCache

    if prefix is None:
        hidden: Tensor = model.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return hidden
    size = ids.shape[0]
    repeated = [(k.expand(size, -1, -1, -1), v.expand(size, -1, -1, -1)) for k, v in prefix]
    cache = DynamicCache(repeated)
    continued: Tensor = model.decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    return continued


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> Int[Tensor, "batch seq"]:
    """Token ids as one tensor, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)


def pad_id(model: ChatModel) -> int:
    """Any valid id will do for padding on the right; the tokenizer's own where it has one."""
    return int(model.tokenizer.pad_token_id or 0)

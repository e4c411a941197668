"""Sites: places in the residual stream, found by structure.

Layers count from 0 and name block outputs: `resid_post` of layer l is Hugging Face's `hidden_states[l + 1]`
(except after the last block, where Hugging Face has applied the final norm) and TransformerLens's
`blocks.l.hook_resid_post`.
"""

from typing import Literal, get_args

from torch import nn

from mech.errors import InputError
from mech.models import ChatModel

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]

SITES: tuple[Site, ...] = get_args(Site)

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


def site_module(model: ChatModel, site: Site, layer: int) -> nn.Module:
    """The module whose output (for `resid_pre`: whose input) is this site at this layer.

    Raises:
        InputError: unknown site, layer out of range, or a block without a part of that name.
    """
    if site not in SITES:
        raise InputError(f"unknown site {site!r}; there are {', '.join(SITES)}")
    if not 0 <= layer < model.n_layers:
        raise InputError(f"layer {layer} is out of range: this model has layers 0 to {model.n_layers - 1}")
    block = model.blocks[layer]
    if site in ("resid_pre", "resid_post"):
        return block
    names, norm = (
        (_ATTENTION, "post_attention_layernorm")
        if site == "attn_out"
        else (_MLP, "post_feedforward_layernorm")
    )
    # Blocks with a norm behind each part (Gemma 2 and 3) add that norm's output to the stream.
    if hasattr(block, "pre_feedforward_layernorm") and hasattr(block, norm):
        found = getattr(block, norm)
    else:
        found = next((getattr(block, name) for name in names if hasattr(block, name)), None)
    if not isinstance(found, nn.Module):
        parts = ", ".join(name for name, _ in block.named_children())
        raise InputError(f"{type(block).__name__}: no part for {site}; its parts are {parts}")
    return found

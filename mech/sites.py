"""Sites: places in the residual stream, found by structure.

Layers count from 0 and name block outputs: `resid_post` of layer l is Hugging Face's `hidden_states[l + 1]`
(except after the last block, where Hugging Face has applied the final norm) and TransformerLens's
`blocks.l.hook_resid_post`.

`attn_out` and `mlp_out` are what a block adds to the stream: where it multiplies a part's output first (Granite), the product.
`attn_head_out` is what the heads hand to attention's output projection, one head after the other: [heads · d_head] wide.
"""

from typing import Any, Literal, get_args

from torch import nn

from mech.errors import InputError
from mech.models import ChatModel

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "attn_head_out"]

SITES: tuple[Site, ...] = get_args(Site)

BEFORE: tuple[Site, ...] = ("resid_pre", "attn_head_out")
"""Sites that are their module's input, not its output."""

ADDED: tuple[Site, ...] = ("attn_out", "mlp_out")
"""Sites that are what a part of a block adds to the stream."""

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_NORMS_BEHIND = (
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_norm1", "post_norm2"),
)
"""A block's norms behind attention and behind the MLP, through which each output goes before it is added to the stream."""
_MULTIPLIERS = ("residual_multiplier", "residual_scale")
"""A block's factor by which it multiplies the output of attention and of the MLP before adding it to the stream."""
_PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo")


def site_module(model: ChatModel, site: Site, layer: int) -> nn.Module:
    """The module whose output (for those in `BEFORE`: whose input) is this site at this layer.

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
    if site == "attn_head_out":
        return _part(_part(block, _ATTENTION, site), _PROJECTION, site)
    attention = site == "attn_out"
    # Blocks with a norm behind each part (Gemma 2 and 3, OLMo 2, GLM 4, AFMoE) add that norm's output to the stream. Elsewhere
    # `post_attention_layernorm` stands before the MLP: what tells them apart is the norm behind the MLP.
    for of_attention, of_mlp in _NORMS_BEHIND:
        if hasattr(block, of_mlp) and hasattr(block, of_attention):
            return _part(block, (of_attention if attention else of_mlp,), site)
    return _part(block, _ATTENTION if attention else _MLP, site)


def site_scale(model: ChatModel, site: Site, layer: int) -> float:
    """What the block multiplies the module's output by before adding it to the stream: 1 for most."""
    if site not in ADDED:
        return 1.0
    block = model.blocks[layer]
    found = (getattr(block, name, None) for name in _MULTIPLIERS)
    return next((float(m) for m in found if isinstance(m, int | float)), 1.0)


def is_parts_own(model: ChatModel, site: Site, layer: int) -> bool:
    """Whether a site is its part's own output: no norm behind the part, nothing that the block multiplies it by."""
    if site not in ADDED:
        return True
    part = _part(model.blocks[layer], _ATTENTION if site == "attn_out" else _MLP, site)
    return site_module(model, site, layer) is part and site_scale(model, site, layer) == 1.0


def site_width(model: ChatModel, site: Site, layer: int = 0) -> int:
    """Numbers a token has at a site: d_model, and heads · d_head at `attn_head_out`."""
    if site != "attn_head_out":
        return model.d_model
    projection: Any = site_module(model, site, layer)
    weight = getattr(projection, "base_layer", projection).weight  # below a live adapter
    # A linear map holds [out, in], GPT-2's Conv1D [in, out].
    return int(
        weight.shape[1]
        if isinstance(projection, nn.Linear) or hasattr(projection, "in_features")
        else weight.shape[0]
    )


def n_heads(model: ChatModel) -> int:
    """Query heads of a layer."""
    return int(model.causal.config.get_text_config().num_attention_heads)


def _part(of: nn.Module, names: tuple[str, ...], site: Site) -> nn.Module:
    found = next((getattr(of, name) for name in names if hasattr(of, name)), None)
    if not isinstance(found, nn.Module):
        parts = ", ".join(name for name, _ in of.named_children())
        raise InputError(f"{type(of).__name__}: no part for {site}; its parts are {parts}")
    return found

"""Other people's names for the same places, both ways.

Here a place is a site and a layer; layers count from 0 and name block outputs. Converters stand at the border only:

| whose | block l's output |
|---|---|
| Hugging Face `hidden_states` | `[l + 1]` (the last entry is after the final norm) |
| TransformerLens | `blocks.l.hook_resid_post` |
| nnsight | the output of the block's module, `model.layers.l` |
| nnterp | `layers_output[l]` (of attention and MLP: see `to_nnterp_name`) |
| persona_vectors `.pt` | row `l + 1`; row 0 is the embedding |
| assistant-axis `.pt` | row `l` |
| repeng, llama.cpp control vectors | `l`, or counted from the end (-1 is the last block); `direction.l` in GGUF files, which have no layer 0 |
| steering-vectors | `l` |
"""

import re

from mech.errors import InputError
from mech.layer_numbers import counted, from_hidden_states_index, from_repeng_layer, to_hidden_states_index
from mech.models import ChatModel
from mech.sites import BEFORE, SITES, Site, is_parts_own, site_module, site_scale

__all__ = [
    "from_hidden_states_index",
    "from_module_path",
    "from_nnterp_name",
    "from_repeng_layer",
    "from_transformer_lens_name",
    "module_path",
    "to_hidden_states_index",
    "to_nnterp_name",
    "to_transformer_lens_name",
]

_TRANSFORMER_LENS: dict[Site, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "attn_head_out": "attn.hook_z",
}
_NNTERP: dict[Site, str] = {
    "resid_pre": "layers_input",
    "resid_post": "layers_output",
    "attn_out": "attentions_output",
    "mlp_out": "mlps_output",
}


def to_transformer_lens_name(site: Site, layer: int) -> str:
    """`blocks.3.hook_resid_post`; heads are [batch, seq, head, d_head] there."""
    return f"blocks.{counted(layer)}.{_of(_TRANSFORMER_LENS, site, 'TransformerLens')}"


def from_transformer_lens_name(name: str) -> tuple[Site, int]:
    """The place of `blocks.3.hook_resid_post`."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    known = {hook: site for site, hook in _TRANSFORMER_LENS.items()}
    known["hook_out"] = "resid_post"  # the bridge's own name
    if not match or match[2] not in known:
        raise InputError(f"{name!r} is not one of blocks.LAYER.({', '.join(known)})")
    return known[match[2]], int(match[1])


def to_nnterp_name(site: Site, layer: int, model: ChatModel | None = None) -> str:
    """`layers_output[3]`.

    nnterp's `attentions_output` and `mlps_output` are what the parts give. In most models blocks add just that; in some they norm or multiply it
    first (Gemma 2 and 3, OLMo 2, GLM 4, Granite), and ours is what they add.

    Args:
        site: where in the block.
        layer: which block.
        model: checked for that, where it is given.

    Raises:
        InputError: nnterp has no such place in this model.
    """
    if model is not None and not is_parts_own(model, site, layer):
        raise InputError(
            f"{type(model.causal).__name__}: nnterp has no {site}: its {_NNTERP[site]} is what the part gives, before the block norms or multiplies "
            f"it; for a trace of your own, {site} is the output of {module_path(model, site, layer)}"
            + (f", times {scale}" if (scale := site_scale(model, site, layer)) != 1.0 else "")
        )
    return f"{_of(_NNTERP, site, 'nnterp')}[{counted(layer)}]"


def from_nnterp_name(name: str) -> tuple[Site, int]:
    """The place of `layers_output[3]`."""
    match = re.fullmatch(r"(\w+)\[(\d+)\]", name)
    known = {theirs: site for site, theirs in _NNTERP.items()}
    if not match or match[1] not in known:
        raise InputError(f"{name!r} is not one of ({', '.join(known)})[LAYER]")
    return known[match[1]], int(match[2])


def module_path(model: ChatModel, site: Site, layer: int) -> str:
    """Path of a site's module in the causal language model, for nnsight and plain hooks: `model.layers.3.mlp`.

    The site is its output; for those of `mech.sites.BEFORE` its input.
    """
    wanted = site_module(model, site, layer)
    path: str = next(path for path, module in model.causal.named_modules() if module is wanted)
    return path


def from_module_path(model: ChatModel, path: str, *, before: bool = False) -> tuple[Site, int]:
    """The place whose module stands at a path; `before` for one that is the module's input.

    Raises:
        InputError: no site stands there.
    """
    for layer in range(model.n_layers):
        for site in SITES:
            if (site in BEFORE) == before and module_path(model, site, layer) == path:
                return site, layer
    raise InputError(f"{path!r}: no site's module; block 0's output is {module_path(model, 'resid_post', 0)}")


def _of(names: dict[Site, str], site: Site, whose: str) -> str:
    if site not in names:
        raise InputError(f"{whose} has no {site}; it has {', '.join(names)}")
    return names[site]

"""Forward hooks as context managers: handles are always released, also after an exception."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mech.errors import InputError
from mech.models import ChatModel
from mech.modes import evaluating
from mech.sites import ADDED, BEFORE, Site, site_module, site_scale, site_width

Edit = Callable[[Float[Tensor, "batch seq d"]], Float[Tensor, "batch seq d"] | None]
"""Sees a site's tensor; returns a replacement, or None to leave it."""


@contextmanager
def hooked(model: ChatModel, edits: Mapping[tuple[Site, int], Edit]) -> Iterator[None]:
    """Call `edits[site, layer]` on each site's tensor in every forward pass inside the context.

    Raises:
        InputError: unknown site, a layer out of range, or a site that this architecture does not have (`check_places`).
    """
    check_places(model, edits)
    with ExitStack() as stack:
        for place, edit in edits.items():
            stack.callback(_register(model, place, _of_a_stream(place, edit)).remove)
        yield


def _of_a_stream(place: tuple[Site, int], edit: Edit) -> Edit:
    """The edit, which refuses any tensor but [batch, seq, d]: some architectures carry several streams at once (Gemma 3n)."""

    def checked(h: Tensor) -> Tensor | None:  # of any shape
        if h.ndim != 3:
            raise InputError(
                f"{place[0]} at layer {place[1]} has shape {tuple(h.shape)}, not [batch, sequence, d]: this architecture is not supported"
            )
        return edit(h)

    return checked


def check_places(model: ChatModel, places: Collection[tuple[Site, int]]) -> None:
    """Refuse places that this architecture does not have.

    `attn_out` and `mlp_out` must be what a block adds to the stream. Some blocks' parts add the stream themselves (BLOOM, MPT) or weigh it
    (MiniMax), so the first call for a model compares the two. That takes a forward pass: call it before hooks are on the model.

    Raises:
        InputError: a part's output that is not what its block adds; no such place; or heads whose width differs from layer to layer.
    """
    for site, layer in places:
        site_module(model, site, layer)  # says what is wrong with a place in our words
        if site == "attn_head_out" and (width := site_width(model, site, layer)) != site_width(model, site):
            raise InputError(
                f"{type(model.causal).__name__}: attn_head_out is not supported: its layers' heads differ ({width} numbers at layer {layer}, "
                f"{site_width(model, site)} at layer 0)"
            )
        if site in ADDED and layer in odd_blocks(model):
            raise InputError(
                f"{type(model.blocks[layer]).__name__}: {site} is not supported: what its attention and MLP give is not what the "
                f"block adds to the stream (layer {layer})"
            )


def odd_blocks(model: ChatModel) -> frozenset[int]:
    """Layers whose output is not input + `attn_out` + `mlp_out`, found by one forward pass, once a model. A layer that lacks a part is left out."""
    if "_odd_blocks" not in vars(model):
        vars(model)["_odd_blocks"] = _not_adding_up(model)  # beside the model's own cached properties
    found: frozenset[int] = vars(model)["_odd_blocks"]
    return found


@torch.no_grad()
def _not_adding_up(model: ChatModel) -> frozenset[int]:
    seen: dict[int, dict[Site, Tensor]] = {layer: {} for layer in range(model.n_layers)}
    sites: tuple[Site, ...] = ("resid_pre", *ADDED, "resid_post")

    def keeper(site: Site, layer: int) -> Edit:
        def keep(h: Tensor) -> None:  # of any shape
            seen[layer][site] = h.detach().to("cpu", torch.float64, copy=True)  # some blocks add in place

        return keep

    with ExitStack() as stack:
        stack.enter_context(evaluating(model.hf))
        for layer in seen:
            for site in sites:
                try:
                    stack.callback(_register(model, (site, layer), keeper(site, layer)).remove)
                except InputError:  # a part that the block does not have
                    continue
        size = model.causal.config.get_text_config().vocab_size
        model.decoder(input_ids=torch.arange(3, 11, device=model.device).unsqueeze(0) % size, use_cache=False)
    rounding = 2 * torch.finfo(model.dtype).eps
    return frozenset(
        layer for layer, found in seen.items() if len(found) == len(sites) and not _adds_up(found, rounding)
    )


def _adds_up(found: Mapping[Site, Tensor], rounding: float) -> bool:
    """Whether output − input is what the parts add, token by token, up to rounding of the stream."""
    before, attention, mlp, after = (
        found["resid_pre"],
        found["attn_out"],
        found["mlp_out"],
        found["resid_post"],
    )
    if not before.shape == attention.shape == mlp.shape == after.shape:
        return False
    left = (before + attention + mlp - after).norm(dim=-1)
    allowed = 1e-4 * (after - before).norm(dim=-1) + rounding * torch.maximum(
        before.norm(dim=-1), after.norm(dim=-1)
    )
    return bool((left <= allowed).all())


def _register(model: ChatModel, place: tuple[Site, int], edit: Edit) -> RemovableHandle:
    site, layer = place
    module = site_module(model, site, layer)
    if site in BEFORE:
        return module.register_forward_pre_hook(_before(edit), with_kwargs=True)
    return module.register_forward_hook(_after(_scaled(edit, site_scale(model, site, layer))))


def _scaled(edit: Edit, scale: float) -> Edit:
    """An edit of what is added to the stream, made to act on a module whose output the block first multiplies by `scale`."""
    if scale == 1.0:
        return edit

    def scaled(h: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"] | None:
        added = h * scale
        edited = edit(added)
        return None if edited is None else h + (edited - added) / scale  # exactly h where nothing was edited

    return scaled


def _after(edit: Edit) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple | list):
            return edit(output)
        edited = edit(output[0])
        return None if edited is None else type(output)((edited, *output[1:]))

    return hook


def _before(edit: Edit) -> Callable[..., Any]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positional = bool(inputs)
        edited = edit(inputs[0] if positional else kwargs["hidden_states"])
        if edited is None:
            return None
        return (
            ((edited, *inputs[1:]), kwargs) if positional else (inputs, {**kwargs, "hidden_states": edited})
        )

    return hook

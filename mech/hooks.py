"""Forward hooks as context managers: handles are always released, also after an exception."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mech.models import ChatModel
from mech.sites import BEFORE, Site, site_module

Edit = Callable[[Float[Tensor, "batch seq d"]], Float[Tensor, "batch seq d"] | None]
"""Sees a site's tensor; returns a replacement, or None to leave it."""


@contextmanager
def hooked(model: ChatModel, edits: Mapping[tuple[Site, int], Edit]) -> Iterator[None]:
    """Call `edits[site, layer]` on each site's tensor in every forward pass inside the context."""
    with ExitStack() as stack:
        for (site, layer), edit in edits.items():
            module = site_module(model, site, layer)
            if site in BEFORE:
                handle = module.register_forward_pre_hook(_before(edit), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_after(edit))
            stack.callback(handle.remove)
        yield


def _after(edit: Edit) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        edited = edit(tensor)
        if edited is None:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

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

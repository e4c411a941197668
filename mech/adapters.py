"""A live adapter's parts: on in some layers only, and its weights by themselves.

One copy of the weights serves base and finetuned: load with `load_model(..., merge=False)`.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.errors import InputError
from mech.models import ChatModel


@dataclass(frozen=True)
class Update:
    """What LoRA adds to one linear map: ΔW = left @ right, its scale (α/√r or α/r) in `left`."""

    name: str
    """The map's path within its block (`mlp.down_proj`)."""
    layer: int
    left: Float[Tensor, "out r"]
    right: Float[Tensor, "r in"]


def lora_modules(model: ChatModel) -> dict[tuple[int, str], Any]:
    """PEFT's LoRA modules by layer and path within the block.

    Raises:
        InputError: the model has no live adapter.
    """
    from peft.tuners.lora import LoraLayer

    found = {
        (layer, name): module
        for layer, block in enumerate(model.blocks)
        for name, module in block.named_modules()
        if isinstance(module, LoraLayer)
    }
    if not found:
        raise InputError(f"{model.checkpoint}: no live adapter: load it with load_model(..., merge=False)")
    return found


@contextmanager
def adapter_layers(model: ChatModel, layers: Collection[int]) -> Iterator[None]:
    """Let the adapter act in these layers only: all of them is the finetuned model, none the base.

    Raises:
        InputError: no live adapter, or a layer that the model does not have.
    """
    modules = lora_modules(model)
    if wrong := [layer for layer in layers if not 0 <= layer < model.n_layers]:
        raise InputError(f"layer {wrong[0]} is out of range: this model has layers 0 to {model.n_layers - 1}")
    before = {place: module.disable_adapters for place, module in modules.items()}
    try:
        for (layer, _), module in modules.items():
            module._disable_adapters = layer not in layers
        yield
    finally:
        for place, module in modules.items():
            module._disable_adapters = before[place]


def updates(model: ChatModel, *, writing: bool = False) -> list[Update]:
    """What live adapters add to each linear map, as factors; no ΔW is ever formed. Those of a stack stand side by side.

    Args:
        model: with a live adapter.
        writing: only maps whose output goes into the residual stream (attention's and the MLP's last ones).

    Raises:
        InputError: no live adapter.
    """
    found = []
    for (layer, name), module in lora_modules(model).items():
        if writing and not _writes(model, layer, name, module):
            continue
        acting = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        left = [module.lora_B[a].weight.detach().float() * float(module.scaling[a]) for a in acting]
        right = [module.lora_A[a].weight.detach().float() for a in acting]
        if acting:
            found.append(Update(name, layer, torch.cat(left, 1), torch.cat(right)))
    return found


def _writes(model: ChatModel, layer: int, name: str, module: Any) -> bool:
    """Whether a map is the last of its part of the block, and as wide as the stream."""
    part = model.blocks[layer].get_submodule(name.split(".", maxsplit=1)[0])
    linear = [m for m in part.modules() if isinstance(getattr(m, "base_layer", m), nn.Linear) or type(getattr(m, "base_layer", m)).__name__ == "Conv1D"]  # fmt: skip
    last = [m for m in linear if hasattr(m, "base_layer")][-1:] or linear[-1:]
    width = next(iter(module.lora_B.values())).weight.shape[0]
    return bool(last and last[0] is module and width == model.d_model)


def orthonormal(columns: Float[Tensor, "d k"], *, tolerance: float = 1e-6) -> Float[Tensor, "d r"]:
    """An orthonormal basis of what columns span."""
    left, sizes, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    basis: Tensor = left[:, sizes > tolerance * sizes.max().clamp_min(1e-300)]
    return basis

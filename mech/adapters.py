"""A live adapter's parts: on in some layers only, and its weights by themselves.

One copy of the weights serves base and finetuned: load with `load_model(..., merge=False)`.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.checkpoint import Checkpoint
from mech.errors import InputError
from mech.files import read_json
from mech.models import ChatModel, skeleton


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
    """Let the adapter act in these layers only. With all layers the model is the finetuned one, with none it is the base.

    Raises:
        InputError: no live adapter, one that also changes what cannot be switched by layer, or a layer that the model does
            not have.
    """
    modules = lora_modules(model)
    if odd := beyond_layers(model):
        raise InputError(
            f"{model.checkpoint}: this adapter also changes {', '.join(odd[:3])}, which no layer switches on or off: "
            "base and finetuned cannot share one copy of the weights"
        )
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


def beyond_layers(model: ChatModel) -> list[str]:
    """What a live adapter changes beside the maps that `lora_modules` finds: embedding or head, whole modules, biases."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = set(lora_modules(model).values())
    found = [
        name
        for name, module in model.causal.named_modules()
        if (isinstance(module, LoraLayer) and module not in inside)
        or isinstance(module, AuxiliaryTrainingWrapper)
    ]
    biases = [
        c.bias for c in getattr(model.hf, "peft_config", {}).values() if getattr(c, "bias", "none") != "none"
    ]
    return found + [f"biases (bias: {bias})" for bias in biases]


def updates(model: ChatModel, *, writing: bool = False) -> list[Update]:
    """What live adapters add to each linear map, as factors; no ΔW is ever formed. Those of a stack stand side by side.

    Args:
        model: loaded with a live adapter (`load_model(..., merge=False)`).
        writing: only maps whose output goes into the residual stream (attention's and the MLP's last ones).

    Raises:
        InputError: no live adapter, or not plain LoRA (DoRA): what it adds is not a product of two factors.
    """
    found, writers = [], writing_maps(model) if writing else set()
    for (layer, name), module in lora_modules(model).items():
        if writing and (layer, name) not in writers:
            continue
        acting = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        if any(adapter in getattr(module, "lora_variant", {}) for adapter in acting):
            raise InputError(
                f"{model.checkpoint}: not plain LoRA: what it adds to {name} is not a product of two factors"
            )
        left = [module.lora_B[a].weight.detach().float() * float(module.scaling[a]) for a in acting]
        right = [module.lora_A[a].weight.detach().float() for a in acting]
        if acting:
            found.append(Update(name, layer, torch.cat(left, 1), torch.cat(right)))
    return found


def writing_maps(model: ChatModel) -> set[tuple[int, str]]:
    """Maps whose output goes into the residual stream, by layer and path: the last linear map of each part of a block."""
    found = set()
    for layer, block in enumerate(model.blocks):
        for part_name, part in block.named_children():
            linear = [(name, m) for name, m in part.named_modules(prefix=part_name) if _is_linear(name, m)]
            if linear and _width(linear[-1][1]) == model.d_model:
                found.add((layer, linear[-1][0]))
    return found


def linear_maps(model: ChatModel) -> dict[str, nn.Module]:
    """Every linear map but the output head, under an adapter or not, by its path in the causal language model."""
    head = model.causal.get_output_embeddings()
    return {name: m for name, m in model.causal.named_modules() if _is_linear(name, m) and m is not head}


def writing_maps_of(checkpoint: Checkpoint) -> set[tuple[int, str]]:
    """The same from the config of a checkpoint's base alone: no weights are loaded."""
    return writing_maps(skeleton(checkpoint))


def _is_linear(name: str, module: nn.Module) -> bool:
    """A linear map of the model, wrapped by LoRA or not; LoRA's own inner maps do not count."""
    inside = {"base_layer", "lora_A", "lora_B"} & set(name.split("."))
    base = getattr(module, "base_layer", module)
    return not inside and (isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D")


def _width(module: nn.Module) -> int:
    base: Any = getattr(module, "base_layer", module)
    return int(base.nf if type(base).__name__ == "Conv1D" else base.out_features)


def _place(key: str) -> tuple[int, str] | None:
    """Layer and path within its block of a first factor; None for any other tensor. The first number in a path counts the blocks.

    `base_model.model.model.layers.3.mlp.down_proj.lora_A.weight` is (3, `mlp.down_proj`).
    """
    path, factor, _ = key.partition(".lora_A.weight")
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not factor or not numbers:
        return None
    return int(parts[numbers[0]]), ".".join(parts[numbers[0] + 1 :])


def read_updates(folder: Path, places: Collection[tuple[int, str]] | None = None) -> list[Update]:
    """What an adapter adds to each linear map, read from its files: no model is loaded.

    Args:
        folder: in PEFT's layout.
        places: only maps at these layers and paths (`writing_maps_of`); all when left out.

    Raises:
        InputError: not plain LoRA (DoRA, another method): what it adds is not a product of two factors.
    """
    from peft.utils.other import get_pattern_key
    from safetensors import safe_open

    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise InputError(
            f"{folder}: not plain LoRA: what it adds to a weight is not a product of two factors"
        )
    alphas, found = config.get("alpha_pattern") or {}, []
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (not a mapping)
            place = _place(key)
            if place is None or (places is not None and place not in places):
                continue
            right = stored.get_tensor(key).float()
            left = stored.get_tensor(key.replace(".lora_A.", ".lora_B.")).float()
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = alphas.get(get_pattern_key(alphas, path), config["lora_alpha"])
            scale = alpha / (len(right) ** 0.5 if config.get("use_rslora") else len(right))
            found.append(Update(place[1], place[0], left * scale, right))
    return sorted(found, key=lambda u: (u.layer, u.name))


def orthonormal(columns: Float[Tensor, "d k"], *, tolerance: float = 1e-6) -> Float[Tensor, "d r"]:
    """An orthonormal basis of the columns' span; directions below `tolerance` of the largest singular value count as rounding."""
    left, sizes, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    basis: Tensor = left[:, sizes > tolerance * sizes.max().clamp_min(1e-300)]
    return basis

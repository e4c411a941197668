"""A checkpoint's adapters on its base: merged one after the other, the last one live, or all of them live."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mech.checkpoint import Adapter, Checkpoint
from mech.errors import InputError
from mech.files import read_json
from mech.quiet import quiet_peft
from mech.weight_use import used_past


def merged(model: Any, checkpoint: Checkpoint, *, last: bool) -> Any:
    """A base with its adapters merged, one after the other; the last one only where asked for.

    Raises:
        InputError: an adapter that does not fit, or that PEFT cannot merge.
    """
    for i, adapter in enumerate(checkpoint.adapters):
        model = put_adapter(model, adapter.path)
        if last or i + 1 < len(checkpoint.adapters):
            try:
                model = model.merge_and_unload(safe_merge=True)
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"{adapter.path}: cannot be merged ({str(error).splitlines()[0]})"
                ) from error
    return model


def merges_by_map(checkpoint: Checkpoint, dtype: torch.dtype, *, last: bool) -> bool:
    """Whether `merged_by_map` loses nothing: a base stored in this dtype, and plain LoRA updates of linear maps alone to merge."""
    if checkpoint.path.is_file():
        return False
    config = read_json(checkpoint.path / "config.json")
    stored = config.get("dtype", config.get("torch_dtype"))
    return stored == str(dtype).removeprefix("torch.") and all(
        _is_plain(adapter.path) for adapter in _to_merge(checkpoint, last=last)
    )


def merged_by_map(model: Any, checkpoint: Checkpoint, *, last: bool) -> Any:
    """A base in half precision with its adapters merged in float32: bit for bit what `merged` makes of it in float32, cast afterwards.

    One linear map at a time is taken to float32, so that a large model is never held in it, and need not lie in one place.

    Raises:
        InputError: as for `merged`.
    """
    from peft.tuners.lora import LoraLayer

    below = replace(checkpoint, adapters=_to_merge(checkpoint, last=last))
    if below.adapters:
        model = stacked(model, below)
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                try:
                    _merge_map(module, stage_names(below))
                except (RuntimeError, ValueError) as error:
                    raise InputError(
                        f"{below}: {name} cannot be merged ({str(error).splitlines()[0]})"
                    ) from error
        model = model.unload()
    for adapter in checkpoint.adapters[len(below.adapters) :]:
        model = put_adapter(model, adapter.path)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # PEFT holds them in float32: all of a model is in its one dtype
                parameter.data = parameter.data.to(model.dtype)
    return model


def _merge_map(module: Any, names: Sequence[str]) -> None:
    """Merge these adapters into one linear map, in float32 and wherever it lies."""
    from peft.tuners.tuners_utils import onload_layer

    with onload_layer(module):
        weight = module.get_base_layer().weight
        dtype, weight.data = weight.dtype, weight.data.float()
        module.merge(safe_merge=True, adapter_names=[name for name in names if name in module.lora_A])
        weight.data = weight.data.to(dtype)


def _to_merge(checkpoint: Checkpoint, *, last: bool) -> tuple[Adapter, ...]:
    return checkpoint.adapters if last else checkpoint.adapters[:-1]


def _is_plain(folder: Path) -> bool:
    from safetensors import safe_open

    config = read_json(folder / "adapter_config.json")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        factors = all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in stored.keys())  # noqa: SIM118
    return factors and config.get("peft_type") == "LORA" and not config.get("layer_replication")


def stage_names(checkpoint: Checkpoint) -> list[str]:
    """What the adapters of a stack are called, from the lowest up."""
    return [f"stage{i}" for i in range(1, len(checkpoint.adapters) + 1)]


def stacked(model: Any, checkpoint: Checkpoint) -> Any:
    """A base under all its adapters, each live: PEFT adds up what the active ones compute.

    Raises:
        InputError: an adapter that does not fit, or whose update depends on what lies below it.
    """
    names = stage_names(checkpoint)
    for name, adapter in zip(names, checkpoint.adapters, strict=True):
        if name != names[0] and read_json(adapter.path / "adapter_config.json").get("use_dora"):
            raise InputError(
                f"{adapter.path}: DoRA scales the weights as they stand below it, so above another adapter it can only be merged"
            )
        model = put_adapter(model, adapter.path, name)
    try:
        if names:
            model.base_model.set_adapter(names, inference_mode=True)
    except ValueError as error:  # two that replace one module
        raise InputError(
            f"{checkpoint}: cannot be stacked, only merged ({str(error).splitlines()[0]})"
        ) from error
    return model


def put_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """Put a LoRA adapter on a model, or beside those that a PEFT model has, as a live PEFT adapter of this name.

    Raises:
        InputError: the adapter's tensors do not fit this model: other names, or other shapes; or its layers lie on disk.
    """
    try:
        wrapped = _put(model, folder, name)
    except UserWarning as error:
        raise InputError(
            f"{folder}: an adapter cannot be put on layers that lie on disk: give `max_memory` or `device_map` room to hold "
            "them in memory"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{folder}: this adapter does not fit the model ({str(error).splitlines()[0]})"
        ) from error
    _check_tensors(wrapped, folder, name, stacked=wrapped is model)
    _check_reached(wrapped, folder, name)
    return wrapped


def _put(model: Any, folder: Path, name: str) -> Any:
    from peft import PeftModel

    with quiet_peft():
        # Weights on disk are placeholders to PEFT, and so would the adapter's be: torch only warns.
        warnings.filterwarnings("error", message=".*to a meta parameter")
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
        model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        return model


def _check_tensors(wrapped: Any, folder: Path, name: str, *, stacked: bool) -> None:
    """The file's tensors must be the model's, no more and no fewer: PEFT only warns."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        in_file = set(stored.keys())
    in_model = set(get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False))
    # PEFT saves embedding and head whole beside an adapter that touches them; it has put them on the model.
    ends = (wrapped.get_input_embeddings(), wrapped.get_output_embeddings())
    names = [name for name, module in wrapped.named_modules() if module in ends]
    whole = in_file & (
        {f"{name}{layer}.weight" for name in names for layer in ("", ".base_layer")} - in_model
    )
    if whole and stacked:
        raise InputError(
            f"{folder}: holds {min(whole)} whole, with what lies below it: it can be merged, not stacked"
        )
    if in_file - whole != in_model:
        odd = sorted((in_file - whole) ^ in_model)[:3]
        raise InputError(f"{folder}: adapter and model have different tensors ({', '.join(odd)}, ...)")


def _check_reached(wrapped: Any, folder: Path, name: str) -> None:
    """Live, an update acts where its map is called; merged, wherever the map's weight is used: they must be the same places."""
    from peft.tuners.lora import LoraLayer

    def acts(layer: Any) -> bool:
        second = layer.lora_B[name].weight if name in layer.lora_B else layer.lora_embedding_B.get(name)
        return second is not None and bool(second.any())

    causal = wrapped.get_base_model()
    maps = {path: m for path, m in causal.named_modules() if isinstance(m, LoraLayer) and acts(m)}
    if past := used_past(causal, maps, in_training=False):
        raise InputError(
            f"{folder}: changes {past[0]} (and {len(past) - 1} more), whose weight {type(causal).__name__} uses without calling the map, or in "
            "several places: live and merged, this adapter makes two different models, and which of them was trained nobody can tell"
        )

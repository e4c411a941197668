"""A checkpoint's adapters on its base: merged one after the other, the last one live, or all of them live."""

from pathlib import Path
from typing import Any

from mech.checkpoint import Checkpoint
from mech.errors import InputError
from mech.files import read_json
from mech.quiet import quiet_peft


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


def stacked(model: Any, checkpoint: Checkpoint) -> Any:
    """A base under all its adapters, each live: PEFT adds up what the active ones compute.

    Raises:
        InputError: an adapter that does not fit, or whose update depends on what lies below it.
    """
    names = [f"stage{i}" for i in range(1, len(checkpoint.adapters) + 1)]
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
        InputError: the adapter's tensors do not fit this model: other names, or other shapes.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        with quiet_peft():
            if isinstance(model, PeftModel):
                wrapped = model
                wrapped.load_adapter(str(folder), adapter_name=name, is_trainable=False)
            else:
                wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{folder}: this adapter does not fit the model ({str(error).splitlines()[0]})"
        ) from error
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        in_file = set(stored.keys())
    in_model = set(get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False))
    # PEFT saves embedding and head whole beside an adapter that touches them; it has put them on the model.
    ends = (wrapped.get_input_embeddings(), wrapped.get_output_embeddings())
    names = [name for name, module in wrapped.named_modules() if module in ends]
    whole = in_file & (
        {f"{name}{layer}.weight" for name in names for layer in ("", ".base_layer")} - in_model
    )
    if whole and wrapped is model:
        raise InputError(
            f"{folder}: holds {min(whole)} whole, with what lies below it: it can be merged, not stacked"
        )
    in_file -= whole
    if in_file != in_model:
        odd = sorted(in_file ^ in_model)[:3]
        raise InputError(f"{folder}: adapter and model have different tensors ({', '.join(odd)}, ...)")
    return wrapped

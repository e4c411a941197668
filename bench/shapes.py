"""Models to time: a real one by name, or one of a large model's shape with random weights, for speed does not depend on what they are.

On a GPU, memory is what its allocator held at its peak, and clocks are read after it has finished.
"""

import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1e6,
    },
    "qwen2.5-32b": {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "rope_theta": 1e6,
    },
    "seed-oss-36b": {
        "model_type": "seed_oss", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 155136, "rope_theta": 1e7,
    },
}  # fmt: skip
"""Configs of published models, as far as they set speed."""


def open_model(name: str, *, dtype: str, device: str, shape: str | None = None) -> Any:
    """A chat model: the one of this name, or, with its tokenizer, one of a shape with random weights drawn where it is to run.

    With a shape, `name` need only be a folder with a tokenizer and a chat template.
    """
    from mech.models import load_model

    return random_model(shape, name, dtype, device) if shape else load_model(name, dtype=dtype, device=device)


def random_model(shape: str, tokenizer: str, dtype: str, device: str) -> Any:
    """A model of a shape, its weights drawn from a fixed seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from mech.checkpoint import Checkpoint
    from mech.fetch import PACKAGED, model_folder
    from mech.models import ChatModel

    given = dict(SHAPES[shape])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    folder = model_folder(tokenizer) if tokenizer in PACKAGED else Path(tokenizer)
    checkpoint = Checkpoint(f"random {shape}", folder, digest=f"random {shape}, seed 0")
    return ChatModel(
        model.eval().requires_grad_(requires_grad=False), AutoTokenizer.from_pretrained(folder), checkpoint
    )


def synchronise(model: Any) -> None:
    """Wait for the device, so that the clock reads finished work."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def megabytes(device: Any) -> tuple[float, float]:
    """Held now, and at the peak since `forget_peak`: of a GPU its allocator's bytes, else this process's resident size (Linux)."""
    import torch

    if str(device).startswith("cuda"):
        return torch.cuda.memory_allocated(device) / 1e6, torch.cuda.max_memory_allocated(device) / 1e6
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return int(fields["VmRSS"]) / 1024, int(fields["VmHWM"]) / 1024


def forget_peak(device: Any) -> None:
    """Let the peak of `megabytes` begin anew."""
    import torch

    if str(device).startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_above(device: Any, run: Callable[[], object]) -> float:
    """Megabytes by which one run raises what is held."""
    forget_peak(device)
    before, _ = megabytes(device)
    run()
    return megabytes(device)[1] - before


def machine_named(device: str, *packages: str) -> str:
    """What the numbers were measured on, and with which versions."""
    import torch

    where = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    return ", ".join([where, *(f"{name} {version(name)}" for name in ("torch", "transformers", *packages))])

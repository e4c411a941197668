"""The ground floor: a chat model, where to read and write in it, how to intervene.

    from mech import Add, SystemPrompt, intervene, load_model
    from mech.generate import Sampling, generate

Names are imported on first use, so that `import mech` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mech.chat import ChatTemplate, Encoded, Identity, SystemPrompt
    from mech.checkpoint import Checkpoint
    from mech.errors import FileFormatError, GuardError, InputError, MechError
    from mech.interventions import Ablate, Add, Cap, Clamp, Patch, intervene
    from mech.models import ChatModel, load_model
    from mech.score import next_token_logits, response_logprobs
    from mech.sites import Site

_HOMES = {
    "Ablate": "interventions", "Add": "interventions", "Cap": "interventions", "Clamp": "interventions", "Patch": "interventions",
    "intervene": "interventions", "ChatModel": "models", "load_model": "models", "ChatTemplate": "chat",
    "Encoded": "chat", "Identity": "chat", "SystemPrompt": "chat", "Checkpoint": "checkpoint",
    "FileFormatError": "errors", "GuardError": "errors", "InputError": "errors", "MechError": "errors",
    "Site": "sites",
    "next_token_logits": "score", "response_logprobs": "score",
}  # fmt: skip

__all__ = [
    "Ablate",
    "Add",
    "Cap",
    "ChatModel",
    "ChatTemplate",
    "Checkpoint",
    "Clamp",
    "Encoded",
    "FileFormatError",
    "GuardError",
    "Identity",
    "InputError",
    "MechError",
    "Patch",
    "Site",
    "SystemPrompt",
    "intervene",
    "load_model",
    "next_token_logits",
    "response_logprobs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mech' has no attribute {name!r}")
    return getattr(import_module(f"mech.{_HOMES[name]}"), name)

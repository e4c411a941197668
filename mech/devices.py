"""Where tensors go."""

from typing import Any

import torch


def input_device(module: Any) -> torch.device:
    """Where a module's inputs go: where its weight lies, or, of one that is offloaded, where it is brought to compute."""
    device = torch.device(module.weight.device)
    hook = getattr(module, "_hf_hook", None)
    return device if device.type != "meta" or hook is None else torch.device(hook.execution_device)

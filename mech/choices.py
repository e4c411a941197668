"""What is chosen by name, in a spec, on a command line and in the code that acts on it: one list each, read without a model library."""

from typing import Literal, get_args

Position = Literal["all", "prompt", "prompt_last", "response", "generated"]
"""`all` but padding; the prompt; its last token; the assistant's tokens (read, or generated so far); only those that are being
generated."""

POSITIONS: tuple[Position, ...] = get_args(Position)

STACK: Literal["stack"] = "stack"
"""All adapters of a checkpoint live at once, none merged."""

Merge = bool | Literal["stack"]
"""What becomes of a checkpoint's adapters when it is loaded: see `mech.models.load_model`."""

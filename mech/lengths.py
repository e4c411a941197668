"""How long a row may be, and where its length changes what a model computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mech.errors import InputError
from mech.models import ChatModel


def turning_point(model: ChatModel, longest: int = 0) -> int | None:
    """The longest row, in tokens, with which a pass keeps the short rotary angles; a longer one changes the angles of all rows. None: never.

    Positions that scale with the length (`longrope` in Phi-3 and Phi-4) look at the longest row of a pass.

    Args:
        model: the model that is to read.
        longest: tokens of the longest row that is to be read.

    Raises:
        InputError: it is beyond the point where angles (`dynamic`) follow the longest row ever read, which makes results depend on what was
            read before.
    """
    config = model.causal.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    found = []
    for kind in [rope, *rope.values()]:  # one for all layers, or one a kind of layer
        how = kind.get("rope_type") if isinstance(kind, dict) else None
        if how == "longrope":
            found.append(int(kind["original_max_position_embeddings"]))
        elif how == "dynamic":
            found.append(int(config.max_position_embeddings))
            if longest > found[-1]:
                raise InputError(
                    f"a row of {longest} tokens: beyond {found[-1]}, {type(model.causal).__name__}'s positions (rope_type dynamic) depend on "
                    "what was read before: cut the rows"
                )
    return min(found, default=None)


@contextmanager
def within_positions(model: ChatModel, longest: int) -> Iterator[None]:
    """Say in our words that a row was longer than the model's table of positions.

    Raises:
        InputError: the model failed inside, on a row beyond the positions that its config names.
    """
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        known = getattr(model.causal.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(known, int) or longest <= known or out_of_memory(error):
            raise
        raise InputError(
            f"a row of {longest} tokens: {type(model.causal).__name__} has positions for {known} ({str(error).splitlines()[0]})"
        ) from error


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: a GPU's allocator has its own exception, the CPU's only a message."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

"""Which tokens a forward pass is reading: masks that whoever runs the pass declares.

An intervention acts on positions by name. Their meaning is never guessed from a call's shape: the code
that runs the forward pass (scoring, capturing, generation, training) says for each token whether it is prompt,
response or padding.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, get_args

from jaxtyping import Bool
from torch import Tensor

from mech.errors import GuardError, InputError

Position = Literal["all", "prompt", "prompt_last", "response"]
"""`all` but padding; the prompt; its last token; the assistant's tokens (read, or generated so far)."""

POSITIONS: tuple[Position, ...] = get_args(Position)

Masks = Mapping[str, Bool[Tensor, "batch seq"]] | Mapping[Position, Bool[Tensor, "batch seq"]]

_current: ContextVar[Masks | None] = ContextVar("positions", default=None)


@contextmanager
def declared(masks: Masks) -> Iterator[None]:
    """Declare the positions of the forward pass inside the context."""
    token = _current.set(masks)
    try:
        yield
    finally:
        _current.reset(token)


def carried_over() -> AbstractContextManager[None]:
    """A context in which the present declaration holds again, in whatever thread."""
    masks = _current.get()
    return nullcontext() if masks is None else declared(masks)


def mask_for(position: Position, shape: tuple[int, int]) -> Bool[Tensor, "batch seq"] | None:
    """The mask of a position in the current pass; None stands for every token.

    Raises:
        InputError: unknown position.
        GuardError: nobody declared this pass's positions, or declared them for another shape.
    """
    if position not in POSITIONS:
        raise InputError(f"unknown position {position!r}; there are {', '.join(POSITIONS)}")
    masks = _current.get()
    if masks is None:
        if position == "all":
            return None
        raise GuardError(
            f"positions={position!r}, but this forward pass does not say which tokens are whose: run the model through "
            "mech.generate, mech.score or activations.capture, or declare the masks with mech.positions.declared"
        )
    mask = masks[position]
    if tuple(mask.shape) != shape:
        raise GuardError(f"positions were declared for shape {tuple(mask.shape)}, the pass has {shape}")
    return mask

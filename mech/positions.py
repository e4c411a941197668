"""Which tokens a forward pass is reading: masks that whoever runs the pass declares.

An intervention acts on positions by name. Their meaning is never guessed from a call's shape: the code
that runs the forward pass (scoring, capturing, generation, training) says for each token whether it is prompt,
response or padding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mech.errors import GuardError, InputError

Position = Literal["all", "prompt", "prompt_last", "response", "generated"]
"""`all` but padding; the prompt; its last token; the assistant's tokens (read, or generated so far); only those that are being
generated."""

POSITIONS: tuple[Position, ...] = get_args(Position)

Masks = Mapping[str, Bool[Tensor, "batch seq"]] | Mapping[Position, Bool[Tensor, "batch seq"]]

Owners = Int[Tensor, "batch seq"]
"""Which of the caller's rows each token belongs to."""

_current: ContextVar[tuple[Masks, Owners | None] | None] = ContextVar("positions", default=None)


@contextmanager
def declared(masks: Masks, owners: Owners | None = None) -> Iterator[None]:
    """Declare the positions of the forward pass inside the context, and whose rows' its tokens are.

    A position that is not among the masks has no tokens.
    """
    token = _current.set((masks, owners))
    try:
        yield
    finally:
        _current.reset(token)


def carried_over() -> AbstractContextManager[None]:
    """A context in which the present declaration holds again, in whatever thread."""
    now = _current.get()
    return nullcontext() if now is None else declared(*now)


def mask_for(
    position: Position, shape: tuple[int, int], rows: Sequence[int] | None = None
) -> Bool[Tensor, "batch seq"] | None:
    """The mask of a position in the current pass; None stands for every token.

    Args:
        position: which tokens.
        shape: batch and sequence of the pass.
        rows: of which of the caller's rows; all when left out.

    Raises:
        InputError: unknown position.
        GuardError: nobody declared this pass's positions or rows, or declared them for another shape.
    """
    if position not in POSITIONS:
        raise InputError(f"unknown position {position!r}; there are {', '.join(POSITIONS)}")
    now = _current.get()
    if now is None or (rows is not None and now[1] is None):
        if now is None and position == "all" and rows is None:
            return None
        raise GuardError(
            f"positions={position!r}, rows={rows}: this forward pass does not say which tokens are whose: run the model through "
            "mech.generate, mech.score or activations.capture, or declare the masks with mech.positions.declared"
        )
    masks, owners = now
    any_mask = next(iter(masks.values()))
    if tuple(any_mask.shape) != shape:
        raise GuardError(f"positions were declared for shape {tuple(any_mask.shape)}, the pass has {shape}")
    mask: Tensor = masks.get(position, torch.zeros_like(any_mask))
    if rows is not None and owners is not None:
        mask = mask & torch.isin(owners, torch.tensor(list(rows), device=owners.device))
    return mask

"""Which tokens a forward pass is reading: masks that whoever runs the pass declares.

An intervention acts on positions by name. Their meaning is never guessed from a call's shape: the code
that runs the forward pass (scoring, capturing, generation, training) says for each token whether it is prompt,
response or padding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mech.choices import POSITIONS, Position
from mech.errors import GuardError, InputError

__all__ = [
    "POSITIONS",
    "Mask",
    "Masks",
    "Owners",
    "Position",
    "carried_over",
    "declared",
    "mask_for",
    "tokens_read",
]

Mask = Bool[Tensor, "batch seq"] | bool
"""Which tokens have a position. True (every token of the pass) and False (none) stand for whole tensors, and spare an intervention the masking."""

Masks = Mapping[str, Mask] | Mapping[Position, Mask]

Owners = Int[Tensor, "batch seq"]
"""Which of the caller's rows each token belongs to."""


@dataclass(frozen=True)
class _Declared:
    masks: Masks
    owners: Owners | None
    of_rows: dict[tuple[int, ...], Bool[Tensor, "batch seq"]] = field(default_factory=dict)
    """Tokens of some rows, found once a pass however many layers ask."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Batch and sequence length of the pass; None where no tensor was declared that would tell."""
        if self.owners is not None:
            return tuple(self.owners.shape)
        return next((tuple(m.shape) for m in self.masks.values() if isinstance(m, Tensor)), None)

    def tokens_of(self, rows: Sequence[int]) -> Bool[Tensor, "batch seq"]:
        key = tuple(rows)
        if key not in self.of_rows and self.owners is not None:
            wanted = torch.tensor(key, device=self.owners.device)
            self.of_rows[key] = torch.isin(self.owners, wanted)
        return self.of_rows[key]


_current: ContextVar[_Declared | None] = ContextVar("positions", default=None)


@contextmanager
def declared(masks: Masks, owners: Owners | None = None) -> Iterator[None]:
    """Declare the positions of the forward pass inside the context, and which row each token belongs to.

    A position that is not among the masks has no tokens. Owners' shape is the pass's; without owners, the first mask's that is a tensor.
    """
    token = _current.set(_Declared(masks, owners))
    try:
        yield
    finally:
        _current.reset(token)


def carried_over() -> AbstractContextManager[None]:
    """A context in which the declaration of this moment holds again, also in another thread (context variables do not cross threads)."""
    now = _current.get()
    return nullcontext() if now is None else declared(now.masks, now.owners)


def tokens_read(shape: tuple[int, int]) -> tuple[Owners, Int[Tensor, "batch seq"]] | None:
    """Of each token of the current pass: the caller's row it belongs to, and its place in that row (-1: no token of a row).

    None where nobody declared whose tokens the pass reads.

    Args:
        shape: batch and sequence of the pass.

    Raises:
        InputError: the pass reads what has just been generated, whose place in its row is not declared.
    """
    now = _current.get()
    if now is None or now.owners is None:
        return None
    if now.masks.get("prompt", False) is False:
        raise InputError(
            "a token that is being generated has no place among those that were read: name positions='prompt'"
        )
    real = now.masks.get("all", False)
    taken = torch.full(shape, fill_value=real) if isinstance(real, bool) else real
    place = (taken.cumsum(-1) - 1).masked_fill(~taken, -1)
    return now.owners.to(place.device), place


def mask_for(position: Position, shape: tuple[int, int], rows: Sequence[int] | None = None) -> Mask:
    """The tokens of a position in the current pass.

    Args:
        position: a name of `POSITIONS`.
        shape: batch and sequence of the pass.
        rows: of which of the caller's rows; all when left out.

    Raises:
        InputError: unknown position.
        GuardError: nobody declared this pass's positions or rows, or declared them for another shape.
    """
    if position not in POSITIONS:
        raise InputError(f"unknown position {position!r}; there are {', '.join(POSITIONS)}")
    now = _current.get()
    if now is None and position == "all" and rows is None:
        return True
    if now is None or (rows is not None and now.owners is None):
        raise GuardError(
            f"positions={position!r}, rows={rows}: this forward pass does not say which tokens are whose: run the model through "
            "mech.generate, mech.score or activations.capture, or declare the masks with mech.positions.declared"
        )
    if now.shape not in (None, shape):
        raise GuardError(f"positions were declared for shape {now.shape}, the pass has {shape}")
    mask: Mask = now.masks.get(position, False)
    if isinstance(mask, Tensor) and mask.shape != shape:
        raise GuardError(f"{position!r} was declared for shape {tuple(mask.shape)}, the pass has {shape}")
    if rows is None or mask is False:
        return mask
    chosen: Tensor = now.tokens_of(rows) & mask
    return chosen

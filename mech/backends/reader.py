"""What a backend is: a function that runs a batch and shows what passes by."""

from collections.abc import Callable, Collection

from jaxtyping import Int
from torch import Tensor

from mech.errors import InputError
from mech.sites import SITES, Site

Visit = Callable[[Site, int, Tensor], None]
"""Is shown each wanted site and layer once a pass: [batch, seq, d]."""

Reader = Callable[[Int[Tensor, "batch seq"], Collection[tuple[Site, int]], Visit], None]
"""Runs token ids, padded on the right, and shows the wanted places. Padding after a row cannot reach it."""

WITHIN_BLOCK: dict[Site, int] = {
    "resid_pre": 0,
    "attn_head_out": 1,
    "attn_out": 2,
    "mlp_out": 3,
    "resid_post": 4,
}
"""The order in which a block makes its sites."""


def as_they_come(wanted: Collection[tuple[Site, int]]) -> list[tuple[Site, int]]:
    """Places in the order in which a forward pass reaches them.

    Raises:
        InputError: an unknown site.
    """
    if unknown := sorted({site for site, _ in wanted} - set(SITES)):
        raise InputError(f"unknown sites {', '.join(unknown)}; there are {', '.join(SITES)}")
    return sorted(wanted, key=lambda place: (place[1], WITHIN_BLOCK[place[0]]))

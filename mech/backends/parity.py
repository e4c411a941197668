"""Does a backend read what Hugging Face reads? Asked when it is opened, answered layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech.backends.hf import open_hf
from mech.backends.reader import Reader
from mech.errors import GuardError
from mech.forward import pad_id, pad_right
from mech.models import ChatModel
from mech.modes import evaluating
from mech.sites import SITES, Site

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference relative to the site's largest entry."""
ROUGH = 5e-2
"""The same for 16-bit weights, where the order of additions shows."""


@dataclass(frozen=True)
class Parity:
    """How far a backend is from Hugging Face at one place, over a probe batch."""

    site: Site
    layer: int
    max_relative: float
    """Largest difference, relative to the largest entry."""
    cosine: float
    """Smallest cosine over tokens."""


@torch.no_grad()
def check_parity(name: str, read: Reader, model: ChatModel, *, sites: Sequence[Site] = SITES) -> list[Parity]:
    """Compare a backend with Hugging Face at every layer, on rows of different lengths.

    `resid_post` is compared with Hugging Face's own `hidden_states` (except at the last layer, which they hold only after the
    final norm), the other sites with our hooks on its modules.

    Raises:
        GuardError: it disagrees, or shows nothing, somewhere; the message names backend, site, layer and numbers.
    """
    rows = _probe(model)
    ids = pad_right(rows, pad_id(model), model.device)
    wanted = {(site, layer) for site in sites for layer in range(model.n_layers)}
    with evaluating(model.hf):
        ours, theirs = (_gather(reader, ids, wanted, rows) for reader in (open_hf(model), read))
        states = model.causal(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(model.n_layers - 1):
        if ("resid_post", layer) in wanted:
            ours["resid_post", layer] = _real(states[layer + 1], rows)
    found = []
    for site, layer in sorted(wanted, key=lambda place: (place[1], place[0])):
        if (site, layer) not in theirs:
            raise GuardError(f"backend {name}: {site} at layer {layer} was never shown: use another backend")
        one = _compare(site, layer, ours[site, layer], theirs[site, layer])
        if not one.max_relative <= TOLERANCE.get(model.dtype, ROUGH):
            raise GuardError(
                f"backend {name}: {site} at layer {layer} differs from Hugging Face by {one.max_relative:.1e} of its largest "
                f"entry (cosine {one.cosine:.6f}): use another backend"
            )
        found.append(one)
    return found


def _probe(model: ChatModel) -> list[list[int]]:
    size = model.causal.config.get_text_config().vocab_size
    return [[(7 * i * i + 3 * i + 5) % size for i in range(n)] for n in (11, 4, 7)]


def _gather(
    read: Reader, ids: Int[Tensor, "batch seq"], wanted: set[tuple[Site, int]], rows: list[list[int]]
) -> dict[tuple[Site, int], Float[Tensor, "tokens d"]]:
    found: dict[tuple[Site, int], Tensor] = {}

    def keep(site: Site, layer: int, h: Tensor) -> None:
        found[site, layer] = _real(h, rows)

    read(ids, wanted, keep)
    return found


def _real(h: Float[Tensor, "batch seq d"], rows: list[list[int]]) -> Float[Tensor, "tokens d"]:
    """The rows' own tokens, without padding."""
    return torch.cat([h[i, : len(row)] for i, row in enumerate(rows)]).float().cpu()


def _compare(site: Site, layer: int, ours: Float[Tensor, "n d"], theirs: Float[Tensor, "m k"]) -> Parity:
    if ours.shape != theirs.shape:
        raise GuardError(
            f"{site} at layer {layer}: shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}"
        )
    relative = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-30))
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min())
    return Parity(site, layer, relative, cosine)

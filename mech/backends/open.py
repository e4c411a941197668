"""Opening a backend by name."""

import logging
from collections.abc import Callable, Sequence

from mech.backends.hf import open_hf
from mech.backends.nnsight import open_nnsight
from mech.backends.parity import check_parity
from mech.backends.reader import Reader
from mech.backends.transformer_lens import open_transformer_lens
from mech.errors import InputError
from mech.models import ChatModel
from mech.sites import SITES, Site

log = logging.getLogger(__name__)

BACKENDS: dict[str, Callable[[ChatModel], Reader]] = {
    "hf": open_hf,
    "nnsight": open_nnsight,
    "transformer_lens": open_transformer_lens,
}


def open_backend(name: str, model: ChatModel, *, sites: Sequence[Site] = SITES) -> Reader:
    """A backend's reader for this model, checked against Hugging Face at these sites.

    Raises:
        InputError: no such backend, or it does not know this architecture.
        MissingDependencyError: its library is not installed.
        GuardError: it disagrees with Hugging Face; the message names site and layer.
    """
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not known; there are {', '.join(BACKENDS)}")
    read = BACKENDS[name](model)
    if name != "hf":
        worst = max(check_parity(name, read, model, sites=sites), key=lambda p: p.max_relative)
        log.info(
            "backend %s agrees with Hugging Face: largest relative difference %.1e, %s at layer %d",
            name, worst.max_relative, worst.site, worst.layer,
        )  # fmt: skip
    return read

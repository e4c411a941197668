"""Patching between a base and its finetuned self: run one with the other's activations, by layer and position.

One copy of the weights serves both: the adapter is live and is switched off for the base (`load_model(..., merge=False)`). Both
directions are measured, for a hybrid of two models is neither: `into_finetuned` runs the finetuned model with the base's stream at
one place, `into_base` the reverse. A place where patching undoes (or brings) the change carries it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mech.adapters import adapter_layers
from mech.chat import Encoded
from mech.errors import InputError
from mech.hooks import hooked
from mech.models import ChatModel
from mech.progress import track
from mech.sites import Site

Metric = Callable[[Float[Tensor, "seq vocab"]], float]
"""A number from the logits of one row."""


@dataclass(frozen=True)
class Patched:
    """What patching does to a metric, one row of text."""

    base: float
    """The metric of the base, unpatched."""
    finetuned: float
    """Of the finetuned model, unpatched."""
    into_finetuned: Float[np.ndarray, "layers spans"]
    """Of the finetuned model with the base's activations at a layer and span."""
    into_base: Float[np.ndarray, "layers spans"]
    """Of the base with the finetuned model's activations there."""
    layers: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def undone(self) -> Float[np.ndarray, "layers spans"]:
        """Share of the change that patching the base in takes back: 0 none, 1 all. NaN where nothing changed."""
        return _share(self.into_finetuned - self.finetuned, self.base - self.finetuned)

    @property
    def brought(self) -> Float[np.ndarray, "layers spans"]:
        """Share of the change that patching the finetuned model in brings about."""
        return _share(self.into_base - self.base, self.finetuned - self.base)


def _share(moved: Float[np.ndarray, "layers spans"], whole: float) -> Float[np.ndarray, "layers spans"]:
    return moved / whole if whole else np.full_like(moved, np.nan)


def answer_logprob(row: Encoded) -> Metric:
    """Log-probability (nats) of a row's given response, summed over its tokens."""
    start, stop = row.spans["response"]
    if stop <= start:
        raise InputError("a log-probability needs a row with a response")
    targets = torch.tensor(row.ids[start:stop])

    def metric(logits: Float[Tensor, "seq vocab"]) -> float:
        said = logits[start - 1 : stop - 1].float().log_softmax(-1)
        return float(said.gather(-1, targets.to(said.device).unsqueeze(-1)).sum())

    return metric


def logit_difference(token: int, other: int) -> Metric:
    """logit(token) − logit(other) at the row's last token."""
    return lambda logits: float(logits[-1, token] - logits[-1, other])


@torch.no_grad()
def patch_between(
    model: ChatModel,
    row: Encoded,
    metric: Metric,
    *,
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> Patched:
    """Patch base into finetuned and the reverse, at every layer and span of tokens.

    Args:
        model: with a live adapter.
        row: the text that both read.
        metric: what is compared (`answer_logprob`, `logit_difference`, or any function of the logits).
        site: where in the block.
        layers: which; all when left out.
        spans: half-open spans of tokens; the whole row as one when left out.

    Raises:
        InputError: no live adapter, or a span outside the row.
    """
    chosen = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    places = tuple(spans or [(0, len(row.ids))])
    if bad := [s for s in places if not 0 <= s[0] < s[1] <= len(row.ids)]:
        raise InputError(f"span {bad[0]} lies outside the row's {len(row.ids)} tokens")
    on = {"base": (), "finetuned": tuple(range(model.n_layers))}
    streams: dict[str, dict[int, Tensor]] = {}
    plain = {}
    for which, active in on.items():
        with adapter_layers(model, active):
            streams[which] = {}
            plain[which] = metric(
                _logits(model, row, {(site, n): _keeper(streams[which], n) for n in chosen})
            )
    found = {name: np.zeros((len(chosen), len(places))) for name in on}
    for which, other in (("finetuned", "base"), ("base", "finetuned")):
        with adapter_layers(model, on[which]):
            for i, layer in enumerate(track(chosen, f"patching into {which}")):
                for j, span in enumerate(places):
                    edit = _putter(streams[other][layer], span)
                    found[which][i, j] = metric(_logits(model, row, {(site, layer): edit}))
    return Patched(plain["base"], plain["finetuned"], found["finetuned"], found["base"], chosen, places)


def _logits(model: ChatModel, row: Encoded, edits: Any) -> Float[Tensor, "seq vocab"]:
    ids = torch.tensor([row.ids], device=model.device)
    with hooked(model, edits):
        logits: Tensor = model.hf(input_ids=ids, use_cache=False).logits[0]
    return logits


def _keeper(into: dict[int, Tensor], layer: int) -> Any:
    def keep(h: Float[Tensor, "1 seq d"]) -> None:
        into[layer] = h

    return keep


def _putter(values: Float[Tensor, "1 seq d"], span: tuple[int, int]) -> Any:
    def put(h: Float[Tensor, "1 seq d"]) -> Tensor:
        patched = h.clone()
        patched[:, span[0] : span[1]] = values[:, span[0] : span[1]]
        return patched

    return put

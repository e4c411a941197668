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
    """The metric of the finetuned model, unpatched."""
    into_finetuned: Float[np.ndarray, "layers spans"]
    """The metric of the finetuned model run with the base's activations at a layer and span."""
    into_base: Float[np.ndarray, "layers spans"]
    """The metric of the base run with the finetuned model's activations there."""
    layers: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    random_into_finetuned: Float[np.ndarray, "layers spans"] | None = None
    """The metric of the finetuned model whose own activations were moved there, token by token, as far in a random direction; None without `rng`."""
    random_into_base: Float[np.ndarray, "layers spans"] | None = None
    """The same of the base."""

    @property
    def undone(self) -> Float[np.ndarray, "layers spans"]:
        """Share of the finetuning's change that the base's activations take back: (into_finetuned − finetuned) / (base − finetuned).

        0 is none of it and 1 all (denoising's normalisation); below 0 or above 1 where a hybrid of the two models goes beyond both. NaN where
        the two models score the same.
        """
        return _share(self.into_finetuned - self.finetuned, self.base - self.finetuned)

    @property
    def brought(self) -> Float[np.ndarray, "layers spans"]:
        """Share of the finetuning's change that the finetuned model's activations bring about in the base: (into_base − base) / (finetuned − base)."""
        return _share(self.into_base - self.base, self.finetuned - self.base)


def _share(moved: Float[np.ndarray, "layers spans"], whole: float) -> Float[np.ndarray, "layers spans"]:
    return moved / whole if whole else np.full_like(moved, np.nan)


def answer_logprob(row: Encoded) -> Metric:
    """Log-probability (nats) of a row's given response, summed over its tokens.

    Raises:
        InputError: the row has no response.
    """
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


@dataclass(frozen=True)
class _Place:
    """One cell: what is put into a row's stream at a layer and span."""

    layer: int
    span: tuple[int, int]
    values: Float[Tensor, "seq d"]


@torch.no_grad()
def patch_between(
    model: ChatModel,
    row: Encoded,
    metric: Metric,
    *,
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    rng: np.random.Generator | None = None,
    token_budget: int = 2048,
) -> Patched:
    """Patch base into finetuned and the reverse, at every layer and span of tokens.

    Args:
        model: with a live adapter; the base is what lies under it, earlier stages merged.
        row: the text that both read.
        metric: what is compared (`answer_logprob`, `logit_difference`, or any function of the logits).
        site: which place of the block is patched.
        layers: which layers are patched, one at a time; all when left out.
        spans: half-open spans of tokens; the whole row as one when left out.
        rng: draws the control, where it is wanted: in place of the other model's activations, the own ones plus a random vector
            whose norm is, token by token, that of the difference.
        token_budget: tokens of a pass: so many copies of the row, each patched elsewhere, are run at once.

    Raises:
        InputError: no live adapter, or a span outside the row.
    """
    chosen = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    places = _spans_of(row, spans)
    on = {"base": (), "finetuned": tuple(range(model.n_layers))}
    streams, plain = {}, {}
    for which, active in on.items():
        with adapter_layers(model, active):
            streams[which], plain[which] = _unpatched(model, row, metric, site, chosen)
    found, shape = {}, (len(chosen), len(places))
    for which, other in (("finetuned", "base"), ("base", "finetuned")):
        values = {"": streams[other]}
        if rng is not None:
            values["random "] = {n: _shaken(streams[which][n], streams[other][n], rng) for n in chosen}
        with adapter_layers(model, on[which]):
            for kind, put in values.items():
                cells = [_Place(n, span, put[n]) for n in chosen for span in places]
                label = f"patching {kind}into {which}"
                told = _patched(model, row, metric, cells, site=site, token_budget=token_budget, label=label)
                found[kind + which] = np.array(told).reshape(shape)
    return Patched(
        plain["base"], plain["finetuned"], found["finetuned"], found["base"], chosen, places,
        found.get("random finetuned"), found.get("random base"),
    )  # fmt: skip


def _spans_of(row: Encoded, spans: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
    places = tuple(spans or [(0, len(row.ids))])
    if bad := [s for s in places if not 0 <= s[0] < s[1] <= len(row.ids)]:
        raise InputError(f"span {bad[0]} lies outside the row's {len(row.ids)} tokens")
    return places


@torch.no_grad()
def range_effects(
    model: ChatModel, row: Encoded, metric: Metric, ranges: Sequence[Sequence[int]]
) -> Float[np.ndarray, "ranges 2"]:
    """The metric with the adapter on in each range of layers only, and everywhere but there.

    Raises:
        InputError: no live adapter, or a layer that the model does not have.
    """
    every, found = set(range(model.n_layers)), []
    for inside in ranges:
        for active in (set(inside), every - set(inside)):
            with adapter_layers(model, active):
                found.append(metric(_logits(model, row, {})[0]))
    return np.array(found).reshape(len(ranges), 2)


def _patched(
    model: ChatModel,
    row: Encoded,
    metric: Metric,
    cells: Sequence[_Place],
    *,
    site: Site,
    token_budget: int,
    label: str,
) -> list[float]:
    """The metric of each cell: a batch holds as many copies of the row as the budget allows, each patched at its own place."""
    size, found = max(1, token_budget // len(row.ids)), []
    for start in track(range(0, len(cells), size), label):
        batch = cells[start : start + size]
        edits = {(site, n): _putter(batch, n) for n in {cell.layer for cell in batch}}
        found += [metric(logits) for logits in _logits(model, row, edits, copies=len(batch))]
    return found


def _logits(model: ChatModel, row: Encoded, edits: Any, copies: int = 1) -> Float[Tensor, "copies seq vocab"]:
    ids = torch.tensor([row.ids], device=model.device).expand(copies, -1)
    with hooked(model, edits):
        logits: Tensor = model.hf(input_ids=ids, use_cache=False).logits
    return logits


def _unpatched(
    model: ChatModel, row: Encoded, metric: Metric, site: Site, layers: Sequence[int]
) -> tuple[dict[int, Float[Tensor, "seq d"]], float]:
    """The model's own stream at these layers, and its metric."""
    stream: dict[int, Tensor] = {}
    logits = _logits(model, row, {(site, n): _keeper(stream, n) for n in layers})
    return stream, metric(logits[0])


def _keeper(into: dict[int, Tensor], layer: int) -> Any:
    def keep(h: Float[Tensor, "1 seq d"]) -> None:
        into[layer] = h[0]

    return keep


def _putter(batch: Sequence[_Place], layer: int) -> Any:
    def put(h: Float[Tensor, "copies seq d"]) -> Tensor:
        patched = h.clone()
        for i, cell in enumerate(batch):
            if cell.layer == layer:
                start, stop = cell.span
                patched[i, start:stop] = cell.values[start:stop].to(h)
        return patched

    return put


def _shaken(
    own: Float[Tensor, "seq d"], other: Float[Tensor, "seq d"], rng: np.random.Generator
) -> Float[Tensor, "seq d"]:
    """The own stream, moved at each token as far as the other model's lies away, in a random direction."""
    drawn = torch.as_tensor(rng.standard_normal(tuple(own.shape)), dtype=torch.float32, device=own.device)
    far = (other.float() - own.float()).norm(dim=-1, keepdim=True)
    shaken: Tensor = (own.float() + far * drawn / drawn.norm(dim=-1, keepdim=True)).to(own.dtype)
    return shaken

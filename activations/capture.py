"""Capture: run rows through a model and keep the pooled residual stream.

Hooks pool each site as it passes, in float32, so that no full activation is ever kept; the output head is not run, nor any
block after the last wanted layer, nor any token after the last that is pooled; a prefix that rows share is run once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.pooling import TOKENS, pooled_span
from activations.sinks import ArraySink, Sink
from mech.backends.reader import Reader as BackendReader
from mech.chat import Encoded
from mech.errors import GuardError, InputError
from mech.forward import Padded, Pass, pad_id, pad_right, run_rows
from mech.hooks import Edit, hooked
from mech.interventions import intervening
from mech.models import ChatModel
from mech.progress import track
from mech.score import span_scores
from mech.sites import Site, site_module

Note = Literal["surprisal", "prompt_surprisal", "norms"]
"""What else is read off a row: `surprisal`, the mean of its response's tokens (nats a token; costs the output head on them); `prompt_surprisal`,
that of its prompt's tokens after the first; `norms`, for each site and pooling the mean norm of the pooled tokens by layer."""

Place = tuple[Site, int]
Arrays = dict[tuple[str, str], Float[np.ndarray, "n layers d"] | list[Float[np.ndarray, "_ layers d"]]]


@dataclass(frozen=True)
class Reading:
    """What to read off rows."""

    poolings: tuple[str, ...]
    """Which tokens become one vector (`activations.pooling`)."""
    sites: tuple[Site, ...]
    """Where in each block."""
    layers: tuple[int, ...]
    """Of which blocks."""
    notes: frozenset[Note] = frozenset()
    """What else; handed to the sink's `note` under the names of `columns`."""

    @property
    def columns(self) -> list[str]:
        """What the notes are called: `surprisal` and `prompt_surprisal` [n], `norms.SITE.POOLING` [n, layers]."""
        norms = [f"norms.{site}.{pooling}" for site in self.sites for pooling in self.poolings]
        return [*self.surprisals, *(norms * ("norms" in self.notes))]

    @property
    def surprisals(self) -> list[Literal["surprisal", "prompt_surprisal"]]:
        """Which of the notes need the output head."""
        return [name for name in ("surprisal", "prompt_surprisal") if name in self.notes]


def capture(
    model: ChatModel,
    rows: Sequence[Encoded],
    *,
    poolings: Sequence[str] = ("prompt_last",),
    sites: Sequence[Site] = ("resid_post",),
    layers: Sequence[int] | None = None,
    token_budget: int = 1024,
    backend: str = "hf",
) -> Arrays:
    """Activations in memory: for each (site, pooling) an array [n, layers, d] (float32).

    For the pooling `tokens` it is a list of one array [tokens, layers, d] a row.

    Args:
        model: what reads.
        rows: what is read.
        poolings: which tokens become one vector (`activations.pooling`).
        sites: where in each block.
        layers: of which blocks, in the order wanted; all when left out.
        token_budget: tokens a pass.
        backend: whose forward pass (`mech.backends`).

    Raises:
        InputError: unknown site, layer, pooling or backend; a row without tokens for a pooling.
        GuardError: a hook never fired, an activation is not finite, or a backend disagrees with Hugging Face.
    """
    chosen = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    sink = ArraySink([len(r.ids) for r in rows], chosen)
    reading = Reading(tuple(poolings), tuple(sites), chosen)
    capture_into(sink, model, rows, reading, token_budget=token_budget, backend=backend)
    return sink.arrays


@torch.no_grad()
def capture_into(
    sink: Sink,
    model: ChatModel,
    rows: Sequence[Encoded],
    reading: Reading,
    *,
    nonfinite: Literal["raise", "pass"] = "raise",
    token_budget: int = 1024,
    backend: str = "hf",
) -> None:
    """Run rows and hand each vector to `sink`; arguments not named here, and errors, are those of `capture`.

    Args:
        sink: where vectors go.
        model: what reads.
        rows: what is read.
        reading: what to read off them.
        nonfinite: `pass` hands NaN and infinity on, for a sink that marks them.
        token_budget: tokens a pass.
        backend: whose forward pass; another than `hf` pads rows instead of packing them, and acts without interventions.
    """
    if not rows or not reading.poolings or not reading.sites or not reading.layers:
        raise InputError("nothing to capture: rows, poolings, sites and layers must each name something")
    spans = [_spans(reading.poolings, row, i) for i, row in enumerate(rows)]
    if reading.surprisals:
        model.check_head()  # now: later it would run a pass through the hooks
    foreign = None if backend == "hf" else _foreign(backend, model, reading)
    reader = _Reader(model, rows, spans, reading, foreign)
    pack = foreign is None
    passes = run_rows(model, rows, reader.read, token_budget=token_budget, pack=pack, ends=reader.ends)
    for one, read in track(passes, "capturing"):
        if read.is_finite:
            read.hand_over(sink, one, reading)
            continue
        for part, found in reader.row_by_row(one):
            if nonfinite == "raise":
                found.check_finite(part)
            found.hand_over(sink, part, reading)


def _spans(poolings: Sequence[str], row: Encoded, i: int) -> list[tuple[int, int]]:
    try:
        return [pooled_span(p, row) for p in poolings]
    except InputError as error:
        raise InputError(f"row {i}: {error}") from error


def _foreign(backend: str, model: ChatModel, reading: Reading) -> BackendReader:
    from mech.backends import open_backend

    if intervening() or reading.surprisals:
        raise InputError(f"backend {backend!r}: interventions and surprisal need backend 'hf'")
    for layer in reading.layers:
        for site in reading.sites:
            site_module(model, site, layer)  # says what is wrong with a place in our words
    return open_backend(backend, model, sites=reading.sites)


@dataclass(frozen=True)
class _Read:
    """What one pass gave."""

    pooled: dict[Place, Float[Tensor, "rows poolings d"]]
    finite: dict[Place, Bool[Tensor, " rows"]]
    norms: dict[Place, Float[Tensor, "rows poolings"]]
    tokens: dict[Place, Float[Tensor, "tokens d"]]
    surprisal: dict[str, Float[Tensor, " rows"]]

    @property
    def is_finite(self) -> bool:
        """Whether everything in the pass is."""
        return bool(torch.cat([finite.cpu() for finite in self.finite.values()]).all())

    def check_finite(self, one: Pass) -> None:
        for (site, layer), finite in self.finite.items():
            if not finite.all():
                row = one.members[int((~finite).nonzero()[0])]
                raise GuardError(
                    f"row {row}: {site} at layer {layer} is not finite (NaN or infinity in the model's output)"
                )

    def hand_over(self, sink: Sink, one: Pass, reading: Reading) -> None:
        rows = np.array(one.members)
        for (site, layer), values in self.pooled.items():
            for p, pooling in enumerate(reading.poolings):
                if pooling == TOKENS:
                    sink.write(site, pooling, layer, rows, self.tokens[site, layer].cpu().numpy())
                else:
                    sink.write(site, pooling, layer, rows, values[:, p].cpu().numpy())
        for name, values in self.surprisal.items():
            sink.note(name, rows, values.numpy())
        for site in reading.sites if self.norms else ():
            by_layer = torch.stack([self.norms[site, layer] for layer in reading.layers], -1).cpu().numpy()
            for p, pooling in enumerate(reading.poolings):
                sink.note(f"norms.{site}.{pooling}", rows, by_layer[:, p])


def _check_tokens(place: Place, h: Float[Tensor, "batch seq d"], one: Pass) -> None:
    """Refuse an architecture that reads more than it was given: nobody would know whose each token is."""
    if h.shape[:2] != one.layout.shape:
        raise InputError(
            f"{place[0]} at layer {place[1]} is of {tuple(h.shape[:2])} tokens, while {one.layout.shape} were given (CPM-Ant adds its "
            "own): this architecture is not supported"
        )


class _ReachedLastLayerError(Exception):
    """Ends a forward pass after the last wanted layer."""


@dataclass(frozen=True)
class _Reader:
    """Reads passes of some rows: which tokens to pool, where, and what else to note."""

    model: ChatModel
    rows: Sequence[Encoded]
    spans: Sequence[Sequence[tuple[int, int]]]
    """Half-open token span of each row and pooling."""
    reading: Reading
    foreign: BackendReader | None
    """Another library's forward pass."""

    @property
    def ends(self) -> list[int]:
        """How many leading tokens of each row are looked at: none after the last that is pooled, or that predicts one."""
        scored = [r.spans["response"][1] - 1 if "surprisal" in self.reading.notes else 0 for r in self.rows]
        return [max(end, *(b for _, b in spans)) for end, spans in zip(scored, self.spans, strict=True)]

    def read(self, one: Pass) -> _Read:
        """One forward pass, pooled at every wanted place as it goes by."""
        read = _Read({}, {}, {}, {}, {})
        wanted = {(site, layer) for site in self.reading.sites for layer in self.reading.layers}
        weights = self._weights(one).to(self.model.device)
        every = torch.tensor([t for places in one.places for t in places], device=self.model.device)

        def reader(place: Place) -> Edit:
            def look(h: Float[Tensor, "batch seq d"]) -> None:
                _check_tokens(place, h, one)
                flat = h.flatten(0, 1).float()
                here = weights.to(h.device)
                read.pooled[place] = pooled = (here @ flat).unflatten(0, (len(one.members), -1))
                read.finite[place] = torch.isfinite(pooled).flatten(1).all(-1)
                if "norms" in self.reading.notes:
                    norms = here @ torch.linalg.vector_norm(flat, dim=-1)
                    read.norms[place] = norms.unflatten(0, (len(one.members), -1))
                if TOKENS in self.reading.poolings:
                    read.tokens[place] = flat[every.to(h.device)]
                if len(read.pooled) == len(wanted) and not self.reading.surprisals and not self.foreign:
                    raise _ReachedLastLayerError

            return look

        if self.foreign is not None:
            ids = pad_right(one.layout.rows, pad_id(self.model), self.model.device)

            def visit(site: Site, layer: int, h: Float[Tensor, "batch seq d"]) -> None:
                reader((site, layer))(h)

            self.foreign(ids, wanted, visit)
            return read
        with hooked(self.model, {place: reader(place) for place in wanted}):
            try:
                hidden = one.run()
            except _ReachedLastLayerError:
                return read
        if len(read.pooled) < len(wanted):
            missed = sorted(wanted - set(read.pooled))
            raise GuardError(f"hooks never fired at {missed}: does this model run those blocks?")
        found: dict[str, Tensor] = {
            name: self._surprisal(name, one, hidden) for name in self.reading.surprisals
        }
        return replace(read, surprisal=found)

    def row_by_row(self, one: Pass) -> Iterator[tuple[Pass, _Read]]:
        """A pass again, each row by itself: what is not finite spreads over all that is computed with it, for 0 · NaN is NaN."""
        for i, ids, roles in zip(one.members, one.layout.rows, one.roles, strict=True):
            part = Pass(one.model, (i,), Padded((ids,)), (roles,))
            yield part, self.read(part)

    def _surprisal(self, name: str, one: Pass, hidden: Float[Tensor, "tokens d"]) -> Float[Tensor, " rows"]:
        """Nats a token; NaN for a row without a response (or with a prompt of one token)."""
        of_prompt = name == "prompt_surprisal"
        spans = [
            (1, r.n_prompt) if of_prompt else r.spans["response"] for r in (self.rows[i] for i in one.members)
        ]
        scores = span_scores(one, hidden, self.rows, spans)
        return torch.stack([-s.mean() for s in scores])  # the mean of nothing is NaN

    def _weights(self, one: Pass) -> Float[Tensor, "rows_poolings tokens"]:
        """Averaging weights over a pass's tokens: 1/n inside each span, row by row and pooling by pooling."""
        size = one.layout.shape[0] * one.layout.shape[1]
        weights = torch.zeros(len(one.members) * len(self.reading.poolings), size)
        at = 0
        for i, places in zip(one.members, one.places, strict=True):
            for start, stop in self.spans[i]:
                weights[at, list(places[start:stop])] = 1.0 / (stop - start)
                at += 1
        return weights

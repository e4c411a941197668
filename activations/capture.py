"""Capture: run rows through a model and keep the pooled residual stream.

Hooks pool each site as it passes, in float32, so that no full activation is ever kept; the output head is
not run, nor any block behind the last wanted layer; a prefix shared by many rows is run once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.pooling import pooled_span
from mech.batching import Batch, plan_batches
from mech.chat import Encoded
from mech.errors import GuardError, InputError
from mech.forward import iterate, pad_id, pad_right, run_rests
from mech.hooks import Edit, hooked
from mech.interventions import intervening
from mech.models import ChatModel
from mech.packing import Pack, can_pack, packed_attention, run_packed
from mech.positions import declared
from mech.progress import track
from mech.score import batch_masks
from mech.sites import Site


@runtime_checkable
class Sink(Protocol):
    """Where pooled vectors go: the HDF5 writer, or arrays in memory."""

    def write(
        self,
        site: str,
        pooling: str,
        layer: int,
        row_indices: Int[np.ndarray, " batch"],
        values: Float[np.ndarray, "batch d"],
    ) -> None:
        """Take the vectors of some rows at one site, pooling and layer."""


class ArraySink:
    """Keeps everything in memory: `arrays[site, pooling]` is [n, layers, d], layers in the order asked for."""

    def __init__(self, n_rows: int, layers: Sequence[int], d_model: int) -> None:
        self._layers = {layer: i for i, layer in enumerate(layers)}
        self._shape = (n_rows, len(layers), d_model)
        self.arrays: dict[tuple[str, str], Float[np.ndarray, "n layers d"]] = {}

    def write(
        self,
        site: str,
        pooling: str,
        layer: int,
        row_indices: Int[np.ndarray, " batch"],
        values: Float[np.ndarray, "batch d"],
    ) -> None:
        """Take the vectors of some rows at one site, pooling and layer."""
        array = self.arrays.setdefault((site, pooling), np.full(self._shape, np.nan, dtype=np.float32))
        array[row_indices, self._layers[layer]] = values


def capture(
    model: ChatModel,
    rows: Sequence[Encoded],
    *,
    poolings: Sequence[str] = ("prompt_last",),
    sites: Sequence[Site] = ("resid_post",),
    layers: Sequence[int] | None = None,
    token_budget: int = 2048,
) -> dict[tuple[str, str], Float[np.ndarray, "n layers d"]]:
    """Pooled activations in memory: an array [n, layers, d] (float32) for each (site, pooling).

    Raises:
        InputError: unknown site, layer or pooling; a row without tokens for a pooling.
        GuardError: a hook never fired, or an activation is not finite.
    """
    chosen = list(range(model.n_layers)) if layers is None else list(layers)
    sink = ArraySink(len(rows), chosen, model.d_model)
    capture_into(sink, model, rows, poolings=poolings, sites=sites, layers=chosen, token_budget=token_budget)
    return sink.arrays


@torch.no_grad()
def capture_into(
    sink: Sink,
    model: ChatModel,
    rows: Sequence[Encoded],
    *,
    poolings: Sequence[str],
    sites: Sequence[Site],
    layers: Sequence[int],
    token_budget: int = 2048,
    label: str = "capturing",
) -> None:
    """Run rows and hand each pooled vector to `sink`; the arguments and errors are those of `capture`."""
    if not rows or not poolings or not sites or not layers:
        raise InputError("nothing to capture: rows, poolings, sites and layers must each name something")
    spans: Spans = [[pooled_span(p, row) for p in poolings] for row in rows]
    # Tokens before the first one that is pooled are never looked at: they may be shared between rows.
    unseen = [min(row.n_prompt - 1, *(a for a, _ in of_row)) for row, of_row in zip(rows, spans, strict=True)]
    # Interventions are told whose each token is, row by row; without them rows are packed, which is faster.
    ways = _padded if intervening() or not can_pack(model) else _packed
    for batch, pooled in track(ways(model, rows, spans, unseen, sites, layers, token_budget), label):
        for (site, layer), values in pooled.items():
            for p, pooling in enumerate(poolings):
                sink.write(
                    site, pooling, layer, np.array(batch.rows), _finite(values[:, p], site, layer, batch)
                )


Spans = list[list[tuple[int, int]]]
"""Half-open token span of each row and pooling."""

Pooled = dict[tuple[Site, int], Float[Tensor, "batch poolings d"]]


def _packed(
    model: ChatModel,
    rows: Sequence[Encoded],
    spans: Spans,
    unseen: Sequence[int],
    sites: Sequence[Site],
    layers: Sequence[int],
    token_budget: int,
) -> Iterator[tuple[Batch, Pooled]]:
    """Each batch as one sequence, its prefix once."""
    sequences = [r.ids for r in rows]
    with packed_attention(model):
        for batch in plan_batches(sequences, unseen, token_budget=token_budget):
            pack = Pack(tuple(sequences[i] for i in batch.rows), len(batch.prefix))
            weights = _packed_weights(pack, [spans[i] for i in batch.rows])
            pooled = _run_pooled(model, partial(run_packed, model, pack), weights, sites, layers)
            yield batch, {place: v[0].unflatten(0, (len(batch.rows), -1)) for place, v in pooled.items()}


def _padded(
    model: ChatModel,
    rows: Sequence[Encoded],
    spans: Spans,
    unseen: Sequence[int],
    sites: Sequence[Site],
    layers: Sequence[int],
    token_budget: int,
) -> Iterator[tuple[Batch, Pooled]]:
    """Each batch as rows below each other, continuing its prefix where the architecture allows."""
    for batch, prefix in iterate(model, [r.ids for r in rows], unseen, token_budget=token_budget):
        ids = pad_right(batch.rests, pad_id(model), model.device)
        weights = _weights(spans, batch, ids)
        with declared(batch_masks(rows, batch, ids)):
            yield batch, _run_pooled(model, partial(run_rests, model, ids, prefix), weights, sites, layers)


class _ReachedLastLayerError(Exception):
    """Ends a forward pass behind the last wanted layer."""


def _run_pooled(
    model: ChatModel,
    run: Callable[[], Tensor],
    weights: Float[Tensor, "batch poolings seq"],
    sites: Sequence[Site],
    layers: Sequence[int],
) -> dict[tuple[Site, int], Float[Tensor, "batch poolings d"]]:
    """One forward pass, pooled at every wanted place as it goes by."""
    wanted = {(site, layer) for site in sites for layer in layers}
    found: dict[tuple[Site, int], Tensor] = {}

    def reader(site: Site, layer: int) -> Edit:
        def read(h: Float[Tensor, "batch seq d"]) -> None:
            found[site, layer] = torch.bmm(weights.to(h.device), h.float())
            if len(found) == len(wanted):
                raise _ReachedLastLayerError

        return read

    with hooked(model, {place: reader(*place) for place in wanted}):
        try:
            run()
        except _ReachedLastLayerError:
            return found
    raise GuardError(f"hooks never fired at {sorted(wanted - set(found))}: does this model run those blocks?")


def _packed_weights(pack: Pack, spans: Spans) -> Float[Tensor, "1 rows_poolings seq"]:
    """Averaging weights over a packed sequence: 1/n inside each span, row by row and pooling by pooling."""
    weights = torch.zeros(1, sum(map(len, spans)), len(pack))
    at = 0
    for row, of_row in enumerate(spans):
        for start, stop in of_row:  # behind the shared tokens, where a row's own lie next to each other
            weights[0, at, pack.place(row, start) : pack.place(row, stop - 1) + 1] = 1.0 / (stop - start)
            at += 1
    return weights


def _weights(
    spans: Spans, batch: Batch, ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch poolings seq"]:
    """Averaging weights over a batch's remainder: 1/n inside each row's span, 0 outside."""
    shift = len(batch.prefix)
    weights = torch.zeros(len(batch.rows), len(spans[0]), ids.shape[1])
    for at, row in enumerate(batch.rows):
        for p, (start, stop) in enumerate(spans[row]):
            weights[at, p, start - shift : stop - shift] = 1.0 / (stop - start)
    return weights


def _finite(
    values: Float[Tensor, "batch d"], site: str, layer: int, batch: Batch
) -> Float[np.ndarray, "batch d"]:
    bad = ~torch.isfinite(values).all(-1)
    if bad.any():
        row = batch.rows[int(bad.nonzero()[0])]
        raise GuardError(
            f"row {row}: {site} at layer {layer} is not finite (NaN or infinity in the model's output)"
        )
    array: np.ndarray = values.cpu().numpy()
    return array

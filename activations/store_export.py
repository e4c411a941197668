"""Activations for programs that do not read HDF5: `.npz`, `.safetensors`, and persona_vectors' `.pt`.

The first two hold, for each site and pooling, an array `SITE/POOLING` [n, layers, d] (float32; for the pooling `tokens`
[tokens, layers, d]), the `layers`, the rows' `tokens` and `offsets`, and each column as `columns/NAME`. `.npz` holds
`ids`, `questions` and `metadata` (JSON) as texts; `.safetensors` has them, as JSON, in its header's metadata.

persona_vectors keeps hidden states by pooling, indexed by layer with the embedding first. Its code writes only their
differences, so the file holds what that code has in memory: a dict of tensors [L + 1, n, d] under its names
(`PERSONA_VECTORS`). Row l + 1 is block l's output; row 0 is the embedding, NaN where the store has no `resid_pre`. Its row L
is Hugging Face's, after the final norm; ours is the last block's output, before the norm. The dict also has `ids`,
`questions`, `columns` and `metadata`. Load the file with `torch.load(path, weights_only=True)`.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from activations.pooling import TOKENS
from activations.store_format import ENCODING_TYPE, ENCODING_VERSION
from activations.store_join import row_indices
from mech.errors import InputError
from mech.extras import require
from mech.files import atomic_path
from mech.layer_numbers import to_hidden_states_index

if TYPE_CHECKING:
    from activations.store import ActivationStore

log = logging.getLogger(__name__)

PERSONA_VECTORS = {
    "span:prompt": "prompt_avg",
    "prompt_last": "prompt_last",
    "response_mean": "response_avg",
}
"""Our poolings by persona_vectors' names."""


def export(store: "ActivationStore", path: Path) -> None:
    """Write a whole store as `.npz`, `.safetensors` or persona_vectors' `.pt`, by the path's ending.

    Raises:
        InputError: another ending; for `.pt`, a store without every block's output or without a pooling of persona_vectors'.
        FileFormatError: the store is damaged.
    """
    if path.suffix not in _WRITERS:
        raise InputError(f"{path}: export to a file ending in {', '.join(_WRITERS)}")
    with atomic_path(path) as temporary:
        _WRITERS[path.suffix](store, temporary)


def _texts(store: "ActivationStore") -> dict[str, str]:
    return {
        "encoding-type": ENCODING_TYPE,
        "encoding-version": ENCODING_VERSION,
        "metadata": json.dumps(store.metadata, sort_keys=True),
        "ids": json.dumps(list(store.rows.ids)),
        "questions": json.dumps(list(store.rows.questions)),
    }


def _arrays(store: "ActivationStore") -> dict[str, np.ndarray]:
    lengths = store.rows.n_tokens
    arrays = {
        "layers": np.array(store.layers, dtype=np.int64),
        "tokens": np.concatenate([np.asarray(t, dtype=np.int64) for t in store.rows.tokens]),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        **{f"columns/{name}": np.ascontiguousarray(values) for name, values in store.rows.columns.items()},
    }
    for site in store.sites:
        for pooling in store.poolings:
            ragged = pooling == TOKENS
            values = np.concatenate(store.read_tokens(site)) if ragged else store.read(site, pooling)
            arrays[f"{site}/{pooling}"] = np.ascontiguousarray(values)
    return arrays


def _npz(store: "ActivationStore", path: Path) -> None:
    texts = _texts(store)
    plain = {name: np.array(json.loads(texts[name])) for name in ("ids", "questions")}
    rest = {name: np.array(text) for name, text in texts.items() if name not in plain}
    with path.open("wb") as stream:  # numpy would add an ending of its own to a name
        np.savez(stream, **_arrays(store), **plain, **rest)  # type: ignore[arg-type]


def _safetensors(store: "ActivationStore", path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(_arrays(store), path, metadata=_texts(store))


def _persona_vectors(store: "ActivationStore", path: Path) -> None:
    import torch

    here = [p for p in store.poolings if p in PERSONA_VECTORS]
    if "resid_post" not in store.sites or not here or store.layers != list(range(len(store.layers))):
        raise InputError(
            f"{store.files[0]}: persona_vectors' files hold resid_post of every layer from 0, pooled as {', '.join(PERSONA_VECTORS)}; "
            f"this store has sites {store.sites}, layers {store.layers}, poolings {store.poolings}"
        )
    if left := sorted(set(store.poolings) - set(here)):
        log.warning("%s: persona_vectors have no %s: left out", path, ", ".join(left))
    found: dict[str, Any] = {PERSONA_VECTORS[p]: torch.from_numpy(_with_embedding(store, p)) for p in here}
    found |= {"ids": list(store.rows.ids), "questions": list(store.rows.questions)}
    found["columns"] = {name: torch.from_numpy(np.array(v)) for name, v in store.rows.columns.items()}
    torch.save({**found, "metadata": _texts(store)["metadata"]}, path)


def _with_embedding(store: "ActivationStore", pooling: str) -> Float32[np.ndarray, "layers_and_1 n d"]:
    """The embedding, then every block's output."""
    rows = np.full((len(store.layers) + 1, store.n_rows, store.d_model), np.nan, dtype=np.float32)
    if "resid_pre" in store.sites:
        rows[0] = store.read("resid_pre", pooling, 0)
    else:
        log.warning("%s: no resid_pre in the store: the embedding's row is NaN", store.files[0])
    for layer in store.layers:
        rows[to_hidden_states_index(layer)] = store.read("resid_post", pooling, layer)
    return rows


_WRITERS: dict[str, Callable[["ActivationStore", Path], None]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _persona_vectors,
}


def to_xarray(store: "ActivationStore", site: str, pooling: str, layers: Any = None, rows: Any = None) -> Any:
    """What `ActivationStore.read` gives, as an `xarray.DataArray` (extra `xarray`).

    Dimensions are row, layer and feature; along `row` stand the ids, the questions and every column of one number a row.

    Raises:
        MissingDependencyError: xarray is not installed.
        InputError: as `ActivationStore.read`.
    """
    xarray = require("xarray", extra="xarray")
    wanted = store.layers if layers is None else [int(layer) for layer in np.atleast_1d(layers)]
    at = row_indices(rows, store.n_rows)
    columns = {k: v for k, v in store.rows.columns.items() if np.ndim(v) == 1}
    along = {"question": np.array(store.rows.questions), **columns}
    return xarray.DataArray(
        store.read(site, pooling, wanted, at),
        dims=("row", "layer", "feature"),
        coords={
            "row": np.array(store.rows.ids)[at],
            "layer": wanted,
            **{k: ("row", v[at]) for k, v in along.items()},
        },
        name=f"{site}/{pooling}",
        attrs={"checkpoint": json.dumps(store.metadata.get("checkpoint"))},
    )

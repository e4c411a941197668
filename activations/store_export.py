"""Activations for programs that do not read HDF5: `.npz` and `.safetensors`.

Both hold, for each site and pooling, an array `SITE/POOLING` [n, layers, d] (float32; for the pooling `tokens`
[tokens, layers, d]), the `layers`, the rows' `tokens` and `offsets`, and each column as `columns/NAME`. `.npz` holds
`ids`, `questions` and `metadata` (JSON) as texts; `.safetensors` has them, as JSON, in its header's metadata.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.pooling import TOKENS
from activations.store_format import ENCODING_TYPE, ENCODING_VERSION
from activations.store_join import row_indices
from mech.errors import InputError
from mech.extras import require
from mech.files import atomic_path

if TYPE_CHECKING:
    from activations.store import ActivationStore


def export(store: "ActivationStore", path: Path) -> None:
    """Write a whole store as `.npz` or `.safetensors`, by the path's ending.

    Raises:
        InputError: another ending.
        FileFormatError: the store is damaged.
    """
    if path.suffix not in _WRITERS:
        raise InputError(f"{path}: export to a file ending in {' or '.join(_WRITERS)}")
    texts = {
        "encoding-type": ENCODING_TYPE,
        "encoding-version": ENCODING_VERSION,
        "metadata": json.dumps(store.metadata, sort_keys=True),
        "ids": json.dumps(list(store.rows.ids)),
        "questions": json.dumps(list(store.rows.questions)),
    }
    arrays = _arrays(store)
    with atomic_path(path) as temporary:
        _WRITERS[path.suffix](temporary, arrays, texts)


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


def _npz(path: Path, arrays: dict[str, np.ndarray], texts: dict[str, str]) -> None:
    plain = {name: np.array(json.loads(texts[name])) for name in ("ids", "questions")}
    rest = {name: np.array(text) for name, text in texts.items() if name not in plain}
    with path.open("wb") as stream:  # numpy would add an ending of its own to a name
        np.savez(stream, **arrays, **plain, **rest)  # type: ignore[arg-type]


def _safetensors(path: Path, arrays: dict[str, np.ndarray], texts: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    save_file(arrays, path, metadata=texts)


_WRITERS: dict[str, Callable[[Path, dict[str, np.ndarray], dict[str, str]], None]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
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

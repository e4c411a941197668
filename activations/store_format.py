"""The activation file format, version 1.0: names, dtypes, chunks. The specification is docs/activation-format.md."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float

from mech.errors import FileFormatError, InputError

ENCODING_TYPE = "sgtr-mech-activations"
ENCODING_VERSION = "1.0"
LIBVER = ("v110", "v110")
CHUNK_ROWS = 128
LAYER_CONVENTION = "layer l is the output of block l, from 0"
LOGICAL_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Rows:
    """What the rows of a file are."""

    ids: Sequence[str]
    """Name of each row; unique."""
    questions: Sequence[str]
    """Which question each row belongs to: the unit of every interval."""
    columns: Mapping[str, np.ndarray]
    """Further facts, one number a row (`n_prompt`, `n_response`, `sign`, ...)."""
    tokens: Sequence[np.ndarray]
    """Token ids that the model read, one array a row."""

    def __post_init__(self) -> None:
        n = len(self.ids)
        if not n or len(set(self.ids)) < n:
            raise InputError("rows need ids, each only once")
        for name, values in [("questions", self.questions), ("tokens", self.tokens), *self.columns.items()]:
            if len(values) != n:
                raise InputError(f"rows: {name} has {len(values)} entries for {n} ids")


def dataset_path(site: str, pooling: str, layer: int) -> str:
    """HDF5 path of the vectors of one site, pooling and layer."""
    return f"/activations/{site}/{pooling}/{layer}"


def to_bits(values: Float[np.ndarray, "*shape"], logical: str) -> np.ndarray:
    """What is stored: float32 as it is, bfloat16 as its upper 16 bits, rounded to nearest even."""
    if logical == "float32":
        return np.ascontiguousarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    # Rounding must not carry a NaN's payload into an infinity.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded >> 16).astype(np.uint16)


def from_bits(stored: np.ndarray, logical: str) -> Float[np.ndarray, "*shape"]:
    """Stored numbers as float32; exact in both cases."""
    if logical == "float32":
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)


def write_rows(file: h5py.File, rows: Rows) -> None:
    """The `/rows` group."""
    group = file.create_group("rows")
    for name, texts in (("id", rows.ids), ("question", rows.questions)):
        encoded = [text.encode() for text in texts]
        width = max(1, *map(len, encoded))
        group.create_dataset(
            name, data=np.array(encoded, dtype=f"S{width}"), fletcher32=True, chunks=(len(encoded),)
        )
    for name, values in rows.columns.items():
        column = np.asarray(values)
        group.create_dataset(
            f"columns/{name}", data=column, dtype=column.dtype, fletcher32=True, chunks=(len(column),)
        )
    flat = np.concatenate([np.asarray(t, dtype=np.int64) for t in rows.tokens])
    offsets = np.cumsum([0, *[len(t) for t in rows.tokens]], dtype=np.int64)
    group.create_dataset(
        "tokens", data=flat, dtype=np.int64, fletcher32=True, chunks=(max(1, min(len(flat), 16384)),)
    )
    group.create_dataset("offsets", data=offsets, dtype=np.int64, fletcher32=True, chunks=(len(offsets),))


def read_rows(file: h5py.File) -> Rows:
    """Read the `/rows` group."""
    group = file["rows"]
    flat, offsets = group["tokens"][()], group["offsets"][()]
    return Rows(
        ids=[b.decode() for b in group["id"][()]],
        questions=[b.decode() for b in group["question"][()]],
        columns={name: group["columns"][name][()] for name in group.get("columns", {})},
        tokens=[flat[a:b] for a, b in pairwise(offsets)],
    )


def read_header(file: h5py.File, path: Path) -> dict[str, Any]:
    """Check that a file is of this format and version; return its metadata.

    Raises:
        FileFormatError: it is not.
    """
    kind, found = file.attrs.get("encoding-type"), file.attrs.get("encoding-version")
    if kind != ENCODING_TYPE:
        raise FileFormatError(
            f"{path}: not an activation file (encoding-type is {kind!r}, not {ENCODING_TYPE!r})"
        )
    if found != ENCODING_VERSION:
        raise FileFormatError(
            f"{path}: format version {found!r}; this program reads {ENCODING_VERSION}: capture again, or update it"
        )
    metadata: dict[str, Any] = json.loads(file["metadata"][()].tobytes())
    return metadata

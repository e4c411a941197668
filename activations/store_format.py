"""The activation file format, version 1.1: names, dtypes, chunks. The specification is docs/activation-format.md."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from mech.errors import FileFormatError, InputError

ENCODING_TYPE = "sgtr-mech-activations"
ENCODING_VERSION = "1.1"
READABLE_VERSIONS = ("1.0", "1.1")
LIBVER = ("v110", "v110")
LAYER_CONVENTION = "layer l is the output of block l, from 0"
OTHER_WIDTHS = ("attn_head_out",)
"""Sites that need not be as wide as the residual stream."""
STORED_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}

Place = tuple[str, str, int]
"""Site, pooling, layer."""


@dataclass(frozen=True)
class Rows:
    """What the rows of a file are."""

    ids: Sequence[str]
    """Name of each row; unique."""
    questions: Sequence[str]
    """Which question each row belongs to: the unit of every interval."""
    columns: Mapping[str, np.ndarray]
    """Further facts: a number a row, or several (`n_prompt`, `sign`, `surprisal` [n]; `norms.SITE.POOLING` [n, layers])."""
    tokens: Sequence[np.ndarray]
    """Token ids that the model read, one array a row."""

    def __post_init__(self) -> None:
        n = len(self.ids)
        if not n or len(set(self.ids)) < n:
            raise InputError("rows need ids, each only once")
        for name, values in [("questions", self.questions), ("tokens", self.tokens), *self.columns.items()]:
            if len(values) != n:
                raise InputError(f"rows: {name} has {len(values)} entries for {n} ids")
        # HDF5 pads fixed-length text with NULs: a NUL of the text's own would be lost on reading.
        if bad := next((t for t in (*self.ids, *self.questions) if "\0" in t), None):
            raise InputError(f"rows: {bad!r} holds a NUL character")
        for name, column in self.columns.items():
            if "/" in name or np.ndim(column) not in (1, 2) or np.asarray(column).dtype.kind not in "iufb":
                raise InputError(
                    f"rows: column {name} must hold one number a row, or several, under a name without '/'"
                )
        for name, row in zip(self.ids, self.tokens, strict=True):
            if np.ndim(row) != 1 or (len(row) and np.asarray(row).dtype.kind not in "iu"):
                raise InputError(f"rows: tokens of {name} must be a list of integers")

    @cached_property
    def n_tokens(self) -> Int[np.ndarray, " n"]:
        """Tokens of each row."""
        return np.array([len(t) for t in self.tokens], dtype=np.int64)

    def vectors_of(self, rows: Int[np.ndarray, " some"]) -> Int[np.ndarray, " vectors"]:
        """Where the tokens of some rows lie among the tokens of all, row after row."""
        lengths = self.n_tokens[rows]
        starts = (np.cumsum(self.n_tokens) - self.n_tokens)[rows]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        vectors: np.ndarray = np.repeat(starts, lengths) + within
        return vectors

    def mask(self, row: int, of: Literal["prompt", "response"]) -> Bool[np.ndarray, " tokens"]:
        """Which of a row's tokens are its prompt's or its response's, by the columns `n_prompt` and `n_response`.

        Raises:
            InputError: the rows have no such columns.
        """
        if missing := {"n_prompt", "n_response"} - self.columns.keys():
            raise InputError(
                f"rows: no column {' and no '.join(sorted(missing))}: whose each token is was not stored"
            )
        start, length = int(self.columns["n_prompt"][row]), int(self.columns["n_response"][row])
        at = np.arange(len(self.tokens[row]))
        inside: np.ndarray = at < start if of == "prompt" else (at >= start) & (at < start + length)
        return inside


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    n_rows: int
    d_model: int
    """Width of the residual stream."""
    sites: tuple[str, ...]
    poolings: tuple[str, ...]
    layers: tuple[int, ...]
    """0-based block outputs, ascending."""
    logical_dtype: str
    shard: tuple[int, int] | None
    """Index and count of a numbered shard."""
    metadata: Mapping[str, Any]
    """What made the file."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Width of sites that are not as wide as the residual stream."""

    def __post_init__(self) -> None:
        if extra := sorted(set(self.widths) - (set(self.sites) & set(OTHER_WIDTHS))):
            raise InputError(
                f"widths are for {', '.join(OTHER_WIDTHS)}, where the file has it; not for {extra}"
            )
        if not self.sites or not self.poolings or not self.layers or self.d_model < 1:
            raise InputError("an activation file needs a width and at least one site, pooling and layer")
        for what, names in (("site", self.sites), ("pooling", self.poolings)):
            if len(set(names)) < len(names) or any(not n or "/" in n or n == "." for n in names):
                raise InputError(f"{what} names must differ, and hold no '/': {list(names)}")
        if min(self.layers) < 0 or any(b <= a for a, b in pairwise(self.layers)):
            raise InputError(f"layers count from 0, ascending, each once: {list(self.layers)}")
        if self.logical_dtype not in STORED_DTYPES:
            raise InputError(f"dtype {self.logical_dtype!r}; there are {', '.join(STORED_DTYPES)}")
        if self.shard and not 0 <= self.shard[0] < self.shard[1]:
            raise InputError(f"shard {self.shard[0]} of {self.shard[1]}: shards count from 0")
        own = self.metadata.get("per_shard", []) if isinstance(self.metadata, Mapping) else None
        if not isinstance(own, list) or not all(isinstance(name, str) for name in own):
            raise InputError("metadata must be a JSON object, and its per_shard a list of its names")

    @property
    def places(self) -> list[Place]:
        """Every dataset that the file must hold."""
        return [(s, p, layer) for s in self.sites for p in self.poolings for layer in self.layers]

    def width(self, site: str) -> int:
        """Numbers a vector has at a site."""
        return self.widths.get(site, self.d_model)

    @property
    def own_metadata_keys(self) -> set[str]:
        """Metadata entries in which the shards of one store may differ."""
        return {"per_shard", *self.metadata.get("per_shard", [])}


def dataset_path(site: str, pooling: str, layer: int) -> str:
    """HDF5 path of the vectors of one site, pooling and layer."""
    return f"/activations/{site}/{pooling}/{layer}"


def marks_path(site: str, pooling: str, layer: int) -> str:
    """HDF5 path of the rows marked as not finite at one site, pooling and layer."""
    return f"/nonfinite/{site}/{pooling}/{layer}"


def chunk_rows(d_model: int, stored: np.dtype[Any]) -> int:
    """Rows a chunk: 128, or 64 where 128 would be more than 1 MiB."""
    return 128 if 128 * d_model * stored.itemsize <= 1 << 20 else 64


def to_bits(values: Float[np.ndarray, "*shape"], logical: str) -> np.ndarray:
    """What is stored: float32 as it is, bfloat16 as its upper 16 bits, rounded to nearest even."""
    if logical == "float32":
        return np.ascontiguousarray(values, dtype="<f4")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    # Rounding must not carry a NaN's payload into an infinity.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded >> 16).astype("<u2")


def from_bits(stored: np.ndarray, logical: str) -> Float32[np.ndarray, "*shape"]:
    """Stored numbers as float32; exact in both cases."""
    if logical == "float32":
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)


def write_header(file: h5py.File, header: Header) -> None:
    """The root's attributes and `/metadata`.

    Texts are of fixed length: HDF5 keeps texts of variable length in its global heap, which has no checksum.
    """
    texts = {
        "encoding-type": ENCODING_TYPE,
        "encoding-version": ENCODING_VERSION,
        "logical_dtype": header.logical_dtype,
    }
    for name, text in texts.items():
        file.attrs[name] = np.bytes_(text.encode())
    file.attrs["n_rows"] = np.int64(header.n_rows)
    file.attrs["d_model"] = np.int64(header.d_model)
    file.attrs["sites"] = _texts(header.sites)
    file.attrs["widths"] = np.array([header.width(site) for site in header.sites], dtype=np.int64)
    file.attrs["poolings"] = _texts(header.poolings)
    file.attrs["layers"] = np.array(header.layers, dtype=np.int64)
    file.attrs["shard"] = np.array(header.shard or (0, 0), dtype=np.int64)
    encoded = json.dumps(dict(header.metadata), sort_keys=True, allow_nan=False).encode()
    _checksummed(file, "metadata", np.frombuffer(encoded, dtype=np.uint8))


def read_header(file: h5py.File, path: Path) -> Header:
    """Check that a file is of this format and version; return what it says of itself.

    Raises:
        FileFormatError: it is not of this format, or an entry is missing.
    """
    said = dict(file.attrs)  # each is read once
    kind, found = (_text(said.get(f"encoding-{name}")) for name in ("type", "version"))
    if kind != ENCODING_TYPE:
        raise FileFormatError(
            f"{path}: /: not an activation file (encoding-type is {kind!r}, not {ENCODING_TYPE!r})"
        )
    if found not in READABLE_VERSIONS:
        raise FileFormatError(
            f"{path}: /: format version {found!r}; this program reads {', '.join(READABLE_VERSIONS)}: capture again, or "
            "update it"
        )
    needed: tuple[str, ...] = ("n_rows", "d_model", "sites", "poolings", "layers", "logical_dtype", "shard")
    needed += ("widths",) if found != "1.0" else ()
    if missing := [name for name in needed if name not in said]:
        raise FileFormatError(
            f"{path}: /: no attribute {', '.join(missing)} (a draft of the format?): capture again"
        )
    d_model, sites = int(said["d_model"]), tuple(b.decode() for b in said["sites"])
    widths = dict(zip(sites, map(int, said.get("widths", [d_model] * len(sites))), strict=True))
    if wrong := [s for s, width in widths.items() if width != d_model and s not in OTHER_WIDTHS]:
        raise FileFormatError(
            f"{path}: /: {wrong[0]} is said to be {widths[wrong[0]]} wide, the residual stream {d_model}: capture again"
        )
    return Header(
        n_rows=int(said["n_rows"]),
        d_model=d_model,
        sites=sites,
        poolings=tuple(b.decode() for b in said["poolings"]),
        layers=tuple(int(layer) for layer in said["layers"]),
        logical_dtype=str(_text(said["logical_dtype"])),
        shard=(int(said["shard"][0]), int(said["shard"][1])) if said["shard"][1] else None,
        metadata=json.loads(file["metadata"][()].tobytes()),
        widths={site: width for site, width in widths.items() if width != d_model},
    )


def write_rows(file: h5py.File, rows: Rows) -> None:
    """The `/rows` group."""
    group = file.create_group("rows")
    _checksummed(group, "id", _texts(rows.ids))
    _checksummed(group, "question", _texts(rows.questions))
    group.create_group("columns")
    for name, values in rows.columns.items():
        write_column(file, name, np.asarray(values))
    flat = np.concatenate([np.asarray(t, dtype=np.int64) for t in rows.tokens])
    _checksummed(group, "tokens", flat)
    _checksummed(group, "offsets", np.cumsum([0, *rows.n_tokens], dtype=np.int64))


def write_column(file: h5py.File, name: str, values: np.ndarray) -> None:
    """One column of the rows' table: [n] or [n, k]."""
    _checksummed(file["rows/columns"], name, values)


def read_rows(file: h5py.File, n_rows: int) -> Rows:
    """Read the `/rows` group.

    Raises:
        FileFormatError: its parts do not fit each other or the file's number of rows.
    """
    group = file["rows"]
    flat, offsets = group["tokens"][()], group["offsets"][()]
    if (
        len(offsets) != n_rows + 1
        or offsets[0] != 0
        or offsets[-1] != len(flat)
        or (np.diff(offsets) < 0).any()
    ):
        raise FileFormatError(
            "offsets do not cut the tokens into one run a row: delete the file, capture again"
        )
    return Rows(
        ids=[b.decode() for b in group["id"][()]],
        questions=[b.decode() for b in group["question"][()]],
        # Never `get` with a default: it takes a damaged header for a missing group.
        columns={name: group["columns"][name][()] for name in group["columns"]},
        tokens=[flat[a:b] for a, b in pairwise(offsets)],
    )


def _checksummed(group: h5py.Group, name: str, values: np.ndarray) -> None:
    """A dataset in checksummed chunks of rows, of at most 1 MiB."""
    if not values.size:  # nothing to check, and HDF5 has no chunk of nothing
        group.create_dataset(name, data=values, dtype=values.dtype)
        return
    a_row = values.dtype.itemsize * int(np.prod(values.shape[1:]))
    chunk = (min(len(values), max(1, (1 << 20) // a_row)), *values.shape[1:])
    group.create_dataset(name, data=values, dtype=values.dtype, chunks=chunk, fletcher32=True)


def _texts(texts: Sequence[str]) -> np.ndarray:
    encoded = [text.encode() for text in texts]
    # Declared as UTF-8, for readers in other languages.
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(1, *map(len, encoded))))


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else None if value is None else str(value)

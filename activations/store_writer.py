"""Writing one activation file: each row once, bounded memory, verified, whole or not there."""

import errno
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import h5py
import numpy as np
from jaxtyping import Float, Int

from activations.pooling import TOKENS
from activations.stale import sweep_stale
from activations.store_format import (
    LAYER_CONVENTION,
    LIBVER,
    STORED_DTYPES,
    Header,
    Place,
    Rows,
    chunk_rows,
    dataset_path,
    from_bits,
    marks_path,
    read_header,
    read_rows,
    to_bits,
    write_column,
    write_header,
    write_rows,
)
from activations.store_slab import Slab
from mech.errors import GuardError, InputError
from mech.files import fsync

_ERRNO = re.compile(r"errno = (\d+)")


@dataclass(frozen=True)
class WriterOptions:
    """How a file is written; what is left out suits almost everyone."""

    nan: Literal["raise", "mark"] = "raise"
    """What a value that is not finite does: stop the writer, or be kept and listed under `/nonfinite`."""
    shard: tuple[int, int] | None = None
    """Index and count, where this file is one of several: opening their folder then misses none unnoticed."""
    buffer_bytes: int = 256 << 20
    """Memory for vectors that wait. Where a file holds more, its chunks are written several times."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Widths of sites that are not as wide as the residual stream."""
    notes: Sequence[str] = ()
    """Columns that are learnt while the rows are read, and come by `note`."""
    locking: bool = True
    """HDF5's file lock; a network file system without locks needs False. HDF5_USE_FILE_LOCKING overrides it."""


class ShardWriter:
    """Writes an activation file; on leaving the context cleanly it is checked and takes its name.

    Rows may come in any order (capturing sorts them by length); they wait in memory, up to `options.buffer_bytes`,
    and are written by whole chunks. On any exception the temporary file is removed and what stood at `path` stays.

    Args:
        path: the file to make. A file of that name is replaced when the new one is whole.
        metadata: what made it; JSON-able. A list under `per_shard` names the entries that may differ between shards.
        rows: what the rows are.
        sites: sites to be written.
        poolings: poolings to be written; `tokens` takes one vector a token of each row instead of one a row.
        layers: layers to be written.
        d_model: width of the residual stream.
        dtype: `float32`, or `bfloat16` (stored as its 16 bits).
        options: see `WriterOptions`.

    Raises:
        InputError: nothing to write, metadata that is not JSON, or a value that is not finite.
        GuardError: a row is missing, comes twice, or reads back differently.
        OSError: the disk is full or the folder cannot be written; it carries the path.
    """

    def __init__(
        self,
        path: Path,
        *,
        metadata: Mapping[str, Any],
        rows: Rows,
        sites: Sequence[str],
        poolings: Sequence[str],
        layers: Sequence[int],
        d_model: int,
        dtype: Literal["float32", "bfloat16"] = "float32",
        options: WriterOptions = WriterOptions(),
    ) -> None:
        try:
            described = {**metadata, "layer_convention": LAYER_CONVENTION}
            metadata = json.loads(json.dumps(described, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: metadata is not JSON ({error})") from error
        self.path, self.rows, self.options = path, rows, options
        self.header = Header(
            n_rows=len(rows.ids),
            d_model=d_model,
            sites=tuple(sorted(sites)),
            poolings=tuple(sorted(poolings)),
            layers=tuple(sorted(int(layer) for layer in layers)),
            logical_dtype=dtype,
            shard=options.shard,
            metadata=metadata,
            widths={s: w for s, w in options.widths.items() if w != d_model},
        )
        if taken := sorted(set(options.notes) & set(rows.columns)):
            raise InputError(
                f"{path}: the rows have columns {', '.join(taken)} already: leave them, or the notes, out"
            )
        self._notes: dict[str, np.ndarray] = {}
        self._noted = {name: np.zeros(len(rows.ids), dtype=bool) for name in options.notes}
        own = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._temporary = path.with_name(f".{path.name}.{own}.tmp")
        self._declared = set(self.header.places)
        self._file: h5py.File | None = None
        self._slabs: dict[Place, Slab] = {}
        self._marked: dict[Place, list[np.ndarray]] = {}

    def write(
        self,
        site: str,
        pooling: str,
        layer: int,
        row_indices: Int[np.ndarray, " batch"],
        values: Float[np.ndarray, "vectors d"],
    ) -> None:
        """Take the vectors of some rows at one site, pooling and layer.

        Args:
            site: a declared site.
            pooling: a declared pooling.
            layer: a declared layer.
            row_indices: which rows, in any order.
            values: one vector a row; for the pooling `tokens` the rows' tokens one after the other.

        Raises:
            InputError: a place, row or width that was not declared, a value that is not finite, or a writer that is not
                open.
            GuardError: a row that was written before.
            OSError: the disk is full.
        """
        place, name = (site, pooling, layer), dataset_path(site, pooling, layer)
        if place not in self._declared:
            raise InputError(f"{name} was not declared for {self.path}")
        self._check_rows(name, row_indices)
        at = (
            self.rows.vectors_of(row_indices)
            if pooling == TOKENS
            else np.asarray(row_indices, dtype=np.int64)
        )
        if values.shape != (len(at), self.header.width(site)):
            raise InputError(
                f"{name}: values {values.shape}, expected ({len(at)}, {self.header.width(site)})"
            )
        # Rounding to bfloat16 can overflow, so it is the stored numbers that must be finite.
        bits = to_bits(values, self.header.logical_dtype)
        self._check_finite(place, at, bits)
        if self._file is None:
            raise InputError(f"{self.path}: write inside the writer's `with` block")
        with self._disk():
            self._slabs[place].take(at, bits)
            self._bound_memory()

    def note(
        self, name: str, row_indices: Int[np.ndarray, " batch"], values: Float[np.ndarray, " batch *k"]
    ) -> None:
        """Take a declared column's entries for some rows.

        Raises:
            InputError: it was not declared, has another number of entries than before, or is for rows that there are not.
        """
        if name not in self._noted:
            raise InputError(f"{self.path}: the column {name} was not declared among its notes")
        self._check_rows(name, row_indices)
        empty = np.zeros((self.header.n_rows, *values.shape[1:]), dtype=values.dtype)
        column = self._notes.setdefault(name, empty)
        if column.shape[1:] != values.shape[1:]:
            raise InputError(
                f"{self.path}: {name}: {values.shape[1:]} numbers a row, before {column.shape[1:]}"
            )
        column[row_indices] = values
        self._noted[name][row_indices] = True

    def __enter__(self) -> "ShardWriter":
        with self._disk():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sweep_stale(self.path.parent)
            self._check_space()
        try:
            with self._disk():
                self._start()
        except BaseException:
            self._abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._disk():
                    self._finish()
        finally:
            self._abort()

    # -- inside ----------------------------------------------------------------------------------

    def _start(self) -> None:
        # No chunk cache: chunks are gathered in the slabs, and a full disk shows when a chunk is written.
        self._file = h5py.File(
            self._temporary, "x", libver=LIBVER, locking=self.options.locking, rdcc_nbytes=0
        )
        write_header(self._file, self.header)
        write_rows(self._file, self.rows)
        stored = STORED_DTYPES[self.header.logical_dtype]
        for place in self.header.places:
            width = self.header.width(place[0])
            n = int(self.rows.n_tokens.sum()) if place[1] == TOKENS else self.header.n_rows
            if not n:
                raise InputError(f"{self.path}: {dataset_path(*place)}: the rows have no tokens")
            chunks = (min(n, chunk_rows(width, stored)), width)
            dataset = self._file.create_dataset(
                dataset_path(*place), shape=(n, width), dtype=stored, chunks=chunks, fletcher32=True
            )
            dataset.attrs["logical_dtype"] = np.bytes_(self.header.logical_dtype.encode())
            self._slabs[place] = Slab(dataset, f"{self.path}: {dataset_path(*place)}")

    def _finish(self) -> None:
        for place, slab in self._slabs.items():
            slab.flush()
            if missing := slab.missing():
                raise GuardError(
                    f"{self.path}: {dataset_path(*place)}: {missing[1]} rows not written exactly once "
                    f"(vector {missing[0]} never was)"
                )
        file, self._file = self._file, None
        if file is None:
            raise GuardError(f"{self.path}: the writer was left twice")
        for name, there in self._noted.items():
            if not there.all():
                raise GuardError(f"{self.path}: column {name}: row {int(np.argmin(there))} was never noted")
            write_column(file, name, self._notes[name])
        file.create_group("nonfinite")
        for place, parts in self._marked.items():
            marks = np.sort(np.concatenate(parts))
            file.create_dataset(
                marks_path(*place), data=marks, dtype=np.int64, chunks=marks.shape, fletcher32=True
            )
        file.close()
        self._read_back()
        fsync(self._temporary)
        os.replace(self._temporary, self.path)  # noqa: PTH105  (the name of the guarantee)
        fsync(self.path.parent)

    def _read_back(self) -> None:
        with h5py.File(self._temporary, "r", locking=self.options.locking) as file:
            rows = read_rows(file, self.header.n_rows)
            same = list(rows.ids) == list(self.rows.ids) and list(rows.questions) == list(self.rows.questions)
            same &= all(map(np.array_equal, rows.tokens, self.rows.tokens))
            same &= all(
                np.array_equal(rows.columns[k], v, equal_nan=np.asarray(v).dtype.kind == "f")
                for k, v in {**self.rows.columns, **self._notes}.items()
            )
            if not same or read_header(file, self.path) != self.header:
                raise GuardError(
                    f"{self.path}: the rows or the header read back differently: is the disk sound?"
                )
            for place, slab in self._slabs.items():
                if (bad := slab.first_difference(file[dataset_path(*place)])) is not None:
                    raise GuardError(
                        f"{self.path}: {dataset_path(*place)}: from vector {bad} on, a chunk reads back differently: "
                        "is the disk sound?"
                    )

    def _abort(self) -> None:
        """Leave nothing behind; after a clean end there is nothing left."""
        file, self._file = self._file, None
        self._slabs.clear()
        if file is not None:
            # On a full disk closing fails too: what could not be flushed is thrown away anyhow.
            with suppress(OSError, RuntimeError):
                file.close()
        self._temporary.unlink(missing_ok=True)

    def _check_rows(self, name: str, rows: Int[np.ndarray, " batch"]) -> None:
        if rows.size and not 0 <= rows.min() <= rows.max() < self.header.n_rows:
            raise InputError(f"{self.path}: {name}: rows outside 0 to {self.header.n_rows - 1}")

    def _check_finite(self, place: Place, at: Int[np.ndarray, " vectors"], bits: np.ndarray) -> None:
        bad = ~np.isfinite(from_bits(bits, self.header.logical_dtype)).all(1)
        if not bad.any():
            return
        if self.options.nan == "raise":
            first = int(at[bad][0])
            row = (
                int(np.searchsorted(np.cumsum(self.rows.n_tokens), first, "right"))
                if place[1] == TOKENS
                else first
            )
            raise InputError(
                f"{dataset_path(*place)}, row {row} ({self.rows.ids[row]}): not finite in {self.header.logical_dtype}"
            )
        self._marked.setdefault(place, []).append(at[bad])

    def _bound_memory(self) -> None:
        held = sum(slab.held for slab in self._slabs.values())
        if held <= self.options.buffer_bytes:
            return
        for slab in sorted(self._slabs.values(), key=lambda s: -s.held):
            held -= slab.held
            slab.flush()
            if held <= self.options.buffer_bytes // 2:
                return

    def _check_space(self) -> None:
        stored, tokens = STORED_DTYPES[self.header.logical_dtype].itemsize, int(self.rows.n_tokens.sum())
        need = sum(
            stored * self.header.width(site) * (tokens if pooling == TOKENS else self.header.n_rows)
            for site, pooling, _ in self.header.places
        )
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise OSError(
                errno.ENOSPC, f"needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free", str(self.path)
            )

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Give what HDF5 and the system say about the disk one shape, with the path."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.filename == str(self.path):
                raise
            number, reason = _reason(error)
            raise OSError(
                number, f"cannot be written ({reason}); nothing was left behind", str(self.path)
            ) from error


def _reason(error: Exception) -> tuple[int, str]:
    """The system's number for what went wrong, and its words: HDF5 has both among addresses and sizes, and breaks the line before them."""
    line = (str(error).splitlines() or [""])[0]
    found = _ERRNO.search(str(error))
    number = getattr(error, "errno", None) or (int(found[1]) if found else None)
    return (number, os.strerror(number)) if number else (errno.EIO, line)

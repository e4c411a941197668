"""Writing one activation file: preallocated, each row once, verified, whole or not there."""

import json
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import h5py
import numpy as np
from jaxtyping import Float, Int

from activations.store_format import (
    CHUNK_ROWS,
    ENCODING_TYPE,
    ENCODING_VERSION,
    LAYER_CONVENTION,
    LIBVER,
    Rows,
    dataset_path,
    to_bits,
    write_rows,
)
from mech.errors import GuardError, InputError
from mech.files import fsync

log = logging.getLogger(__name__)

Place = tuple[str, str, int]


class ShardWriter:
    """Writes an activation file; on leaving the context cleanly it is checked and takes its name.

    Rows may come in any order (capturing sorts them by length). They are kept in memory, in stored form, until the
    end: a file's vectors are pooled, so they are small beside the model that made them, and every chunk is
    written once. Split a large capture into several files.

    Args:
        path: the file to make. A file of that name is replaced when the new one is whole.
        metadata: what made it; JSON-able.
        rows: what the rows are.
        sites: sites to be written.
        poolings: poolings to be written.
        layers: layers to be written.
        d_model: width.
        dtype: `float32`, or `bfloat16` (stored as its 16 bits).

    Raises:
        InputError: nothing to write, or metadata that is not JSON.
        GuardError: on leaving, when a row is missing, or reads back differently.
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
    ) -> None:
        if not sites or not poolings or not layers:
            raise InputError("an activation file needs at least one site, pooling and layer")
        try:
            self._metadata = json.dumps(
                {**metadata, "layer_convention": LAYER_CONVENTION}, sort_keys=True, allow_nan=False
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: metadata is not JSON ({error})") from error
        self.path, self.rows, self.dtype, self.d_model = path, rows, dtype, d_model
        stored = np.float32 if dtype == "float32" else np.uint16
        places: list[Place] = [(s, p, layer) for s in sites for p in poolings for layer in layers]
        self._values = {place: np.zeros((len(rows.ids), d_model), dtype=stored) for place in places}
        self._written = {place: np.zeros(len(rows.ids), dtype=np.int64) for place in places}
        self._temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")

    def write(
        self,
        site: str,
        pooling: str,
        layer: int,
        row_indices: Int[np.ndarray, " batch"],
        values: Float[np.ndarray, "batch d"],
    ) -> None:
        """Take the vectors of some rows at one site, pooling and layer.

        Raises:
            InputError: a place or width that was not declared, or a value that is not finite.
        """
        place = (site, pooling, layer)
        if place not in self._values:
            raise InputError(f"{dataset_path(*place)} was not declared for {self.path}")
        if values.shape != (len(row_indices), self.d_model):
            raise InputError(
                f"{dataset_path(*place)}: values {values.shape}, expected ({len(row_indices)}, {self.d_model})"
            )
        if not np.isfinite(values).all():
            row = int(row_indices[np.flatnonzero(~np.isfinite(values).all(1))[0]])
            raise InputError(f"{dataset_path(*place)}, row {row} ({self.rows.ids[row]}): not finite")
        self._values[place][row_indices] = to_bits(values, self.dtype)
        np.add.at(self._written[place], row_indices, 1)

    def __enter__(self) -> "ShardWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sweep_stale(self.path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()

    def _finish(self) -> None:
        for place, count in self._written.items():
            if (count != 1).any():
                odd = np.flatnonzero(count != 1)
                raise GuardError(
                    f"{self.path}: {dataset_path(*place)}: {len(odd)} rows not written exactly once (row {odd[0]}: {count[odd[0]]})"
                )
        try:
            self._write_file()
            self._read_back()
            fsync(self._temporary)
            os.replace(self._temporary, self.path)  # noqa: PTH105  (the name of the guarantee)
            fsync(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _write_file(self) -> None:
        with h5py.File(self._temporary, "w", libver=LIBVER, locking=True) as file:
            file.attrs["encoding-type"] = ENCODING_TYPE
            file.attrs["encoding-version"] = ENCODING_VERSION
            file.attrs["n_rows"] = len(self.rows.ids)
            file.attrs["d_model"] = self.d_model
            file.create_dataset(
                "metadata",
                data=np.frombuffer(self._metadata.encode(), dtype=np.uint8),
                chunks=True,
                fletcher32=True,
            )
            write_rows(file, self.rows)
            for place, values in self._values.items():
                dataset = file.create_dataset(
                    dataset_path(*place),
                    data=values,
                    dtype=values.dtype,
                    chunks=(min(CHUNK_ROWS, len(values)), self.d_model),
                    fletcher32=True,
                )
                dataset.attrs["logical_dtype"] = self.dtype

    def _read_back(self) -> None:
        with h5py.File(self._temporary, "r", locking=True) as file:
            for place, values in self._values.items():
                if not np.array_equal(file[dataset_path(*place)][()], values):
                    raise GuardError(
                        f"{self.path}: {dataset_path(*place)} reads back differently: is the disk sound?"
                    )


def sweep_stale(folder: Path) -> None:
    """Remove temporary files that dead processes of this machine left in a folder."""
    pattern = re.compile(rf"\..+\.{re.escape(socket.gethostname())}\.(\d+)\.tmp")
    for file in folder.glob(".*.tmp"):
        if (match := pattern.fullmatch(file.name)) and not _alive(int(match[1])):
            log.info("removing %s, left by a process that is gone", file)
            file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

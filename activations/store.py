"""Reading activation files: one file, or a folder of them read as one.

The format is specified in docs/activation-format.md. Nothing is guessed: what is missing, altered or of another
version is an error that names the file and the place in it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float

from activations.store_format import (
    LOGICAL_DTYPES,
    Rows,
    dataset_path,
    from_bits,
    read_header,
    read_rows,
)
from activations.store_writer import ShardWriter
from mech.errors import FileFormatError, InputError

__all__ = ["ActivationStore", "Problem", "Rows", "ShardWriter", "describe"]

RowSelection = slice | np.ndarray | Sequence[int] | None


@dataclass(frozen=True)
class Problem:
    """Something wrong in a file."""

    file: Path
    place: str
    """HDF5 path."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.place}: {self.what}"


class ActivationStore:
    """Activations on disk, opened for reading; a context manager.

    Files are opened when they are first read, in the process that reads them, so a store may be pickled or cross a
    fork.
    """

    def __init__(self, files: Sequence[Path], *, locking: bool = True) -> None:
        self.files = list(files)
        self._locking = locking
        self._open: dict[Path, h5py.File] = {}

    @classmethod
    def open(cls, path: Path, *, locking: bool = True) -> "ActivationStore":
        """Open a file, or a folder of files in the order of their names.

        Args:
            path: where.
            locking: HDF5's file locks; switch them off for a network file system that has none.

        Raises:
            FileFormatError: nothing there, or files that are not of this format or do not belong together.
        """
        files = sorted(path.glob("*.h5")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileFormatError(f"{path}: no activation files there")
        store = cls(files, locking=locking)
        first = store._shape(files[0])
        for file in files[1:]:
            if store._shape(file) != first:
                raise FileFormatError(
                    f"{file}: other sites, poolings, layers or width than {files[0]}: not one store"
                )
        return store

    # -- what is in it ---------------------------------------------------------------------------

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What made the first file."""
        file = self.files[0]
        with _named(file, "/metadata"):
            return read_header(self._file(file), file)

    @cached_property
    def rows(self) -> Rows:
        """The rows of all files, in order."""
        parts = []
        for file in self.files:
            with _named(file, "/rows"):
                parts.append(read_rows(self._file(file)))
        names = list(parts[0].columns)
        return Rows(
            ids=[i for p in parts for i in p.ids],
            questions=[q for p in parts for q in p.questions],
            columns={name: np.concatenate([p.columns[name] for p in parts]) for name in names},
            tokens=[t for p in parts for t in p.tokens],
        )

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(self._lengths)

    @property
    def sites(self) -> list[str]:
        """Sites."""
        return sorted({s for s, _, _ in self._places})

    @property
    def poolings(self) -> list[str]:
        """Poolings."""
        return sorted({p for _, p, _ in self._places})

    @property
    def layers(self) -> list[int]:
        """Layers, ascending."""
        return sorted({layer for _, _, layer in self._places})

    @property
    def d_model(self) -> int:
        """Width."""
        return int(self._shape(self.files[0])[1])

    # -- reading ---------------------------------------------------------------------------------

    def read(
        self,
        site: str,
        pooling: str,
        layers: int | Sequence[int] | None = None,
        rows: RowSelection = None,
        *,
        where: Callable[[Rows], np.ndarray] | None = None,
    ) -> Float[np.ndarray, "n *layers d"]:
        """Vectors as float32.

        Args:
            site: such as `resid_post`.
            pooling: such as `prompt_last`.
            layers: one layer gives [n, d]; several, or all when left out, give [n, layers, d].
            rows: indices in any order, a boolean mask, or a slice; all when left out.
            where: a boolean mask from the rows' table, instead of `rows`.

        Raises:
            InputError: a site, pooling, layer or row that is not there; the message lists what is.
            FileFormatError: a file is damaged; the message names it and the place in it.
        """
        if where is not None and rows is not None:
            raise InputError("give rows or where, not both")
        wanted = self._row_indices(where(self.rows) if where is not None else rows)
        chosen = [layers] if isinstance(layers, int) else list(self.layers if layers is None else layers)
        out = np.empty((len(wanted), len(chosen), self.d_model), dtype=np.float32)
        for i, layer in enumerate(chosen):
            if (site, pooling, layer) not in self._places:
                raise InputError(
                    f"{self.files[0]}: no {dataset_path(site, pooling, layer)}; there are sites {self.sites}, "
                    f"poolings {self.poolings}, layers {self.layers[0]} to {self.layers[-1]}"
                )
            out[:, i] = self._read_rows(dataset_path(site, pooling, layer), wanted)
        return out[:, 0] if isinstance(layers, int) else out

    def chunks(
        self, site: str, pooling: str, layers: int | Sequence[int] | None = None, *, size: int = 1024
    ) -> Iterator[Float[np.ndarray, "n *layers d"]]:
        """The rows in runs of `size`, for stores bigger than memory."""
        for start in range(0, self.n_rows, size):
            yield self.read(site, pooling, layers, slice(start, start + size))

    def verify(self) -> list[Problem]:
        """Read everything back: checksums, shapes, values that are not finite. An empty list is a sound store."""
        problems = []
        for file in self.files:
            try:
                self._file(file)
                with _named(file, "/rows"):
                    read_rows(self._file(file))
            except FileFormatError as error:
                problems.append(Problem(file, "/", str(error)))
                continue
            for place in sorted(self._places):
                path = dataset_path(*place)
                try:
                    values = self._dataset(file, path)
                    if not np.isfinite(values).all():
                        problems.append(Problem(file, path, "values that are not finite"))
                except FileFormatError as error:
                    problems.append(Problem(file, path, str(error)))
        return problems

    def require(self, **facts: Any) -> None:
        """Refuse a store made by something else than expected.

        Raises:
            FileFormatError: a metadata entry differs; the message names it.
        """
        for name, expected in facts.items():
            found = self.d_model if name == "d_model" else self.metadata.get(name)
            if found != expected:
                raise FileFormatError(f"{self.files[0]}: made with {name} = {found!r}, expected {expected!r}")

    def close(self) -> None:
        """Close the files."""
        for handle in self._open.values():
            handle.close()
        self._open.clear()

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_locking": self._locking, "_open": {}}

    # -- inside ----------------------------------------------------------------------------------

    def _file(self, path: Path) -> h5py.File:
        if path not in self._open:
            with _named(path, "/"):
                handle = h5py.File(path, "r", locking=self._locking)
                read_header(handle, path)
                self._open[path] = handle
        return self._open[path]

    def _shape(self, path: Path) -> tuple[list[tuple[str, str, int]], int]:
        with _named(path, "/activations"):
            file = self._file(path)
            places = [
                (site, pooling, int(layer))
                for site, poolings in file["activations"].items()
                for pooling, layers in poolings.items()
                for layer in layers
            ]
            return sorted(places), int(file.attrs["d_model"])

    @cached_property
    def _places(self) -> set[tuple[str, str, int]]:
        return set(self._shape(self.files[0])[0])

    @cached_property
    def _lengths(self) -> list[int]:
        lengths = []
        for path in self.files:
            with _named(path, "/"):
                lengths.append(int(self._file(path).attrs["n_rows"]))
        return lengths

    def _row_indices(self, rows: RowSelection) -> np.ndarray:
        every = np.arange(self.n_rows)
        if rows is None or isinstance(rows, slice):
            return every if rows is None else every[rows]
        chosen = np.asarray(rows)
        if chosen.dtype == bool:
            if len(chosen) != self.n_rows:
                raise InputError(f"a mask of {len(chosen)} entries for {self.n_rows} rows")
            return np.flatnonzero(chosen)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self.n_rows):
            raise InputError(f"row {chosen.max()} is out of range: the store has rows 0 to {self.n_rows - 1}")
        return chosen.astype(np.int64)

    def _read_rows(self, path: str, wanted: np.ndarray) -> Float[np.ndarray, "n d"]:
        """Rows of one dataset, read file by file as one contiguous run each, then put in the caller's order."""
        out = np.empty((len(wanted), self.d_model), dtype=np.float32)
        start = 0
        for file, length in zip(self.files, self._lengths, strict=True):
            here = np.flatnonzero((wanted >= start) & (wanted < start + length))
            if len(here):
                local = wanted[here] - start
                first, last = int(local.min()), int(local.max()) + 1
                out[here] = self._dataset(file, path, slice(first, last))[local - first]
            start += length
        return out

    def _dataset(self, file: Path, path: str, rows: slice = slice(None)) -> Float[np.ndarray, "n d"]:
        with _named(file, path):
            handle = self._file(file)
            dataset = handle[path]
            logical = dataset.attrs.get("logical_dtype")
            expected = (int(handle.attrs["n_rows"]), int(handle.attrs["d_model"]))
            if dataset.shape != expected or logical not in LOGICAL_DTYPES:
                raise FileFormatError(f"shape {dataset.shape} of {logical}, the file says {expected}")
            return from_bits(dataset[rows], str(logical))


def describe(path: Path) -> dict[str, Any]:
    """What is in an activation file, for people."""
    with ActivationStore.open(path) as store:
        return {
            "file": str(path),
            "n_rows": store.n_rows,
            "sites": store.sites,
            "poolings": store.poolings,
            "layers": store.layers,
            "d_model": store.d_model,
            "bytes": sum(f.stat().st_size for f in store.files),
            "columns": sorted(store.rows.columns),
            "metadata": store.metadata,
        }


@contextmanager
def _named(file: Path, place: str) -> Iterator[None]:
    """Turn whatever HDF5 raises into an error that names the file and the place in it."""
    try:
        yield
    except FileFormatError as error:
        text = str(error)
        raise (error if str(file) in text else FileFormatError(f"{file}: {place}: {text}")) from error
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, UnicodeDecodeError, InputError) as error:
        raise FileFormatError(
            f"{file}: {place}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): "
            "the file is truncated or damaged; delete it and run the study again"
        ) from error

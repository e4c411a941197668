"""One activation file, opened for reading: lazily, once in each process, every error named."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
from jaxtyping import Float32, Int

from activations.pooling import TOKENS
from activations.store_chunks import find_chunks, read_chunks
from activations.store_format import (
    STORED_DTYPES,
    Header,
    Place,
    Rows,
    dataset_path,
    from_bits,
    marks_path,
    read_header,
    read_rows,
)
from mech.errors import FileFormatError, InputError

RUN_BYTES = 64 << 20
"""The most that one read of a run of rows holds beside its result."""


class Shard:
    """One file; safe to pickle and to carry over a fork."""

    def __init__(self, path: Path, *, locking: bool = True) -> None:
        self.path, self._locking = path, locking
        self._opened: tuple[int, h5py.File] | None = None
        self._rows: Rows | None = None
        self._header: Header | None = None
        _ = self.header

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_rows": None}

    @property
    def handle(self) -> h5py.File:
        """This process's own handle.

        Raises:
            FileFormatError: the file is gone, damaged, or another one than before.
        """
        if self._opened and self._opened[0] == os.getpid():
            return self._opened[1]
        if self._opened:
            # It came over a fork. HDF5 would share its descriptor, and so its position, with the parent: close this
            # process's copy. That drops the parent's lock too, which guards nothing: whole files are never written.
            self._opened[1].close()
            self._opened = None
        with named(self.path, "/"):
            handle = h5py.File(self.path, "r", locking=self._locking)
            try:
                self._header = self._checked_header(handle)
            except BaseException:
                handle.close()
                raise
        self._opened = (os.getpid(), handle)
        return handle

    def _checked_header(self, handle: h5py.File) -> Header:
        header = read_header(handle, self.path)
        if self._header is not None and header != self._header:
            raise FileFormatError("replaced by another file since it was opened: open the store again")
        return header

    @property
    def header(self) -> Header:
        """What the file says of itself."""
        if self._header is None:
            _ = self.handle
        return cast("Header", self._header)  # opening has set it

    @property
    def rows(self) -> Rows:
        """The file's rows, read once."""
        if self._rows is None:
            with named(self.path, "/rows"):
                self._rows = read_rows(self.handle, self.header.n_rows)
        return self._rows

    def n_vectors(self, pooling: str) -> int:
        """Length of a dataset: rows, or tokens for the ragged pooling."""
        return int(self.rows.n_tokens.sum()) if pooling == TOKENS else self.header.n_rows

    def read_into(self, out: Float32[np.ndarray, "n d"], place: Place, wanted: Int[np.ndarray, " n"]) -> None:
        """Read vectors of one dataset.

        Args:
            out: where they go; C-contiguous.
            place: which dataset.
            wanted: their indices in this file, ascending, each once.

        Raises:
            FileFormatError: the dataset is missing, damaged, or of another shape or dtype than the file says.
        """
        dataset, logical = self.dataset(place), self.header.logical_dtype
        with named(self.path, dataset_path(*place)):
            if (chunks := find_chunks(dataset, logical)) and read_chunks(chunks, out, wanted):
                return
            _check_all_there(dataset)
            for a, b in runs(wanted, dataset.chunks[0], dataset.dtype.itemsize * dataset.shape[1]):
                first, last = int(wanted[a]), int(wanted[b - 1]) + 1
                if last - first > b - a:
                    out[a:b] = from_bits(dataset[first:last][wanted[a:b] - first], logical)
                elif logical == "float32":
                    dataset.read_direct(out, np.s_[first:last], np.s_[a:b])
                else:
                    out[a:b] = from_bits(dataset[first:last], logical)

    def dataset(self, place: Place) -> h5py.Dataset:
        """One dataset, of the shape and dtype that the file declares.

        Raises:
            FileFormatError: it is not.
        """
        header, path = self.header, dataset_path(*place)
        expected = (
            (self.n_vectors(place[1]), header.width(place[0])),
            header.logical_dtype,
            STORED_DTYPES[header.logical_dtype],
        )
        with named(self.path, path):
            dataset = self.handle[path]
            found = (dataset.shape, dataset.attrs["logical_dtype"].decode(), dataset.dtype)
            if found != expected or not (dataset.fletcher32 and dataset.chunks):
                raise FileFormatError(
                    f"shape {found[0]} of {found[1]} in {found[2]}, {'' if dataset.fletcher32 else 'un'}checked; "
                    f"the file declares {expected[0]} of {expected[1]} in {expected[2]}, checked: capture again"
                )
            return dataset

    def marked(self, place: Place) -> Int[np.ndarray, " n"]:
        """Vectors that were not finite when they were written, and were marked as such."""
        with named(self.path, marks_path(*place)):
            # Group by group, for asking for a whole path at once takes a damaged group for a missing one.
            group = self.handle["nonfinite"]
            for part in map(str, place):
                if part not in list(group):
                    return np.zeros(0, dtype=np.int64)
                group = group[part]
            return np.asarray(group[()], dtype=np.int64)

    def close(self) -> None:
        """Close this process's handle; reading again opens it again."""
        if self._opened and self._opened[0] == os.getpid():
            self._opened[1].close()
            self._opened = None


def _check_all_there(dataset: h5py.Dataset) -> None:
    """HDF5 reads zeros where a chunk was never written."""
    expected = int(np.prod([-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True)]))
    if (there := dataset.id.get_num_chunks()) != expected:
        raise FileFormatError(
            f"{there} of {expected} chunks are there, the others were never written: capture again"
        )


def runs(wanted: Int[np.ndarray, " n"], chunk: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut ascending indices into pieces that are each read as one contiguous run.

    A gap of a whole chunk or more starts a new run, since a chunk is the least that HDF5 reads.
    """
    if not len(wanted):
        return
    most = max(1, RUN_BYTES // row_bytes)
    breaks = [0, *(np.flatnonzero(np.diff(wanted // chunk) > 1) + 1).tolist(), len(wanted)]
    for start, stop in pairwise(breaks):
        at = start
        while at < stop:
            end = at + int(np.searchsorted(wanted[at:stop], wanted[at] + most))
            yield at, end
            at = end


def split_by(lengths: Sequence[int], wanted: Int[np.ndarray, " n"]) -> Iterator[tuple[int, slice, int]]:
    """Cut ascending indices over files laid end to end: file, its slice of `wanted`, its first index."""
    start = 0
    for file, length in enumerate(lengths):
        a, b = np.searchsorted(wanted, [start, start + length])
        if b > a:
            yield file, slice(int(a), int(b)), start
        start += length


@contextmanager
def named(file: Path, place: str) -> Iterator[None]:
    """Turn whatever HDF5 raises into an error that names the file, the place in it, and what to do."""
    try:
        yield
    except FileFormatError as error:
        text = str(error)
        raise (
            error if text.startswith(str(file)) else FileFormatError(f"{file}: {place}: {text}")
        ) from error
    except FileNotFoundError:
        raise FileFormatError(f"{file}: {place}: no such file: was it moved? capture it again") from None
    except PermissionError as error:
        raise FileFormatError(f"{file}: {place}: may not be read (permissions)") from error
    except (
        OSError,
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        AttributeError,
        IndexError,
        InputError,
    ) as error:
        if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOLCK):
            raise FileFormatError(
                f"{file}: {place}: HDF5 could not lock it: a writer has it open, or its file system has no locks; "
                "in the second case open it with locking=False, or set HDF5_USE_FILE_LOCKING=FALSE"
            ) from error
        raise FileFormatError(
            f"{file}: {place}: cannot be read ({type(error).__name__}: {_first_line(error)}): "
            "truncated, damaged or incomplete; delete it and capture it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]

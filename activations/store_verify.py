"""Checking activation files: everything is read back, and what is there is held against the rules of the format.

Reading does not need every rule, for HDF5 reads other chunks and filters as well. But where one is broken, contents may lie under no
checksum, or in another file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activations.store_format import STORED_DTYPES, Place, chunk_rows, dataset_path, marks_path
from activations.store_shard import RUN_BYTES, Shard, named
from mech.errors import FileFormatError

_TEXT = np.dtype("S1")
"""Stands for texts of any fixed length."""
_DTYPES = {
    "/metadata": np.dtype("<u1"),
    "/rows/id": _TEXT,
    "/rows/question": _TEXT,
    "/rows/tokens": np.dtype("<i8"),
    "/rows/offsets": np.dtype("<i8"),
}
_SUPERBLOCK, _OBJECT_HEADER = 3, 2
"""HDF5's versions of them within the bounds `v110`: the first with checksums throughout."""


@dataclass(frozen=True)
class Problem:
    """Something wrong in a file."""

    file: Path
    place: str
    """HDF5 path."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.place}: {self.what}"


def shard_problems(shard: Shard) -> list[Problem]:
    """What is wrong in one file: damage, values that are not finite and not marked, broken rules of the format."""
    try:
        _ = shard.rows
    except FileFormatError as error:
        return [_problem(shard, "/rows", error)]
    found = []
    for place in shard.header.places:
        try:
            what = _finite_problem(shard, place)
        except FileFormatError as error:
            found.append(_problem(shard, dataset_path(*place), error))
            continue
        if what:
            found.append(Problem(shard.path, dataset_path(*place), what))
    said = {problem.place for problem in found}
    return [*found, *(problem for problem in _broken_rules(shard) if problem.place not in said)]


def _problem(shard: Shard, place: str, error: FileFormatError) -> Problem:
    return Problem(shard.path, place, str(error).removeprefix(f"{shard.path}: {place}: "))


def _finite_problem(shard: Shard, place: Place) -> str | None:
    """What is wrong with the finiteness of one dataset, read in runs."""
    n, d = shard.n_vectors(place[1]), shard.header.width(place[0])
    step = max(1, RUN_BYTES // (4 * d))
    bad = []
    for start in range(0, n, step):
        at = np.arange(start, min(n, start + step))
        values = np.empty((len(at), d), dtype=np.float32)
        shard.read_into(values, place, at)
        bad.append(at[~np.isfinite(values).all(1)])
    found, marked = np.concatenate(bad), shard.marked(place)
    if np.array_equal(found, marked):
        return None
    return f"{len(found)} vectors are not finite, {len(marked)} are marked as such (first: {np.setxor1d(found, marked)[0]})"


# -- rules of the format -----------------------------------------------------------------------------


def _broken_rules(shard: Shard) -> Iterator[Problem]:
    declared = {dataset_path(*place): place for place in shard.header.places}
    marks = {marks_path(*place) for place in shard.header.places}
    allowed = {parent for path in (*declared, *marks) for parent in _with_parents(path)}
    if "layer_convention" not in shard.header.metadata:
        yield Problem(shard.path, "/metadata", "does not name its layer_convention")
    if shard.handle.id.get_create_plist().get_version()[0] < _SUPERBLOCK:
        yield Problem(shard.path, "/", "written outside HDF5's bounds v110: its headers have no checksums")
    for path, item in _objects(shard, "/", shard.handle):
        if isinstance(item, Problem):
            yield item
            continue
        try:
            with named(shard.path, path):
                broken = list(_of_object(item))
                if path.startswith(("/activations/", "/nonfinite/")) and path not in allowed:
                    broken.append("not declared in the file's header")
                elif isinstance(item, h5py.Dataset):
                    place = declared.get(path)
                    broken += _of_dataset(item, _dtype_of(path, item), _chunks_of(shard, place))
        except FileFormatError as error:
            yield _problem(shard, path, error)
            continue
        if broken:
            yield Problem(shard.path, path, "; ".join(broken))


def _with_parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(2, len(parts) + 1)]


def _objects(shard: Shard, path: str, group: h5py.Group) -> Iterator[tuple[str, Any]]:
    """A group, and every group and dataset below it, by path; in the place of one that cannot be reached, or is only linked, a `Problem`."""
    yield path, group
    try:
        with named(shard.path, path):
            names = list(group)
    except FileFormatError as error:
        yield path, _problem(shard, path, error)
        return
    for name in names:
        below = f"{path.rstrip('/')}/{name}"
        try:
            with named(shard.path, below):
                hard = group.id.links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD
                item = group[name] if hard else Problem(shard.path, below, "a link to another place or file")
        except FileFormatError as error:
            item = _problem(shard, below, error)
        if isinstance(item, h5py.Group):
            yield from _objects(shard, below, item)
        else:
            yield below, item


def _of_object(item: Any) -> Iterator[str]:
    """Rules of any group or dataset: its header, and the types of its attributes."""
    if h5py.h5o.get_info(item.id).hdr.version < _OBJECT_HEADER:
        yield "written outside HDF5's bounds v110: its header has no checksum"
    for name in item.attrs:
        if what := _outside(item.attrs.get_id(name).dtype):
            yield f"attribute {name} holds {what}"


def _of_dataset(
    item: h5py.Dataset, dtype: np.dtype[Any] | None, chunks: tuple[int, ...] | None
) -> Iterator[str]:
    """Rules of a dataset: its type, and that one checksum lies over all that it holds.

    Args:
        item: the dataset.
        dtype: what it must be, where the format says it.
        chunks: what its chunks must be, where the format says it.
    """
    if what := _outside(item.dtype):
        yield f"holds {what}"
    elif dtype is not None and item.dtype != dtype and not (dtype == _TEXT and item.dtype.kind == "S"):
        yield f"is of type {item.dtype}, not {'text' if dtype == _TEXT else dtype}"
    if not item.size:
        if item.name.startswith("/nonfinite/"):
            yield "is there, and marks nothing"
        return
    made = item.id.get_create_plist()
    filters = [made.get_filter(i)[0] for i in range(made.get_nfilters())]
    if item.is_virtual or item.chunks is None or filters != [h5py.h5z.FILTER_FLETCHER32]:
        yield "is not in chunks that pass through fletcher32 and nothing else"
        return
    if chunks is not None and item.chunks != chunks:
        yield f"has chunks of {item.chunks}, not {chunks}"
    unchecked: list[int] = []
    item.id.chunk_iter(lambda chunk: unchecked.append(chunk.byte_offset) if chunk.filter_mask else None)
    if unchecked:
        yield f"{len(unchecked)} of its chunks have no checksum"


def _outside(dtype: np.dtype[Any]) -> str | None:
    """What a type keeps outside its dataset, or has no checksum over; None for plain numbers and texts."""
    if h5py.check_ref_dtype(dtype) is not None:
        return "references"
    if h5py.check_vlen_dtype(dtype) is not None or (
        (text := h5py.check_string_dtype(dtype)) and text.length is None
    ):
        return "texts or arrays of variable length"
    return None


def _dtype_of(path: str, item: h5py.Dataset) -> np.dtype[Any] | None:
    return np.dtype("<i8") if path.startswith("/nonfinite/") else _DTYPES.get(path)


def _chunks_of(shard: Shard, place: Place | None) -> tuple[int, ...] | None:
    if place is None:
        return None
    width = shard.header.width(place[0])
    rows = chunk_rows(width, STORED_DTYPES[shard.header.logical_dtype])
    return min(shard.n_vectors(place[1]), rows), width

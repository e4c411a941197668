"""Keeping stores: merging several into one file, deleting old ones."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32, Int

from activations.pooling import TOKENS
from activations.store import ActivationStore
from activations.store_format import ENCODING_TYPE, Header
from activations.store_join import check_belong_together
from activations.store_shard import Shard
from activations.store_writer import ShardWriter, WriterOptions
from mech.errors import InputError

BYTES_AT_ONCE = 64 << 20
"""Of vectors that are held while they are copied; a longer row is copied alone."""


def merge(stores: Sequence[Path], out: Path) -> Path:
    """Make one file of several stores of the same making, their rows one after the other.

    Vectors are copied as float32, which both precisions on disk hold exactly; memory does not grow with them. The stores stay.

    Raises:
        InputError: `out` is there already, or there is nothing to merge.
        FileFormatError: they differ in what they hold or in what made them, share a row, are damaged, or a folder lacks a shard.
    """
    if out.exists() or not stores:
        raise InputError(f"{out}: is there already" if out.exists() else "no activation files to merge")
    files, header = _files_that_belong_together(stores)
    with ActivationStore(files) as store:
        writer = ShardWriter(
            out,
            metadata={k: v for k, v in store.metadata.items() if k != "layer_convention"},
            rows=store.rows,
            sites=store.sites,
            poolings=store.poolings,
            layers=store.layers,
            d_model=store.d_model,
            dtype="bfloat16" if store.dtype == "bfloat16" else "float32",
            options=WriterOptions(nan="mark", widths=header.widths),
        )
        with writer:
            for site, pooling, layer in header.places:
                for rows in _runs(store, pooling, 4 * header.width(site)):
                    writer.write(site, pooling, layer, rows, _vectors(store, site, pooling, layer, rows))
    return out


def _files_that_belong_together(stores: Sequence[Path]) -> tuple[list[Path], Header]:
    """The files of all stores, each store whole, and the header of the first."""
    files: list[Path] = []
    for path in stores:
        with ActivationStore.open(path) as store:
            files += store.files
    with ExitStack() as stack:
        shards = [stack.enter_context(closing(Shard(file))) for file in files]
        check_belong_together(shards, whole=False)
        return files, shards[0].header


def _runs(store: ActivationStore, pooling: str, vector_bytes: int) -> Iterator[Int[np.ndarray, " n"]]:
    """All rows in turn, as many at a time as `BYTES_AT_ONCE` holds vectors of."""
    vectors = store.rows.n_tokens if pooling == TOKENS else np.ones(store.n_rows, dtype=np.int64)
    ends, most, start = np.cumsum(vectors), BYTES_AT_ONCE // vector_bytes, 0
    while start < store.n_rows:
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield np.arange(start, stop)
        start = stop


def _vectors(
    store: ActivationStore, site: str, pooling: str, layer: int, rows: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, "vectors d"]:
    """As a writer takes them: one a row, or the rows' tokens one after the other."""
    if pooling == TOKENS:
        return np.concatenate(store.read_tokens(site, layer, rows))
    return store.read(site, pooling, layer, rows)


def prune(
    folder: Path, *, days: float | None = None, max_bytes: float | None = None, dry_run: bool = True
) -> list[Path]:
    """Delete activation files below a folder, oldest first: those older than `days`, then until `max_bytes` are left.

    Args:
        folder: searched through; HDF5 files of other kinds, and what cannot be opened, are left alone.
        days: since a file was written.
        max_bytes: what may stay, in all.
        dry_run: only say which.

    Returns:
        The files thrown away, or that would be. What made them is still on disk, so a study captures them again when asked to.

    Raises:
        InputError: no such folder; neither `days` nor `max_bytes` is given, or one of them is below 0.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (days is None and max_bytes is None) or not (days or 0) >= 0 or not (max_bytes or 0) >= 0:
        raise InputError("prune: say how old files may be, or how many bytes may stay, in numbers from 0 up")
    files = sorted(filter(_is_ours, folder.rglob("*.h5")), key=lambda f: (f.stat().st_mtime, str(f)))
    left, chosen, now = sum(f.stat().st_size for f in files), [], time.time()
    for file in files:
        too_old = days is not None and now - file.stat().st_mtime > days * 86400
        if too_old or (max_bytes is not None and left > max_bytes):
            chosen.append(file)
            left -= file.stat().st_size
    for file in chosen if not dry_run else ():
        file.unlink()
    return chosen


def _is_ours(file: Path) -> bool:
    try:
        with h5py.File(file, "r", locking=False) as opened:  # one that cannot be locked is ours all the same
            return bool(opened.attrs["encoding-type"] == ENCODING_TYPE.encode())
    except (OSError, KeyError):
        return False

"""Keeping stores: merging several into one file, deleting old ones."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from activations.pooling import TOKENS
from activations.store import ActivationStore
from activations.store_join import check_belong_together
from activations.store_shard import Shard
from activations.store_writer import ShardWriter, WriterOptions
from mech.errors import InputError

ROWS_AT_ONCE = 1024


def merge(stores: Sequence[Path], out: Path) -> Path:
    """Make one file of several stores of the same making, their rows one after the other.

    Vectors are copied as float32, which both precisions on disk hold exactly; memory does not grow with them. The stores stay.

    Raises:
        InputError: `out` is there already, or there is nothing to merge.
        FileFormatError: they differ in what they hold or in what made them, share a row, or are damaged.
    """
    files = [f for path in stores for f in (sorted(path.glob("*.h5")) if path.is_dir() else [path])]
    if out.exists() or not files:
        raise InputError(f"{out}: is there already" if out.exists() else "no activation files to merge")
    shards = [Shard(file, locking=True) for file in files]
    try:
        check_belong_together(shards, whole=False)
        header = shards[0].header
    finally:
        for shard in shards:
            shard.close()
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
                for start in range(0, store.n_rows, ROWS_AT_ONCE):
                    rows = np.arange(start, min(start + ROWS_AT_ONCE, store.n_rows))
                    writer.write(site, pooling, layer, rows, _vectors(store, site, pooling, layer, rows))
    return out


def _vectors(
    store: ActivationStore, site: str, pooling: str, layer: int, rows: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, "vectors d"]:
    """As a writer takes them: one a row, or the rows' tokens one after the other."""
    if pooling == TOKENS:
        return np.concatenate(store.read_tokens(site, layer, rows))
    return store.read(site, pooling, layer, rows)


def prune(
    folder: Path, *, days: float | None = None, max_bytes: int | None = None, dry_run: bool = True
) -> list[Path]:
    """Delete activation files below a folder, oldest first: those older than `days`, then until `max_bytes` are left.

    Args:
        folder: searched through.
        days: since a file was written.
        max_bytes: what may stay, in all.
        dry_run: only say which.

    Returns:
        The files thrown away, or that would be. What made them is still on disk, so a study captures them again when asked to.

    Raises:
        InputError: neither `days` nor `max_bytes` is given.
    """
    if days is None and max_bytes is None:
        raise InputError("prune: say how old files may be, or how many bytes may stay")
    files = sorted(folder.rglob("*.h5"), key=lambda f: (f.stat().st_mtime, str(f)))
    left, chosen, now = sum(f.stat().st_size for f in files), [], time.time()
    for file in files:
        too_old = days is not None and now - file.stat().st_mtime > days * 86400
        if too_old or (max_bytes is not None and left > max_bytes):
            chosen.append(file)
            left -= file.stat().st_size
    for file in chosen if not dry_run else ():
        file.unlink()
    return chosen

"""How fast one layer of an activation file is read, beside other layouts of the same numbers.

    python bench/store.py --json store.json

All variants are read in turn in one run, from the page cache; `--cold` asks the system to forget the files before each
read (as far as it obliges). Times are medians; `ratio` is the median over rounds of the ratio to the contiguous
dataset in the same round; `cpu ms` is what a read computed, which other work on the machine changes little.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
from table import show, write_json

from activations import store_chunks, store_shard
from activations.store import ActivationStore, Rows, ShardWriter
from activations.store_format import LIBVER, chunk_rows

SITE, POOLING = "resid_post", "response_mean"
COLUMNS = (
    ("layout", "layout", ""),
    ("ms", "ms", ".2f"),
    ("mb_per_s", "MB/s", ".0f"),
    ("ratio", "ratio", ".2f"),
    ("cpu_ms", "cpu ms", ".2f"),
)


def main() -> None:
    """Run, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--cold", action="store_true", help="drop the files from the page cache before each read"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    values = np.random.default_rng(0).standard_normal((args.rows, args.width)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        readers = make_files(Path(name), values)
        for _, read in readers.values():
            np.testing.assert_array_equal(read(), values)
        times, cpu = measure(readers, args.rounds, cold=args.cold)
    table = summarise(times, cpu, values.nbytes)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    print(f"one layer, {args.rows} x {args.width} float32, {'cold' if args.cold else 'cached'}; {machine}")
    show(table, COLUMNS)
    facts = {"rows": args.rows, "width": args.width, "rounds": args.rounds, "cold": args.cold}
    write_json(args.json, {**facts, "machine": machine, "table": table})


def make_files(folder: Path, values: np.ndarray) -> dict[str, tuple[Path, Callable[[], np.ndarray]]]:
    """The same numbers in every layout, and how each is read (opening the file counts)."""
    n, d = values.shape
    ours = (chunk_rows(d, values.dtype), d)
    layouts = {
        "contiguous": {},
        f"chunks {ours}": {"chunks": ours},
        f"chunks {ours}, fletcher32": {"chunks": ours, "fletcher32": True},
        "h5py's automatic chunks": {"chunks": True},
        "one row a chunk, fletcher32": {"chunks": (1, d), "fletcher32": True},
    }
    readers: dict[str, tuple[Path, Callable[[], np.ndarray]]] = {}
    for i, (name, layout) in enumerate(layouts.items()):
        path = folder / f"{i}.h5"
        with h5py.File(path, "w", libver=LIBVER) as file:
            file.create_dataset("x", data=values, dtype=values.dtype, **layout)
        readers[name] = (path, lambda path=path: plain(path))
    rows = Rows([str(i) for i in range(n)], ["q"] * n, {}, [np.zeros(1, dtype=np.int64)] * n)
    path = folder / "store.h5"
    with ShardWriter(
        path, metadata={}, rows=rows, sites=[SITE], poolings=[POOLING], layers=[0, 1], d_model=d
    ) as writer:
        for layer in (0, 1):
            writer.write(SITE, POOLING, layer, np.arange(n), values)
    readers["contiguous, into a prepared array"] = (folder / "0.h5", prepared(folder / "0.h5"))
    readers["ActivationStore.open and read"] = (path, lambda: stored(path))
    readers["the same, HDF5 checking"] = (path, lambda: stored(path, past_hdf5=False))
    return readers


def plain(path: Path) -> np.ndarray:
    """Read a layout with h5py alone."""
    with h5py.File(path) as file:
        return file["x"][()]


def prepared(path: Path) -> Callable[[], np.ndarray]:
    """A reader of a layout into an array that is there already: no memory is asked for."""
    with h5py.File(path) as file:
        out = np.zeros(file["x"].shape, dtype=file["x"].dtype)

    def read() -> np.ndarray:
        with h5py.File(path) as file:
            file["x"].read_direct(out)
        return out

    return read


def stored(path: Path, *, past_hdf5: bool = True) -> np.ndarray:
    """Read one layer through the store."""
    find = store_chunks.find_chunks if past_hdf5 else lambda *_: None
    with (
        patch.object(store_shard, "find_chunks", find),
        ActivationStore.open(path) as store,
    ):
        return store.read(SITE, POOLING, 0)


def measure(
    readers: dict[str, tuple[Path, Callable[[], np.ndarray]]], rounds: int, *, cold: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each reader in each round, by the clock and of computing, the readers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    cpu: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, (path, read) in readers.items():
            if cold:
                forget(path)
            start, computed = time.perf_counter(), time.process_time()
            read()
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - computed)
    return times, cpu


def forget(path: Path) -> None:
    """Ask the system to drop a file from its page cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def summarise(
    times: dict[str, list[float]], cpu: dict[str, list[float]], n_bytes: int
) -> list[dict[str, float | str]]:
    """Medians, and ratios to the contiguous layout."""
    base = np.array(times["contiguous"])
    return [
        {
            "layout": name,
            "ms": float(np.median(seconds) * 1e3),
            "mb_per_s": float(n_bytes / 1e6 / np.median(seconds)),
            "ratio": float(np.median(np.array(seconds) / base)),
            "cpu_ms": float(np.median(cpu[name]) * 1e3),
        }
        for name, seconds in times.items()
    ]


if __name__ == "__main__":
    main()

"""Writing an activation file when the process is killed, the disk full or read-only, or another writes the same."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from multiprocessing.synchronize import Event
from pathlib import Path

import h5py
import numpy as np
import pytest

from activations.stale import sweep_stale
from activations.store import ActivationStore
from tests.store_files import SITE, make_rows, make_values, write_file

ROOT = Path(__file__).parent.parent
N = 300

WRITING = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from activations.store import WriterOptions
from tests.store_files import *
rows = make_rows(300)
values = make_values(rows, ["mean", "tokens"], [0, 1], d=64)
options = WriterOptions(buffer_bytes=30_000)
"""


def script(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WRITING + text, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def contents(path: Path) -> dict[str, bytes]:
    """Every dataset's bytes."""
    found: dict[str, bytes] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


# -- kills -----------------------------------------------------------------------------------------

KILL = """
moment, path = sys.argv[1], Path(sys.argv[2])
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
import activations.store_writer as w
if moment == "started": w.write_rows = die
if moment == "verifying": w.read_rows = die
if moment == "fsync": w.fsync = die
if moment == "replacing": w.os.replace = die
batches = scattered(300)
def killed_after(n):
    for i, batch in enumerate(batches):
        if i == n: die()
        yield batch
n = int(moment) if moment.isdigit() else len(batches)
write_file(path, rows, values, batches=killed_after(n), options=options)
"""


@pytest.mark.parametrize("moment", ["started", "0", "20", "42", "verifying", "fsync", "replacing"])
def test_a_killed_writer_leaves_no_file_and_the_next_sweeps(tmp_path, moment):
    path = tmp_path / "a.h5"
    killed = script(KILL, moment, path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = list(tmp_path.iterdir())
    assert not path.exists()
    assert len(left) == 1
    rows = make_rows(N)
    values = make_values(rows, ["mean", "tokens"], [0, 1], d=64)
    write_file(path, rows, values)
    assert list(tmp_path.iterdir()) == [path]
    write_file(tmp_path / "whole" / "a.h5", rows, values)
    assert contents(path) == contents(tmp_path / "whole" / "a.h5")


def test_sweeping_spares_the_living(tmp_path):
    host = os.uname().nodename
    gone = subprocess.Popen(["true"])
    gone.wait()
    living, locked, other, foreign = (
        tmp_path / name
        for name in (
            f".a.h5.{host}.{os.getpid()}.0a.tmp",
            f".b.h5.{host}.{gone.pid}.0b.tmp",
            f".c.h5.elsewhere.{gone.pid}.0c.tmp",
            "notes.tmp",
        )
    )
    stale = tmp_path / f".d.h5.{host}.{gone.pid}.0d.tmp"
    for file in (living, locked, other, foreign, stale):
        file.touch()
    with h5py.File(locked, "w", locking=True):  # a process of that number, in another container
        sweep_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {living, locked, other, foreign}


# -- disks -----------------------------------------------------------------------------------------

FULL = """
path, limit = Path(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    write_file(path, rows, values, batches=scattered(300), options=options)
except OSError as error:
    print(error.filename == str(path), os.listdir(path.parent), error)
"""


@pytest.mark.parametrize("limit", [100, 3000, 30_000, 200_000, 400_000])
def test_a_full_disk_is_one_clean_error(tmp_path, limit):
    """The kernel refuses bytes beyond the limit: writing and closing really fail."""
    done = script(FULL, tmp_path / "a.h5", limit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True [] "), done.stdout + done.stderr
    assert done.stdout.count("File too large") == 1  # the system's words, without HDF5's addresses and sizes
    assert len(done.stdout) < 200
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_hdf5_writes_is_told_of_as_that(tmp_path, monkeypatch):
    """HDF5's own words of such a moment (a file system of 2 MB): the number of the error stands behind a line break."""
    said = (
        "Disable slist on flush dest failure failed (file write failed: time = Sun Nov 29 02:27:16 2026\n, filename = 'a.h5', "
        "file descriptor = 9, errno = 28, error message = 'No space left on device', buf = 0x1, total write size = 96)"
    )

    def full(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(h5py.File, "close", full)
    rows = make_rows(N)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)") as caught:
        write_file(tmp_path / "a.h5", rows, make_values(rows, ["mean"], [0]))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.h5"))


def test_too_little_space_is_said_before_work_starts(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    monkeypatch.setattr(
        "activations.store_writer.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000, "f": free})
    )
    rows = make_rows(N)
    with pytest.raises(OSError, match=r"needs .* MB, 0\.0 MB are free.*a\.h5") as caught:
        write_file(tmp_path / "a.h5", rows, make_values(rows, ["mean"], [0]))
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


READ_ONLY = """
folder = Path(sys.argv[1])
if os.geteuid() == 0: os.seteuid(65534)
try:
    write_file(folder / "new.h5", rows, values)
except OSError as error:
    print(type(error).__name__, error.filename)
"""


def test_a_read_only_folder_can_be_read_and_says_no_to_writing():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_rows(N)
        write_file(folder / "a.h5", rows, make_values(rows, ["mean"], [0]))
        folder.chmod(0o555)
        try:
            done = script(READ_ONLY, folder)
            assert done.stdout.split() == ["PermissionError", str(folder / "new.h5")], done.stderr
            with ActivationStore.open(folder) as store:
                assert store.verify() == []
            assert [f.name for f in folder.iterdir()] == ["a.h5"]
        finally:
            folder.chmod(0o755)


# -- races -----------------------------------------------------------------------------------------


def _write_often(path: Path, seed: int, stop: Event) -> None:
    rows = make_rows(N)
    values = make_values(rows, ["mean"], [0, 1], seed=seed)
    while not stop.is_set():
        write_file(path, rows, values, metadata={"seed": seed})


def test_two_writers_race_and_each_file_is_whole(tmp_path):
    path, rows = tmp_path / "a.h5", make_rows(N)
    expected = {seed: make_values(rows, ["mean"], [0, 1], seed=seed) for seed in (1, 2)}
    write_file(path, rows, expected[1], metadata={"seed": 1})
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    writers = [context.Process(target=_write_often, args=(path, seed, stop)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    seen = list[int]()
    try:
        # Until each one's file was met between the other's several times, however slowly they begin.
        while sum(a != b for a, b in pairwise(seen)) < 6:
            assert all(writer.is_alive() for writer in writers)
            with ActivationStore.open(path) as store:
                seen.append(seed := store.metadata["seed"])
                for layer in (0, 1):
                    np.testing.assert_array_equal(
                        store.read(SITE, "mean", layer), expected[seed]["mean", layer]
                    )
            time.sleep(0.01)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert [w.exitcode for w in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]

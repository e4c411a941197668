"""The activation store when things go wrong: kills, full disks, flipped bits, races."""

import errno
import hashlib
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
from activations.store_format import LIBVER
from mech.errors import FileFormatError
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


# -- damage ----------------------------------------------------------------------------------------


def facts(store: ActivationStore) -> str:
    rows = store.rows
    columns = {k: v.tolist() for k, v in rows.columns.items()}
    tokens = [t.tolist() for t in rows.tokens]
    return repr((store.metadata, [*rows.ids], [*rows.questions], columns, tokens, store.layers, store.dtype))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def sound(request, tmp_path_factory):
    """A file with many links (more than eight, which HDF5 keeps differently) and several chunks."""
    path = tmp_path_factory.mktemp("damage") / "a.h5"
    rows = make_rows(N)
    values = make_values(rows, ["mean", "tokens"], range(11))
    write_file(path, rows, values, dtype=request.param)
    with ActivationStore.open(path) as store:
        return path, facts(store), {layer: store.read(SITE, "mean", layer) for layer in range(11)}


def regions(path: Path) -> tuple[list[int], list[int]]:
    """Offsets of the payload, and of everything else: superblock, headers, attributes, indexes, links."""
    payload: set[int] = set()

    def add(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            for i in range(item.id.get_num_chunks()):
                chunk = item.id.get_chunk_info(i)
                payload.update(range(chunk.byte_offset, chunk.byte_offset + chunk.size))

    with h5py.File(path) as file:
        file.visititems(add)
    return sorted(payload), sorted(set(range(path.stat().st_size)) - payload)


def outcome(path: Path, expected_facts: str, expected: dict[int, np.ndarray]) -> str:
    try:
        with ActivationStore.open(path) as store:
            problems = store.verify()
            same = facts(store) == expected_facts
            same &= all(np.array_equal(store.read(SITE, "mean", layer), v) for layer, v in expected.items())
            return ("same" if same else "WRONG") + (", reported" if problems else "")
    except FileFormatError as error:
        return "refused" if str(path) in str(error) else "REFUSED WITHOUT A NAME"


def test_a_flipped_bit_never_gives_wrong_data(sound, tmp_path):
    path, expected_facts, expected = sound
    raw, rng, damaged = path.read_bytes(), np.random.default_rng(0), tmp_path / "b.h5"
    payload, structure = regions(path)
    picked = [*range(48), *rng.choice(structure, 150, replace=False), *rng.choice(payload, 30, replace=False)]
    outcomes = []
    for at in map(int, picked):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(flipped)
        outcomes.append(outcome(damaged, expected_facts, expected))
    assert set(outcomes) <= {"same", "same, reported", "refused"}, dict(zip(picked, outcomes, strict=True))
    assert outcomes.count("refused") > 100


def test_damaged_columns_are_not_missing_columns(tmp_path):
    """HDF5's `get` with a default takes a group whose header is damaged for one that is not there."""
    path, rows = tmp_path / "a.h5", make_rows(20)
    write_file(path, rows, make_values(rows, ["mean"], [0]))
    with h5py.File(path) as file:
        at = h5py.h5o.get_info(file["rows/columns"].id).addr
    raw = bytearray(path.read_bytes())
    raw[at + 30] ^= 1
    path.write_bytes(raw)
    with ActivationStore.open(path) as store:
        with pytest.raises(FileFormatError, match=r"a\.h5: /rows"):
            _ = store.rows
        assert [p.place for p in store.verify()] == ["/rows"]


def test_truncated_files_are_refused(sound, tmp_path):
    path = tmp_path / "b.h5"
    raw = sound[0].read_bytes()
    for size in (0, 1, 7, 8, 47, 48, 1000, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(FileFormatError, match=r"b\.h5: /: .*capture it again"):
            ActivationStore.open(path)


def test_the_manifests_digest_catches_what_checksums_cannot(tmp_path):
    """Fletcher-32 counts modulo 65535: a word 0x0000 that becomes 0xFFFF keeps its sum."""
    path, rows = tmp_path / "a.h5", make_rows(20)
    values = make_values(rows, ["mean"], [0])
    values["mean", 0][3] = 1.0  # its lower 16 bits are zero
    write_file(path, rows, values)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with h5py.File(path) as file:
        chunk = file[f"/activations/{SITE}/mean/0"].id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    at = chunk.byte_offset + 3 * 8 * 4
    assert raw[at : at + 4] == b"\x00\x00\x80\x3f"
    raw[at : at + 2] = b"\xff\xff"
    path.write_bytes(raw)
    with ActivationStore.open(path) as store:
        assert store.verify() == []
        (problem,) = store.verify({path.name: digest})
        assert "SHA-256" in str(problem)
        assert store.verify({"b.h5": digest})[-1].file.name == "b.h5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.attrs.__setitem__("encoding-version", np.bytes_(b"2.0")), "/: format version '2.0'"),
        (lambda f: f.attrs.__setitem__("encoding-type", np.bytes_(b"anndata")), "/: not an activation file"),
        (lambda f: f.attrs.__delitem__("layers"), "/: no attribute layers"),
        (lambda f: f.attrs.__setitem__("n_rows", 21), "/rows: offsets do not cut"),
        (
            lambda f: f.attrs.__setitem__("d_model", 9),
            "/: resid_post is said to be 8 wide, the residual stream 9",
        ),
        (
            lambda f: [f.attrs.__setitem__(*x) for x in (("d_model", 9), ("widths", [9]))],
            r"/activations/resid_post/mean/0: shape \(20, 8\)",
        ),
        (
            lambda f: f.__delitem__("/activations/resid_post/mean/0"),
            "/activations/resid_post/mean/0: cannot be read",
        ),
        (lambda f: f["/rows"].__delitem__("question"), "/rows: cannot be read"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path, change, message):
    path, rows = tmp_path / "a.h5", make_rows(20)
    write_file(path, rows, make_values(rows, ["mean"], [0, 1]))
    with h5py.File(path, "r+") as file:
        change(file)

    def use() -> None:
        with ActivationStore.open(path) as store:
            assert store.verify() != []
            _ = store.rows
            store.read(SITE, "mean")

    with pytest.raises(FileFormatError, match=rf"a\.h5: {message}"):
        use()


def test_files_of_other_kinds_and_none(tmp_path):
    (tmp_path / "text.h5").write_text("no")
    for path in (tmp_path / "text.h5", tmp_path / "gone.h5", tmp_path):
        with pytest.raises(FileFormatError, match=str(path)):
            ActivationStore.open(path)


def test_what_nobody_declared_or_marked_is_reported(tmp_path):
    path, rows = tmp_path / "a.h5", make_rows(20)
    write_file(path, rows, make_values(rows, ["mean"], [0]))
    with h5py.File(path, "r+", libver=LIBVER) as file:
        file[f"/activations/{SITE}/mean/0"][4, 2] = np.nan
        file.create_dataset(f"/activations/{SITE}/mean/9", data=np.zeros((2, 2)))
    with ActivationStore.open(path) as store:
        found = {(p.place, p.what) for p in store.verify()}
    assert found == {
        (f"/activations/{SITE}/mean/9", "not declared in the file's header"),
        (f"/activations/{SITE}/mean/0", "1 vectors are not finite, 0 are marked as such (first: 4)"),
    }


def test_a_file_that_is_being_written_is_not_read(tmp_path):
    path, rows = tmp_path / "a.h5", make_rows(5)
    write_file(path, rows, make_values(rows, ["mean"], [0]))
    held = subprocess.Popen(
        [sys.executable, "-c", f"import h5py; f = h5py.File({str(path)!r}, 'r+', locking=True); print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert held.stdout is not None
    held.stdout.readline()
    try:
        with pytest.raises(FileFormatError, match="locking=False"):
            ActivationStore.open(path)
    finally:
        held.communicate("\n")

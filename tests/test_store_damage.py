"""Activation files that are damaged, or no such files: flipped bits, cut ends, headers that say something else."""

import hashlib
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from activations.store import ActivationStore
from activations.store_format import LIBVER
from mech.errors import FileFormatError
from tests.store_files import SITE, make_rows, make_values, write_file

N = 300


def facts(store: ActivationStore) -> str:
    rows = store.rows
    columns = {k: v.tolist() for k, v in rows.columns.items()}
    tokens = [t.tolist() for t in rows.tokens]
    return repr((store.metadata, [*rows.ids], [*rows.questions], columns, tokens, store.layers, store.dtype))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def sound(request, tmp_path_factory):
    """A file with many links (more than eight, which HDF5 keeps differently) and several chunks."""
    path = tmp_path_factory.mktemp("damage") / f"{request.param}.h5"
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
    # All but the payload is alike in both precisions: the superblock and most of the headers are gone through once.
    whole = path.name == "float32.h5"
    picked = [*(range(48) if whole else ()), *rng.choice(structure, 150 if whole else 40, replace=False)]
    picked += [*rng.choice(payload, 30, replace=False)]
    outcomes = []
    for at in map(int, picked):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(flipped)
        outcomes.append(outcome(damaged, expected_facts, expected))
    assert set(outcomes) <= {"same", "same, reported", "refused"}, dict(zip(picked, outcomes, strict=True))
    assert outcomes.count("refused") > 0.4 * len(picked)


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

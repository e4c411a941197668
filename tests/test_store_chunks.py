"""Reading chunks past HDF5: the same numbers, the same checksums, and HDF5 itself wherever something is not as expected."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from activations import store_chunks
from activations.fletcher import WEIGHTS, Fletcher32
from activations.store import ActivationStore
from activations.store_chunks import find_chunks, read_chunks
from activations.store_format import LIBVER, chunk_rows, dataset_path
from mech.errors import FileFormatError
from tests.store_files import SITE, make_rows, make_values, write_file

N, D = 1000, 24
BOTH = ("mean", "tokens")


def test_no_sum_on_the_way_can_pass_what_float32_holds() -> None:
    for row in WEIGHTS:
        for sign in (1, -1):
            assert np.clip(sign * row, 0, None).sum() * 65535 < 2**24


@pytest.mark.parametrize(
    ("rows", "columns"), [(128, 1152), (1, 1), (97, 33), (64, 10_240), (300, 7), (128, 2), (40, 2000)]
)
def test_checksums_are_those_that_hdf5_stores(tmp_path: Path, rows: int, columns: int) -> None:
    rng, shape = np.random.default_rng(0), (rows, columns)
    chunks = [rng.integers(0, 65536, shape), np.full(shape, 65535), np.zeros(shape), np.eye(*shape) * 256]
    words = np.concatenate(chunks).astype("<u2")
    with h5py.File(tmp_path / "a.h5", "w", libver=LIBVER) as file:
        file.create_dataset("x", data=words, chunks=shape, fletcher32=True)
    ours = Fletcher32(rows * columns, len(chunks))
    for i, chunk in enumerate(np.split(words, len(chunks))):
        ours.take(i, chunk.reshape(-1))
    raw = (tmp_path / "a.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        found = [file["x"].id.get_chunk_info_by_coord((i * rows, 0)) for i in range(len(chunks))]
    stored = [
        int.from_bytes(raw[c.byte_offset + c.size - 4 : c.byte_offset + c.size], "little") for c in found
    ]
    assert ours.checksums(len(chunks)).tolist() == stored


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rows = tmp_path_factory.mktemp("chunks") / "a.h5", make_rows(N)
    write_file(path, rows, make_values(rows, BOTH, [0, 1], d=D), dtype=request.param)
    return path


def spy(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes whether each read went past HDF5."""
    found: list[bool] = []

    def read(*given: object) -> bool:
        found.append(read_chunks(*given))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr("activations.store_shard.read_chunks", read)
    return found


@pytest.mark.parametrize(
    "rows", [None, [999], [0, 127, 128, 700], slice(100, 400), np.arange(N) % 3 == 0, [5, 3, 3], []]
)
def test_what_is_read_is_what_hdf5_reads(made: Path, monkeypatch: pytest.MonkeyPatch, rows: object) -> None:
    with monkeypatch.context() as patch, ActivationStore.open(made) as store:
        patch.setattr("activations.store_shard.find_chunks", lambda *_: None)
        expected = store.read(SITE, "mean", None, rows), store.read_tokens(SITE, 1, rows)  # type: ignore[arg-type]
    went = spy(monkeypatch)
    with ActivationStore.open(made) as store:
        np.testing.assert_array_equal(store.read(SITE, "mean", None, rows), expected[0])  # type: ignore[arg-type]
        for ours, theirs in zip(store.read_tokens(SITE, 1, rows), expected[1], strict=True):  # type: ignore[arg-type]
            np.testing.assert_array_equal(ours, theirs)
    assert went == [True] * (0 if isinstance(rows, list) and not rows else 3)


def test_a_subset_reads_only_the_chunks_that_it_lies_in(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, preadv = [0], os.preadv

    def counted(*given: object) -> int:
        read[0] += (n := preadv(*given))  # type: ignore[arg-type]
        return n

    monkeypatch.setattr(store_chunks.os, "preadv", counted)
    with ActivationStore.open(made) as store:
        stored = 4 if store.dtype == "float32" else 2
        store.read(SITE, "mean", 0, [130, 200, 900])
    assert read[0] == 2 * (chunk_rows(D, np.dtype(f"<u{stored}")) * D * stored + 4)


def test_any_flipped_bit_of_a_chunk_is_noticed_and_left_to_hdf5_to_report(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, damaged = dataset_path(SITE, "mean", 1), tmp_path / "b.h5"
    with h5py.File(made) as file:
        last = file[place].id.get_chunk_info_by_coord((896, 0))
    raw, rng = made.read_bytes(), np.random.default_rng(0)
    picked = [0, last.size - 1, *range(last.size - 4, last.size - 1), *rng.integers(0, last.size, 25)]
    went = spy(monkeypatch)
    for at in picked:
        flipped = bytearray(raw)
        flipped[last.byte_offset + int(at)] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(flipped)
        with ActivationStore.open(damaged) as store:
            with pytest.raises(FileFormatError, match=rf"b\.h5: {place}: .*delete it and capture it again"):
                store.read(SITE, "mean", 1)
            store.read(SITE, "mean", 1, slice(0, 896))  # the sound chunks
            assert [str(p.file) for p in store.verify()] == [str(damaged)]
    assert went[:2] == [False, True]
    assert went.count(False) == 2 * len(picked)  # once read, once verified


def test_a_file_cut_while_it_is_open_is_an_error(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "b.h5"
    cut.write_bytes(made.read_bytes())
    went = spy(monkeypatch)
    with ActivationStore.open(cut) as store:
        with h5py.File(made) as file:
            end = file[dataset_path(SITE, "mean", 1)].id.get_chunk_info_by_coord((896, 0)).byte_offset
        os.truncate(cut, end + 10)
        with pytest.raises(FileFormatError, match=rf"b\.h5: {dataset_path(SITE, 'mean', 1)}"):
            store.read(SITE, "mean", 1)
    assert went == [False]


@pytest.mark.parametrize(
    ("layout", "opened"),
    [
        ({"chunks": (128, D), "fletcher32": True, "shuffle": True}, {}),
        ({"chunks": (128, D), "fletcher32": True, "compression": "gzip"}, {}),
        ({"chunks": (50, D // 2), "fletcher32": True}, {}),
        ({"chunks": (128, D), "fletcher32": True, "dtype": ">f4"}, {}),
        ({"chunks": (128, D), "fletcher32": True}, {"driver": "core"}),
    ],
)
def test_other_layouts_are_left_to_hdf5(tmp_path: Path, layout: dict, opened: dict) -> None:
    values = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w", libver=LIBVER) as file:
        file.create_dataset("x", data=values, **layout)
        file.create_dataset("plain", data=values, chunks=(128, D), fletcher32=True)
    with h5py.File(tmp_path / "a.h5", **opened) as file:
        assert find_chunks(file["x"], "float32") is None
        if not opened:
            assert find_chunks(file["plain"], "float32") is not None


@pytest.mark.parametrize("layout", [{"shuffle": True}, {"chunks": (50, D // 2)}])
def test_a_store_of_another_layout_is_read_all_the_same(tmp_path: Path, layout: dict) -> None:
    path, rows = tmp_path / "a.h5", make_rows(N)
    values = make_values(rows, ["mean"], [0], d=D)
    write_file(path, rows, values)
    place = dataset_path(SITE, "mean", 0)
    with h5py.File(path, "r+") as file:
        attributes = dict(file[place].attrs)
        del file[place]
        file.create_dataset(
            place, data=values["mean", 0], **{"chunks": (128, D), "fletcher32": True, **layout}
        )
        file[place].attrs.update(attributes)
    with ActivationStore.open(path) as store:
        np.testing.assert_array_equal(store.read(SITE, "mean", 0), values["mean", 0])
        assert [p.place for p in store.verify()] == [place]  # which the format does not allow

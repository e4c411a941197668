"""The writer of activation files: bounded memory, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from activations.store import ActivationStore, Rows, ShardWriter, WriterOptions
from activations.store_format import dataset_path
from mech.errors import GuardError, InputError
from tests.store_files import SITE, D, make_rows, make_values, scattered, write_file

N = 300


@pytest.mark.parametrize(("limit", "most_writes"), [(200_000, 12), (1 << 30, 1)])
def test_waiting_vectors_stay_within_their_memory(tmp_path, limit, most_writes):
    rows, held = make_rows(2000), []
    values = make_values(rows, ["mean"], [0, 1], d=64)  # 512 kB each
    path, n_chunks = tmp_path / "a.h5", 16
    with ShardWriter(
        path, metadata={}, rows=rows, sites=[SITE], poolings=["mean"], layers=[0, 1], d_model=64,
        options=WriterOptions(buffer_bytes=limit),
    ) as writer:  # fmt: skip
        slabs = list(writer._slabs.values())
        for batch in scattered(2000, size=50):
            for layer in (0, 1):
                writer.write(SITE, "mean", layer, batch, values["mean", layer][batch])
                held.append(sum(slab.held for slab in slabs))
    assert 0 < max(held) <= limit
    assert max(slab.chunks_written for slab in slabs) <= most_writes * n_chunks
    with ActivationStore.open(path) as store:
        np.testing.assert_array_equal(store.read(SITE, "mean", 1), values["mean", 1])


def test_the_caller_may_use_its_array_again(tmp_path):
    rows, reused = make_rows(4), np.zeros((1, D), dtype=np.float32)
    with ShardWriter(
        tmp_path / "a.h5", metadata={}, rows=rows, sites=[SITE], poolings=["mean"], layers=[0], d_model=D
    ) as writer:
        for row in range(4):
            reused[:] = row
            writer.write(SITE, "mean", 0, np.array([row]), reused)
    with ActivationStore.open(tmp_path / "a.h5") as store:
        assert store.read(SITE, "mean", 0)[:, 0].tolist() == [0, 1, 2, 3]


def test_an_exception_leaves_the_old_file(tmp_path):
    path, rows = tmp_path / "a.h5", make_rows(N)
    values = make_values(rows, ["mean"], [0])
    write_file(path, rows, values)
    before = path.read_bytes()
    with pytest.raises(GuardError, match="exactly once"):
        write_file(path, rows, values, batches=scattered(N)[:-1])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_returns_other_bytes_is_found_before_the_file_takes_its_name(tmp_path, monkeypatch):
    rows = make_rows(N)
    close = ShardWriter._read_back

    def altered(self: ShardWriter) -> None:
        with h5py.File(self._temporary, "r+") as file:  # a fault that HDF5's checksums cannot see
            file[f"/activations/{SITE}/mean/0"][7, 3] = 1.0
        close(self)

    monkeypatch.setattr(ShardWriter, "_read_back", altered)
    with pytest.raises(GuardError, match=r"/activations/resid_post/mean/0: from vector 0 .*differently"):
        write_file(tmp_path / "a.h5", rows, make_values(rows, ["mean"], [0]))
    assert list(tmp_path.iterdir()) == []


# -- what the writer refuses -----------------------------------------------------------------------


def write_all(path: Path, writes, **kwargs) -> None:
    with ShardWriter(
        path, metadata={}, rows=make_rows(4), sites=[SITE], poolings=["mean"], layers=[0], d_model=D, **kwargs
    ) as writer:
        for at, values in writes:
            writer.write(SITE, "mean", 0, np.array(at), np.asarray(values, dtype=np.float32))


def refused(path: Path, error: type[Exception], message: str, writes, **kwargs) -> None:
    with pytest.raises(error, match=message):
        write_all(path, writes, **kwargs)
    assert list(path.parent.iterdir()) == []


def test_the_writer_refuses(tmp_path):
    path, one = tmp_path / "a.h5", np.ones((1, D))
    place = dataset_path(SITE, "mean", 0)
    refused(path, GuardError, rf"{place}: 3 rows not written exactly once \(vector 0 never", [([2], one)])
    refused(path, GuardError, rf"{place}: 1 rows .*vector 2 came twice", [([2], one), ([2], one)])
    refused(path, GuardError, rf"{place}: 1 rows .*vector 1 came twice", [([1, 1], np.ones((2, D)))])
    refused(path, InputError, rf"{place}, row 3 \(r3-é\): not finite", [([3], one * np.nan)])
    refused(path, InputError, "rows outside", [([-1], one)])
    refused(path, InputError, "expected \\(1, 8\\)", [([0], np.ones((1, D + 1)))])
    with (
        pytest.raises(InputError, match=rf"{dataset_path(SITE, 'mean', 5)} was not declared"),
        ShardWriter(path, metadata={}, rows=make_rows(4), sites=[SITE], poolings=["mean"], layers=[0], d_model=D) as writer,
    ):  # fmt: skip
        writer.write(SITE, "mean", 5, np.array([0]), one)
    overflow = one * np.finfo(np.float32).max
    refused(path, InputError, "not finite in bfloat16", [([0], overflow)], dtype="bfloat16")


def test_notes_that_are_columns_already_or_for_rows_that_are_none_are_refused(tmp_path):
    given = {
        "metadata": {},
        "rows": make_rows(4),
        "sites": [SITE],
        "poolings": ["mean"],
        "layers": [0],
        "d_model": D,
    }
    with pytest.raises(InputError, match=r"columns surprisal already"):
        ShardWriter(tmp_path / "a.h5", **given, options=WriterOptions(notes=["norms", "surprisal"]))
    writer = ShardWriter(tmp_path / "a.h5", **given, options=WriterOptions(notes=["norms"]))
    for wrong in (-1, 4):
        with pytest.raises(InputError, match="norms: rows outside 0 to 3"):
            writer.note("norms", np.array([wrong]), np.ones(1))


def test_values_that_are_not_finite_can_be_marked(tmp_path):
    rows = make_rows(N)
    values = make_values(rows, ["mean"], [0, 1])
    values["mean", 1][[5, 200], 3] = np.nan, np.inf
    write_file(tmp_path / "a.h5", rows, values, batches=scattered(N), options=WriterOptions(nan="mark"))
    with ActivationStore.open(tmp_path / "a.h5") as store:
        assert store._shards[0].marked((SITE, "mean", 1)).tolist() == [5, 200]
        np.testing.assert_array_equal(store.read(SITE, "mean", 1), values["mean", 1])
        assert store.verify() == []


@pytest.mark.parametrize(
    "change",
    [
        {"ids": ["a", "a"]},
        {"ids": ["a\0", "b"]},
        {"questions": ["q"]},
        {"columns": {"c": np.array(["x", "y"])}},
        {"tokens": [np.array([0.5]), np.array([1])]},
    ],
)
def test_rows_that_would_not_come_back_are_refused(change):
    with pytest.raises(InputError, match="rows"):
        replace(make_rows(2), **change)


def test_columns_of_several_numbers_and_notes_made_while_writing(tmp_path: Path) -> None:
    rows = Rows(ids=["a", "b", "c"], questions=["q", "q", "r"], columns={"sign": np.array([1, -1, 1])},
                tokens=[np.arange(n) for n in (2, 3, 4)])  # fmt: skip
    norms = np.arange(6, dtype=np.float32).reshape(3, 2)
    given = {"metadata": {}, "rows": rows, "sites": ["resid_post", "attn_head_out"], "poolings": ["prompt_last"],
             "layers": [0], "d_model": 4,
             "options": WriterOptions(widths={"attn_head_out": 6}, notes=["norms.resid_post.prompt_last"])}  # fmt: skip
    vectors = {"resid_post": np.ones((3, 4), np.float32), "attn_head_out": np.full((3, 6), 2, np.float32)}
    with ShardWriter(tmp_path / "a.h5", **given) as writer:  # type: ignore[arg-type]
        for site, values in vectors.items():
            writer.write(site, "prompt_last", 0, np.arange(3), values)
        writer.note("norms.resid_post.prompt_last", np.array([2, 0]), norms[[2, 0]])
        writer.note("norms.resid_post.prompt_last", np.array([1]), norms[[1]])
        with pytest.raises(InputError, match="not declared among its notes"):
            writer.note("surprisal", np.array([0]), np.zeros(1, np.float32))
    with ActivationStore.open(tmp_path / "a.h5") as store:
        np.testing.assert_array_equal(store.rows.columns["norms.resid_post.prompt_last"], norms)
        for site, values in vectors.items():
            np.testing.assert_array_equal(store.read(site, "prompt_last", 0), values)
        assert not store.verify()
    unfinished = ShardWriter(tmp_path / "b.h5", **given)  # type: ignore[arg-type]
    unfinished.__enter__()
    for site, values in vectors.items():
        unfinished.write(site, "prompt_last", 0, np.arange(3), values)
    with pytest.raises(GuardError, match="row 0 was never noted"):
        unfinished.__exit__(None, None, None)
    assert not list(tmp_path.glob("*b.h5*"))

"""The activation store: what is written comes back, in any order, from one file or several."""

import dataclasses
import json
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from activations import store_shard
from activations.store import ActivationStore, Rows, WriterOptions, describe
from activations.store_format import chunk_rows, dataset_path, from_bits, to_bits
from activations.store_join import row_mask
from activations.store_shard import runs
from mech.errors import FileFormatError, InputError
from mech.files import sha256_file
from tests.store_files import SITE, D, make_rows, make_values, scattered, write_file

N = 300
BOTH = ("mean", "tokens")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows, dict]:
    """One file of two poolings and three layers, written in order."""
    path = tmp_path_factory.mktemp("store") / "a.h5"
    rows = make_rows(N)
    values = make_values(rows, BOTH, [0, 1, 5])
    write_file(path, rows, values)
    return path, rows, values


# -- numbers ---------------------------------------------------------------------------------------


def test_what_is_written_comes_back(whole):
    path, rows, values = whole
    with ActivationStore.open(path) as store:
        assert (store.n_rows, store.layers, store.sites) == (N, [0, 1, 5], [SITE])
        assert (store.poolings, store.d_model, store.dtype) == (["mean", "tokens"], D, "float32")
        for (pooling, layer), array in values.items():
            back = (
                np.concatenate(store.read_tokens(SITE, layer))
                if pooling == "tokens"
                else store.read(SITE, pooling, layer)
            )
            assert back.dtype == np.float32
            np.testing.assert_array_equal(back, array)
        assert list(store.rows.ids) == list(rows.ids)
        assert list(store.rows.questions) == list(rows.questions)
        for name, column in rows.columns.items():
            np.testing.assert_array_equal(store.rows.columns[name], column)
            assert store.rows.columns[name].dtype == column.dtype
        for row in (0, 3, N - 1):
            np.testing.assert_array_equal(store.tokens(row), rows.tokens[row])
        assert store.verify() == []


def test_bfloat16_bits_are_those_of_torch(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    ties = (np.arange(0, 2**16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    ours = to_bits(values, "bfloat16")
    number = ~np.isnan(values)
    np.testing.assert_array_equal(ours[number], expected[number])
    assert np.isnan(from_bits(ours[~number], "bfloat16")).all()

    every = np.arange(2**16, dtype=np.uint16)
    exact = from_bits(every, "bfloat16")
    exact = exact[np.isfinite(exact)][: (2**16 // D // 2) * D].reshape(-1, D)
    write_file(tmp_path / "b.h5", make_rows(len(exact)), {("mean", 0): exact}, dtype="bfloat16")
    with ActivationStore.open(tmp_path / "b.h5") as store:
        back = store.read(SITE, "mean", 0)
        np.testing.assert_array_equal(back.view(np.uint32), exact.view(np.uint32))
        assert (store.dtype, store.verify()) == ("bfloat16", [])
    with h5py.File(tmp_path / "b.h5") as file:
        assert file[dataset_path(SITE, "mean", 0)].dtype == np.uint16


@pytest.mark.parametrize("buffer_bytes", [0, 20_000, 1 << 30])
def test_order_and_memory_do_not_change_a_file(whole, tmp_path, buffer_bytes):
    path, rows, values = whole
    other = tmp_path / path.name
    write_file(other, rows, values, batches=scattered(N), options=WriterOptions(buffer_bytes=buffer_bytes))
    with ActivationStore.open(other) as store:
        for layer in store.layers:
            np.testing.assert_array_equal(store.read(SITE, "mean", layer), values["mean", layer])
            np.testing.assert_array_equal(
                np.concatenate(store.read_tokens(SITE, layer)), values["tokens", layer]
            )


@pytest.mark.parametrize(("d", "rows"), [(576, 128), (2048, 128), (2049, 64), (5120, 64)])
def test_chunks_are_64_or_128_full_rows(d, rows):
    assert chunk_rows(d, np.dtype("<f4")) == rows


# -- what to read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [5, 3, 3, 299, 0],
        np.random.default_rng(0).permutation(N),
        np.arange(N) % 7 == 0,
        np.zeros(N, dtype=bool),
        slice(290, None),
        slice(None, None, -3),
        [],
        np.array([0, 299], dtype=np.uint16),
    ],
)
@pytest.mark.parametrize("layers", [None, 1, [5, 0], np.int64(5)])
def test_rows_come_in_the_callers_order(whole, rows, layers, monkeypatch):
    path, table, values = whole
    monkeypatch.setattr(store_shard, "RUN_BYTES", 50 * D * 4)  # many short reads
    chosen = [0, 1, 5] if layers is None else [int(x) for x in np.atleast_1d(layers)]
    every = np.stack([values["mean", layer] for layer in chosen], axis=1)
    index = np.array([], dtype=int) if isinstance(rows, list) and not rows else rows
    expected = every[index]
    one = isinstance(layers, (int, np.integer))
    with ActivationStore.open(path) as store:
        np.testing.assert_array_equal(
            store.read(SITE, "mean", layers, rows), expected[:, 0] if one else expected
        )
        tokens = store.read_tokens(SITE, layers, rows)
        starts = np.cumsum(table.n_tokens) - table.n_tokens
        for row, got in zip(np.arange(N)[index], tokens, strict=True):
            cut = slice(starts[row], starts[row] + table.n_tokens[row])
            wanted = np.stack([values["tokens", layer][cut] for layer in chosen], axis=1)
            np.testing.assert_array_equal(got, wanted[:, 0] if one else wanted)


def test_where(whole):
    path, rows, values = whole
    sign, question = rows.columns["sign"], np.array(rows.questions)
    with ActivationStore.open(path) as store:
        for where, mask in [
            ({"sign": 1, "question": ["q0", "q2"]}, (sign == 1) & (question != "q1")),
            ({"id": rows.ids[7]}, np.arange(N) == 7),
            ({"kept": True}, rows.columns["kept"]),
            (lambda r: r.columns["surprisal"] > 3, rows.columns["surprisal"] > 3),
        ]:
            assert mask.any()
            np.testing.assert_array_equal(store.read(SITE, "mean", 0, where=where), values["mean", 0][mask])
        for wrong in ({"nope": 1}, lambda r: r.columns["sign"]):
            with pytest.raises(InputError, match="where"):
                store.read(SITE, "mean", 0, where=wrong)
        with pytest.raises(InputError, match="give a mask or indices as rows"):
            row_mask(store.rows, sign > 0)


@pytest.mark.parametrize(
    ("site", "pooling", "layers", "rows", "message"),
    [
        ("attn_out", "mean", 0, None, "sites .*resid_post"),
        (SITE, "last", 0, None, "poolings .*mean"),
        (SITE, "mean", 3, None, r"layers \[0, 1, 5\]"),
        (SITE, "mean", [True, False], None, "no .*mean/True"),
        (SITE, "mean", 0, [-1], "row -1 is out of range"),
        (SITE, "mean", 0, [N], f"row {N} is out of range"),
        (SITE, "mean", 0, np.array([1.5]), "must be integers"),
        (SITE, "mean", 0, [True], "mask of 1 entries"),
        (SITE, "tokens", 0, None, "read_tokens"),
    ],
)
def test_what_is_not_there_is_named(whole, site, pooling, layers, rows, message):
    with ActivationStore.open(whole[0]) as store, pytest.raises(InputError, match=message):
        store.read(site, pooling, layers, rows)


def test_runs_cover_what_is_wanted_and_skip_what_is_not():
    wanted = np.array([0, 1, 130, 5000, 5001, 9000])
    pieces = [wanted[a:b].tolist() for a, b in runs(wanted, 128, 4)]
    assert pieces == [[0, 1, 130], [5000, 5001], [9000]]


def test_chunks_are_the_rows_in_turn(whole):
    path, _, values = whole
    with ActivationStore.open(path) as store:
        parts = list(store.chunks(SITE, "mean", 1, size=64))
        assert [len(p) for p in parts] == [64, 64, 64, 64, 44]
        np.testing.assert_array_equal(np.concatenate(parts), values["mean", 1])
        tokens = [row for part in store.token_chunks(SITE, 1, size=64) for row in part]
        assert len(tokens) == N
        np.testing.assert_array_equal(np.concatenate(tokens), values["tokens", 1])
        with pytest.raises(InputError, match="1 or more"):
            next(store.chunks(SITE, "mean", size=0))


# -- several files ---------------------------------------------------------------------------------


def shards(folder: Path, counts=(100, 200, 50), **changes) -> dict[int, np.ndarray]:
    parts = []
    for k, n in enumerate(counts):
        rows = make_rows(n, f"s{k}/")
        values = make_values(rows, BOTH, [0, 1], seed=k)
        options = WriterOptions(shard=(k, len(counts)))
        write_file(folder / f"part-{k}.h5", rows, values, options=options, **changes.get(str(k), {}))
        parts.append(values)
    return {layer: np.concatenate([p["mean", layer] for p in parts]) for layer in (0, 1)}


def test_a_folder_is_read_as_one(tmp_path):
    every = shards(tmp_path)
    order = np.random.default_rng(0).permutation(350)[:120]
    with ActivationStore.open(tmp_path) as store:
        assert store.n_rows == 350
        assert set(store.metadata) == {
            "checkpoint",
            "layer_convention",
        }  # `sets` differs between the files, as declared
        np.testing.assert_array_equal(store.read(SITE, "mean", 1), every[1])
        np.testing.assert_array_equal(store.read(SITE, "mean", None, order)[:, 0], every[0][order])
        lengths = store.rows.n_tokens[order]
        assert [len(t) for t in store.read_tokens(SITE, 0, order)] == lengths.tolist()
        assert store.verify() == []


def test_a_missing_shard_is_named(tmp_path):
    shards(tmp_path)
    (tmp_path / "part-1.h5").unlink()
    with pytest.raises(FileFormatError, match=r"shards \[1\] .* missing"):
        ActivationStore.open(tmp_path)
    with ActivationStore.open(tmp_path / "part-2.h5") as store:  # one file, asked for by name
        assert store.n_rows == 50


def test_a_file_that_the_manifest_does_not_name_is_reported(tmp_path):
    shards(tmp_path)
    digests = {f.name: sha256_file(f) for f in tmp_path.iterdir()}
    with ActivationStore.open(tmp_path) as store:
        assert store.verify(digests) == []
        digests["part-7.h5"] = digests.pop("part-1.h5")
        assert [(p.file.name, p.what) for p in store.verify(digests)] == [
            ("part-1.h5", "not in the manifest"),
            ("part-7.h5", "in the manifest, and not in this store"),
        ]


def test_a_column_of_several_numbers_is_no_condition(tmp_path):
    rows = dataclasses.replace(make_rows(5), columns={"norms": np.ones((5, 5))})
    write_file(tmp_path / "a.h5", rows, make_values(rows, ["mean"], [0]))
    with (
        ActivationStore.open(tmp_path / "a.h5") as store,
        pytest.raises(InputError, match="where: column norms holds 5 numbers a row"),
    ):
        store.read(SITE, "mean", 0, where={"norms": 1})


def test_shards_of_different_making_are_refused_by_name(tmp_path):
    shards(tmp_path, **{"1": {"metadata": {"checkpoint": "another"}}})
    with pytest.raises(FileFormatError, match=r"part-1\.h5: .*part-0\.h5 in metadata\['checkpoint'\]"):
        ActivationStore.open(tmp_path)
    rows = make_rows(5, "w/")
    for values, said in (
        (make_values(rows, BOTH, [0, 1], d=16), "d_model 8 and 16"),
        (make_values(rows, BOTH, [0]), r"layers \(0, 1\) and \(0,\)"),
    ):
        write_file(tmp_path / "part-1.h5", rows, values, options=WriterOptions(shard=(1, 3)))
        with pytest.raises(FileFormatError, match=rf"part-1\.h5.*{said}"):
            ActivationStore.open(tmp_path)


def test_one_row_in_two_shards_is_named(tmp_path):
    rows = make_rows(5)
    for name in ("a", "b"):
        write_file(tmp_path / f"{name}.h5", rows, make_values(rows, ["mean"], [0]))
    with (
        ActivationStore.open(tmp_path) as store,
        pytest.raises(FileFormatError, match=r"b\.h5.*'r0-é'.*a\.h5"),
    ):
        _ = store.rows


# -- processes -------------------------------------------------------------------------------------


def _sum(store: ActivationStore) -> float:
    return float(sum(store.read(SITE, "mean", layer).astype(np.float64).sum() for layer in store.layers))


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_read_at_once(whole, method):
    with ActivationStore.open(whole[0]) as store:
        expected = _sum(store)
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            assert set(pool.map(_sum, [store] * 6)) == {expected}
        assert _sum(store) == expected


def test_a_fork_opens_the_file_again(whole):
    """A shared descriptor has a shared position: reading would give other rows."""
    with ActivationStore.open(whole[0]) as store:
        parents = store._shards[0].handle
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover
            own = store._shards[0].handle
            os.write(write, b"own" if own is not parents and bool(own) and not bool(parents) else b"shared")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 9) == b"own"
        assert bool(parents)
        np.testing.assert_array_equal(store.read(SITE, "mean", 0), whole[2]["mean", 0])


def test_a_pickled_store_refuses_another_file_in_its_place(tmp_path):
    rows = make_rows(5)
    write_file(tmp_path / "a.h5", rows, make_values(rows, ["mean"], [0]))
    with ActivationStore.open(tmp_path / "a.h5") as store:
        frozen = pickle.dumps(store)
    write_file(tmp_path / "a.h5", rows, make_values(rows, ["mean"], [0]), metadata={"checkpoint": "new"})
    with pytest.raises(FileFormatError, match="replaced by another file"):
        pickle.loads(frozen).read(SITE, "mean", 0)


# -- other programs --------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_exports_hold_everything(whole, tmp_path, ending):
    path, rows, values = whole
    target = tmp_path / f"out{ending}"
    with ActivationStore.open(path) as store:
        store.export(target)
        made = dict(np.load(target)) if ending == ".npz" else load_file(target)
        for pooling in BOTH:
            stacked = np.stack([values[pooling, layer] for layer in (0, 1, 5)], axis=1)
            np.testing.assert_array_equal(made[f"{SITE}/{pooling}"], stacked)
        np.testing.assert_array_equal(made["tokens"], np.concatenate(rows.tokens))
        np.testing.assert_array_equal(np.diff(made["offsets"]), rows.n_tokens)
        np.testing.assert_array_equal(made["columns/kept"], rows.columns["kept"])
        if ending == ".npz":
            assert made["ids"].tolist() == list(rows.ids)
            assert json.loads(str(made["metadata"])) == store.metadata
        with pytest.raises(InputError, match=r"\.npz, \.safetensors, \.pt"):
            store.export(tmp_path / "out.csv")
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_torch_and_describe_and_require(whole):
    path, _, values = whole
    with ActivationStore.open(path) as store:
        np.testing.assert_array_equal(store.to_torch(SITE, "mean", 1).numpy(), values["mean", 1])
        kept = store.rows.columns["kept"]
        for found in (
            store.to_numpy(SITE, "mean", 1, where={"kept": True}),
            store.to_xarray(SITE, "mean", [1], where={"kept": True})[:, 0],
        ):
            np.testing.assert_array_equal(found, values["mean", 1][kept])
        store.require(checkpoint="m", d_model=D)
        for facts in ({"d_model": 9}, {"checkpoint": "other"}, {"never_said": None}):
            with pytest.raises(FileFormatError, match=f"made with {next(iter(facts))}"):
                store.require(**facts)
    facts = describe(path)
    assert (facts["n_rows"], facts["dtype"], facts["bytes"]) == (N, "float32", path.stat().st_size)
    json.dumps(facts)

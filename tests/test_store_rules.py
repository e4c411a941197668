"""The specification is enough to write and to read activation files, and each of its rules, once broken, is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from activations.store import ActivationStore, Rows, ShardWriter, WriterOptions
from activations.store_keep import merge
from mech.errors import FileFormatError
from tests import store_by_the_book as book

N, D, HEADS = 200, 24, 36
FILE = "a.h5"
ONE = "/activations/resid_post/prompt_last/1"


def content(seed: int = 0, *, heads: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, 50_000, 1 + i % 5) for i in range(N)]
    width = {"resid_post": D, **({"attn_head_out": HEADS} if heads else {})}
    data = {
        (site, pooling, layer): rng.standard_normal(
            (sum(map(len, tokens)) if pooling == "tokens" else N, width[site])
        ).astype(np.float32)
        for site in width
        for pooling in ("prompt_last", "tokens")
        for layer in (0, 1, 7)
    }
    columns = {
        "sign": np.where(np.arange(N) % 2, 1, -1),
        "kept": np.arange(N) % 3 == 0,
        "norms.resid_post.prompt_last": rng.random((N, 3)).astype(np.float32),
    }
    return {"tokens": tokens, "data": data, "columns": columns, "d_model": D, "widths": width}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_document_alone_tells_how_to_write_is_read(tmp_path: Path, dtype: str) -> None:
    made = content()
    book.write(tmp_path / FILE, **made, dtype=dtype)
    with ActivationStore.open(tmp_path / FILE) as store:
        assert store.verify() == []
        assert store.rows.ids[3] == "r3-ø"
        for i in (0, 3, N - 1):
            np.testing.assert_array_equal(store.tokens(i), made["tokens"][i])
        for name, column in made["columns"].items():
            np.testing.assert_array_equal(store.rows.columns[name], column)
        for (site, pooling, layer), values in made["data"].items():
            expected = (
                values
                if dtype == "float32"
                else (book.to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
            )
            found = (
                np.concatenate(store.read_tokens(site, layer))
                if pooling == "tokens"
                else store.read(site, pooling, layer)
            )
            np.testing.assert_array_equal(found, expected)


def test_a_file_of_the_version_before_is_read(tmp_path: Path) -> None:
    made = content(heads=False)
    book.write(tmp_path / FILE, **made, version="1.0")
    with ActivationStore.open(tmp_path / FILE) as store:
        assert store.verify() == []
        np.testing.assert_array_equal(
            store.read("resid_post", "prompt_last", 7), made["data"]["resid_post", "prompt_last", 7]
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_by_the_document_alone(tmp_path: Path, dtype: Any) -> None:
    made = content()
    made["data"]["resid_post", "tokens", 7][[2, 5], 3] = np.nan, np.inf
    rows = Rows([f"i{i}-é" for i in range(N)], [f"q{i}" for i in range(N)], made["columns"], made["tokens"])
    writer = ShardWriter(
        tmp_path / FILE, metadata={"checkpoint": "m"}, rows=rows, sites=["resid_post", "attn_head_out"],
        poolings=["tokens", "prompt_last"], layers=[7, 0, 1], d_model=D, dtype=dtype,
        options=WriterOptions(widths={"attn_head_out": HEADS}, nan="mark", shard=(0, 1)),
    )  # fmt: skip
    with writer:
        for (site, pooling, layer), values in made["data"].items():
            writer.write(site, pooling, layer, np.arange(N), values)
    merge([tmp_path / FILE], tmp_path / "merged.h5")
    for name in (FILE, "merged.h5"):
        found = book.read(tmp_path / name)
        assert (found["ids"], found["d_model"]) == (list(rows.ids), D)
        assert all(map(np.array_equal, found["tokens"], made["tokens"]))
        assert found["marked"]["resid_post", "tokens", 7] == [2, 5]
        for place, values in made["data"].items():
            if dtype == "float32":
                np.testing.assert_array_equal(found["data"][place], values)
            else:
                np.testing.assert_allclose(found["data"][place], values, rtol=2**-8)


# -- each rule, broken --------------------------------------------------------------------------------

Break = Callable[[h5py.File], object]


def put(file: h5py.File, path: str, values: Any, **layout: Any) -> None:
    """Another dataset in a place, checksummed unless the layout says otherwise."""
    values = np.asarray(values)
    attributes = dict(file[path].attrs) if path in file else {}
    if path in file:
        del file[path]
    made = file.create_dataset(
        path, data=values, dtype=values.dtype, **{"chunks": values.shape, "fletcher32": True, **layout}
    )
    for name, value in attributes.items():
        made.attrs[name] = value


def attribute(name: str, value: Any, of: str = "/") -> Break:
    return lambda file: file[of].attrs.create(name, value)


def dataset(path: str, change: Callable[[np.ndarray], Any], **layout: Any) -> Break:
    return lambda file: put(file, path, change(file[path][()]), **layout)


def text(*values: bytes) -> np.ndarray:
    return np.array(values, dtype=h5py.string_dtype("utf-8", max(map(len, values))))


def unwritten(file: h5py.File) -> None:
    del file[ONE]
    made = file.create_dataset(ONE, (N, D), "<f4", chunks=(128, D), fletcher32=True)
    made.attrs["logical_dtype"] = np.bytes_(b"float32")
    made[:128] = 1.0


def unchecked_chunk(file: h5py.File) -> None:
    made = file[ONE]
    made.id.write_direct_chunk((0, 0), made[:128].tobytes(), filter_mask=1)


def virtual(path: str) -> Break:
    def change(file: h5py.File) -> None:
        values, attributes = file[path][()], dict(file[path].attrs)
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[:] = h5py.VirtualSource("elsewhere.h5", "x", values.shape)
        del file[path]
        made = file.create_virtual_dataset(path, layout)
        for name, value in attributes.items():
            made.attrs[name] = value

    return change


def linked(path: str, link: Any) -> Break:
    def change(file: h5py.File) -> None:
        file.copy(path, "kept")
        with h5py.File(Path(file.filename).with_name("other.h5"), "w", libver=book.BOUNDS) as other:
            file.copy(path, other, "kept")
        del file[path]
        file[path] = link

    return change


BROKEN: dict[str, Break] = {
    "encoding-type": attribute("encoding-type", np.bytes_(b"anndata")),
    "encoding-version": attribute("encoding-version", np.bytes_(b"1.2")),
    "text attribute of variable length": attribute("encoding-type", "sgtr-mech-activations"),
    "n_rows": attribute("n_rows", np.int64(N - 1)),
    "d_model": attribute("d_model", np.int64(D + 1)),
    "a site that is not there": attribute("sites", text(b"attn_head_out", b"resid_pre")),
    "a pooling too few": attribute("poolings", text(b"tokens")),
    "widths of other length": attribute("widths", np.array([D])),
    "a width": attribute("widths", np.array([HEADS + 1, D])),
    "layers not ascending": attribute("layers", np.array([7, 1, 0])),
    "a layer too few": attribute("layers", np.array([0, 1])),
    "file's logical_dtype": attribute("logical_dtype", np.bytes_(b"bfloat16")),
    "shard beyond count": attribute("shard", np.array([2, 2])),
    "dataset's logical_dtype": attribute("logical_dtype", np.bytes_(b"bfloat16"), ONE),
    "dataset without logical_dtype": lambda f: f[ONE].attrs.__delitem__("logical_dtype"),
    "metadata is no JSON": dataset("/metadata", lambda x: x[:-1]),
    "metadata is a list": dataset("/metadata", lambda _: np.frombuffer(b'["a"]', np.uint8)),
    "metadata without layer_convention": dataset("/metadata", lambda _: np.frombuffer(b'{"a": 1}', np.uint8)),
    "per_shard is no list": dataset(
        "/metadata", lambda _: np.frombuffer(b'{"layer_convention": "", "per_shard": 3}', np.uint8)
    ),
    "metadata of another type": dataset("/metadata", lambda x: x.view(np.int8)),
    "metadata without checksum": dataset("/metadata", lambda x: x, chunks=None, fletcher32=False),
    "an id twice": dataset("/rows/id", lambda x: np.concatenate([x[:1], x[:-1]])),
    "ids of variable length": lambda f: put(f, "/rows/id", f["/rows/id"].asstr()[()].astype(h5py.string_dtype()), fletcher32=False),
    "a NUL within an id": dataset("/rows/id", lambda x: np.array([b"a\0b", *x[1:]])),
    "a question too few": dataset("/rows/question", lambda x: x[:-1]),
    "no questions": lambda f: f.__delitem__("/rows/question"),
    "no group of columns": lambda f: f.__delitem__("/rows/columns"),
    "a column of texts": lambda f: put(f, "/rows/columns/x", text(*[b"a"] * N)),
    "a column of three dimensions": lambda f: put(f, "/rows/columns/x", np.zeros((N, 2, 2))),
    "a group among columns": lambda f: f.create_group("/rows/columns/x"),
    "a column too short": lambda f: put(f, "/rows/columns/sign", np.ones(N - 1)),
    "tokens of another type": dataset("/rows/tokens", lambda x: x.astype("<i4")),
    "tokens that are no integers": dataset("/rows/tokens", lambda x: x + 0.5),
    "tokens without checksum": dataset("/rows/tokens", lambda x: x, fletcher32=False),
    "offsets that go back": dataset("/rows/offsets", lambda x: x[[0, 2, 1, *range(3, N + 1)]]),
    "offsets too short": dataset("/rows/offsets", lambda x: x[:-1]),
    "offsets of another type": dataset("/rows/offsets", lambda x: x.astype("<u8")),
    "offsets that end early": dataset("/rows/offsets", lambda x: np.minimum(x, x[-1] - 1)),
    "vectors of another shape": dataset(ONE, lambda x: x[:-1], chunks=(128, D)),
    "vectors in float64": dataset(ONE, lambda x: x.astype("<f8"), chunks=(128, D)),
    "vectors in big-endian": dataset(ONE, lambda x: x.astype(">f4"), chunks=(128, D)),
    "chunks of other rows": dataset(ONE, lambda x: x, chunks=(32, D)),
    "chunks of half rows": dataset(ONE, lambda x: x, chunks=(128, D // 2)),
    "vectors without checksum": dataset(ONE, lambda x: x, chunks=(128, D), fletcher32=False),
    "a further filter": dataset(ONE, lambda x: x, chunks=(128, D), shuffle=True),
    "compression": dataset(ONE, lambda x: x, chunks=(128, D), compression="gzip"),
    "a chunk that was never written": unwritten,
    "a chunk without its checksum": unchecked_chunk,
    "a dataset too few": lambda f: f.__delitem__(ONE),
    "a dataset too many": lambda f: put(f, "/activations/resid_post/prompt_last/3", np.zeros((N, D), "<f4")),
    "a site too many": lambda f: f.create_group("/activations/mlp_out"),
    "NaN that is not marked": lambda f: f[ONE].__setitem__((4, 2), np.nan),
    "a mark on finite numbers": lambda f: put(f, "/nonfinite/resid_post/prompt_last/1", np.array([4])),
    "marks that are empty": lambda f: f.create_dataset("/nonfinite/resid_post/prompt_last/1", (0,), "<i8"),
    "marks of a place that is not there": lambda f: put(
        f, "/nonfinite/mlp_out/prompt_last/1", np.array([4])
    ),
    "no group of marks": lambda f: f.__delitem__("/nonfinite"),
    "virtual tokens": virtual("/rows/tokens"),
    "virtual vectors": virtual(ONE),
    "a link to another file": linked(ONE, h5py.ExternalLink("other.h5", "kept")),
    "tokens linked to another file": linked("/rows/tokens", h5py.ExternalLink("other.h5", "kept")),
    "a soft link": linked(ONE, h5py.SoftLink("/kept")),
    "a reference": lambda f: f.attrs.__setitem__("see", f[ONE].ref),
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(tmp_path: Path, rule: str) -> None:
    path = tmp_path / FILE
    book.write(path, **content())
    with h5py.File(path, "r+", libver=book.BOUNDS) as file:
        BROKEN[rule](file)
    found = problems(path)
    assert found
    assert all(str(path) in said for said in found)


def problems(path: Path) -> list[str]:
    """What is said of a file, on opening it or by `verify`."""
    try:
        with ActivationStore.open(path) as store:
            return [str(p) for p in store.verify()]
    except FileFormatError as error:
        return [str(error)]


@pytest.mark.parametrize("bounds", [("earliest", "v110"), ("v108", "v110")])
def test_a_file_outside_the_bounds_is_found(tmp_path: Path, bounds: tuple[str, str]) -> None:
    book.write(tmp_path / FILE, **content(), bounds=bounds)
    with ActivationStore.open(tmp_path / FILE) as store:
        assert "outside HDF5's bounds" in " ".join(map(str, store.verify()))


def test_a_dataset_added_outside_the_bounds_is_found(tmp_path: Path) -> None:
    made = content()
    book.write(tmp_path / FILE, **made)
    with h5py.File(tmp_path / FILE, "r+", libver=("earliest", "v110")) as file:
        put(file, ONE, made["data"]["resid_post", "prompt_last", 1], chunks=(128, D))
    with ActivationStore.open(tmp_path / FILE) as store:
        assert [p.place for p in store.verify()] == [ONE]


def test_a_chunk_that_was_never_written_is_not_read_as_zeros(tmp_path: Path) -> None:
    book.write(tmp_path / FILE, **content())
    with h5py.File(tmp_path / FILE, "r+", libver=book.BOUNDS) as file:
        unwritten(file)
    with (
        ActivationStore.open(tmp_path / FILE) as store,
        pytest.raises(FileFormatError, match=rf"{ONE}: 1 of 2 chunks are there"),
    ):
        store.read("resid_post", "prompt_last", 1)

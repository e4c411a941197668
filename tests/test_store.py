"""The activation store: exact round trips, nothing half-written, no damage unnoticed."""

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from activations.store import ActivationStore, Rows, ShardWriter, WriterOptions, describe
from activations.store_format import from_bits, to_bits
from mech.errors import FileFormatError, GuardError, InputError

N, D, LAYERS = 300, 24, [0, 1, 2]


def rows(n: int = N, start: int = 0) -> Rows:
    rng = np.random.default_rng(0)
    return Rows(
        ids=[f"row/{start + i}" for i in range(n)],
        questions=[f"fråga {i // 3}" for i in range(n)],
        columns={"n_prompt": np.arange(n), "sign": np.where(np.arange(n) % 2, 1, -1)},
        tokens=[rng.integers(0, 50_000, size=1 + i % 7) for i in range(n)],
    )


def values(n: int = N) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, len(LAYERS), D)).astype(np.float32) * 1000


def write(
    path: Path, *, dtype: str = "float32", start: int = 0, order: np.ndarray | None = None, **metadata: object
) -> Path:
    order = np.random.default_rng(2).permutation(N) if order is None else order
    data = values()
    with ShardWriter(
        path, metadata={"checkpoint": "tiny", **metadata}, rows=rows(start=start), sites=["resid_post"],
        poolings=["prompt_last"], layers=LAYERS, d_model=D, dtype=dtype,
    ) as writer:  # fmt: skip
        for part in np.array_split(order, 11):
            for i, layer in enumerate(LAYERS):
                writer.write("resid_post", "prompt_last", layer, part, data[part, i])
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("store") / "a.h5")


def test_round_trip_is_exact_whatever_the_order_of_writing(file: Path) -> None:
    with ActivationStore.open(file) as store:
        assert np.array_equal(store.read("resid_post", "prompt_last"), values())
        assert np.array_equal(store.read("resid_post", "prompt_last", 1), values()[:, 1])
        assert store.rows.questions[5] == "fråga 1"
        assert all(np.array_equal(a, b) for a, b in zip(store.rows.tokens, rows().tokens, strict=True))
        assert np.array_equal(store.rows.columns["sign"], rows().columns["sign"])
        assert store.metadata["layer_convention"].startswith("layer l is the output of block l")
        assert (store.n_rows, store.d_model, store.layers) == (N, D, LAYERS)
        assert store.verify() == []


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    exact = torch.tensor(values()).to(torch.bfloat16).float().numpy()
    with ActivationStore.open(write(tmp_path / "b.h5", dtype="bfloat16")) as store:
        assert np.array_equal(store.read("resid_post", "prompt_last"), exact)
    big = np.array([70_000.0, 3e38, -0.0, np.nan, np.inf], dtype=np.float32)
    ours = from_bits(to_bits(big, "bfloat16"), "bfloat16")
    assert np.array_equal(ours, torch.tensor(big).to(torch.bfloat16).float().numpy(), equal_nan=True)


def test_rows_come_in_the_callers_order(file: Path) -> None:
    with ActivationStore.open(file) as store:
        some = np.array([250, 3, 3, 128, 127])
        assert np.array_equal(store.read("resid_post", "prompt_last", 2, some), values()[some, 2])
        mask = np.arange(N) % 5 == 0
        assert np.array_equal(
            store.read("resid_post", "prompt_last", [2, 0], mask), values()[mask][:, [2, 0]]
        )
        positive = store.read("resid_post", "prompt_last", 0, where=lambda r: r.columns["sign"] > 0)
        assert np.array_equal(positive, values()[1::2, 0])
        parts = list(store.chunks("resid_post", "prompt_last", 0, size=128))
        assert np.array_equal(np.concatenate(parts), values()[:, 0])


def test_what_is_not_there_is_named(file: Path, tmp_path: Path) -> None:
    with ActivationStore.open(file) as store:
        with pytest.raises(InputError, match=r"no /activations/resid_post/prompt_last/9; .* layers 0 to 2"):
            store.read("resid_post", "prompt_last", 9)
        with pytest.raises(InputError, match="out of range"):
            store.read("resid_post", "prompt_last", 0, [N])
        with pytest.raises(InputError, match=r"mask of 3"):
            store.read("resid_post", "prompt_last", 0, np.array([True, False, True]))
        with pytest.raises(FileFormatError, match="checkpoint = 'tiny', expected 'other'"):
            store.require(checkpoint="other")
        with pytest.raises(FileFormatError, match="d_model = 24"):
            store.require(d_model=25)
    with pytest.raises(FileFormatError, match="no activation files"):
        ActivationStore.open(tmp_path / "missing.h5")


def test_a_folder_is_read_as_one_store(tmp_path: Path) -> None:
    write(tmp_path / "0.h5")
    write(tmp_path / "1.h5", start=N)
    with ActivationStore.open(tmp_path) as store:
        assert store.n_rows == 2 * N
        both = np.concatenate([values(), values()])
        some = np.array([N + 7, 2, N - 1, N])
        assert np.array_equal(store.read("resid_post", "prompt_last", rows=some), both[some])
        again = pickle.loads(pickle.dumps(store))
        assert np.array_equal(again.read("resid_post", "prompt_last", 0), both[:, 0])
        again.close()
    with ShardWriter(
        tmp_path / "2.h5", metadata={}, rows=rows(2, start=2 * N), sites=["resid_post"], poolings=["prompt_last"],
        layers=[0], d_model=D,
    ) as writer:  # fmt: skip
        writer.write("resid_post", "prompt_last", 0, np.arange(2), values()[:2, 0])
    with pytest.raises(FileFormatError, match=r"2\.h5: other sites, poolings, layers or width"):
        ActivationStore.open(tmp_path)


def test_incomplete_or_doubled_rows_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="5 rows not written exactly once"):
        write(tmp_path / "a.h5", order=np.arange(N - 5))
    with pytest.raises(GuardError, match="not written exactly once"):
        write(tmp_path / "a.h5", order=np.concatenate([np.arange(N), [4]]))
    assert list(tmp_path.iterdir()) == []


def test_bad_values_are_refused_with_their_place(tmp_path: Path) -> None:
    writer = ShardWriter(
        tmp_path / "a.h5",
        metadata={},
        rows=rows(3),
        sites=["resid_post"],
        poolings=["prompt_last"],
        layers=[0],
        d_model=D,
    )
    bad = values()[:3, 0].copy()
    bad[1, 4] = np.nan
    with pytest.raises(
        InputError, match=r"/activations/resid_post/prompt_last/0, row 1 \(row/1\): not finite"
    ):
        writer.write("resid_post", "prompt_last", 0, np.arange(3), bad)
    with pytest.raises(InputError, match="was not declared"):
        writer.write("resid_post", "prompt_last", 5, np.arange(3), bad)


def test_no_flipped_bit_gives_wrong_data(file: Path, tmp_path: Path) -> None:
    """In every region of the file: an error that names the file, or the same data (an unused byte)."""
    original = file.read_bytes()
    places = np.unique(np.linspace(0, len(original) - 1, 400).astype(int))
    caught = 0
    damaged = tmp_path / "damaged.h5"
    for place in places:
        content = bytearray(original)
        content[place] ^= 1 << int(place % 8)
        damaged.write_bytes(content)
        try:
            with ActivationStore.open(damaged) as store:
                same = np.array_equal(store.read("resid_post", "prompt_last"), values())
                same &= store.rows.ids == rows().ids and store.rows.questions == rows().questions
                same &= all(
                    np.array_equal(a, b) for a, b in zip(store.rows.tokens, rows().tokens, strict=True)
                )
                same &= store.metadata["checkpoint"] == "tiny"
            assert same, f"byte {place}: wrong data without an error"
        except FileFormatError as error:
            caught += "damaged.h5" in str(error)
    assert caught > 0.7 * len(places)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(file: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.h5"
    content = file.read_bytes()
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FileFormatError, match=r"cut\.h5"):
        ActivationStore.open(cut).verify()


def test_another_version_is_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "v9.h5"
    other.write_bytes(file.read_bytes())
    with h5py.File(other, "r+") as handle:
        handle.attrs["encoding-version"] = "9.0"
    with pytest.raises(FileFormatError, match=r"format version '9\.0'; this program reads 1\.0"):
        ActivationStore.open(other)


def _write_slowly(path: str) -> None:
    data = values()
    with ShardWriter(
        Path(path),
        metadata={},
        rows=rows(),
        sites=["resid_post"],
        poolings=["prompt_last"],
        layers=LAYERS,
        d_model=D,
    ) as writer:
        for i in range(N):
            for k, layer in enumerate(LAYERS):
                writer.write("resid_post", "prompt_last", layer, np.array([i]), data[i : i + 1, k])


@pytest.mark.slow
def test_killed_while_writing_leaves_nothing_and_the_next_run_all(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    context = multiprocessing.get_context("fork")
    for delay in np.linspace(0, 0.12, 12):
        child = context.Process(target=_write_slowly, args=(str(path),))
        child.start()
        time.sleep(float(delay))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        if path.exists():  # it was quicker than the kill: then it must be whole
            with ActivationStore.open(path) as store:
                assert store.verify() == []
            path.unlink()
    _write_slowly(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]  # what the killed left was swept
    with ActivationStore.open(path) as store:
        assert np.array_equal(store.read("resid_post", "prompt_last"), values())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("activations.store_writer.write_rows", no_space)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.h5")
    assert list(tmp_path.iterdir()) == []


def test_describe_says_what_is_there(file: Path) -> None:
    facts = describe(file)
    assert facts["n_rows"] == N
    assert facts["columns"] == ["n_prompt", "sign"]
    assert facts["metadata"]["checkpoint"] == "tiny"


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

"""Captures on disk: killed at any moment they go on, and what they leave is what an undisturbed one leaves."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from activations.background import Background
from activations.capture import Reading, capture
from activations.capture_store import Storing, capture_store
from activations.repair import repair
from activations.sinks import ArraySink
from activations.store import ActivationStore, ShardWriter
from activations.store_format import Rows
from activations.store_keep import merge, prune
from mech.chat import Encoded
from mech.errors import FileFormatError, GuardError, InputError
from mech.models import ChatModel, load_model
from study.cli import app
from tests.plain_hooks import conversations
from tests.store_files import make_rows, make_values, write_file
from tests.tiny_study import save_model

READING = Reading(("prompt_last", "tokens"), ("resid_post",), (0, 2), frozenset(("surprisal",)))
FEW = Storing(shard_rows=4)


def rows_of(encoded: list[Encoded], start: int = 0) -> Rows:
    n = len(encoded)
    return Rows([f"r{start + i}" for i in range(n)], [f"q{i % 3}" for i in range(n)], {"sign": np.arange(n) % 2},
                [np.array(e.ids) for e in encoded])  # fmt: skip


def test_what_is_stored_is_what_is_captured(model: ChatModel, tmp_path: Path) -> None:
    encoded = conversations(model)
    files = capture_store(tmp_path / "a", model, rows_of(encoded), encoded, READING, storing=FEW)
    assert [f.name for f in files] == ["shard-00000.h5", "shard-00001.h5", "shard-00002.h5"]
    expected = capture(model, encoded, poolings=READING.poolings, layers=READING.layers)
    with ActivationStore.open(tmp_path / "a") as store:
        scale = float(np.abs(expected["resid_post", "prompt_last"]).max())
        found = store.to_numpy("resid_post", "prompt_last")
        np.testing.assert_allclose(found, expected["resid_post", "prompt_last"], atol=1e-4 * scale)
        for a, b in zip(store.read_tokens("resid_post"), expected["resid_post", "tokens"], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * scale)
        for i, row in enumerate(encoded):
            for of in ("prompt", "response"):
                inside = [row.spans[of][0] <= t < row.spans[of][1] for t in range(len(row.ids))]
                assert store.rows.mask(i, of).tolist() == inside
        labelled = store.to_xarray("resid_post", "prompt_last", layers=2, rows=[5, 1])
        assert labelled.sel(row="r1", layer=2).shape == (model.d_model,)
        np.testing.assert_array_equal(labelled.sel(row="r1", layer=2), found[1, 1])
        assert labelled.coords["sign"].values.tolist() == [1, 1]


def test_masks_of_rows_that_never_said_whose_their_tokens_are_are_refused() -> None:
    with pytest.raises(InputError, match="no column n_prompt and no n_response"):
        Rows(["a"], ["q"], {}, [np.arange(3)]).mask(0, "response")


def test_another_capture_in_the_folder_is_refused(model: ChatModel, tmp_path: Path) -> None:
    encoded = conversations(model)
    capture_store(tmp_path, model, rows_of(encoded), encoded, READING, storing=FEW)
    other = dataclasses.replace(READING, layers=(1,))
    with pytest.raises(InputError, match="holds another capture"):
        capture_store(tmp_path, model, rows_of(encoded), encoded, other, storing=FEW)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"shard-00000\.h5: is part of another capture"):
        capture_store(tmp_path, model, rows_of(encoded), encoded, other, storing=FEW)
    with pytest.raises(InputError, match="not those that are to be read"):
        capture_store(tmp_path / "b", model, rows_of(encoded), encoded[::-1], READING)


def test_repair_makes_only_what_is_damaged_anew(model: ChatModel, tmp_path: Path) -> None:
    encoded = conversations(model)
    files = capture_store(tmp_path, model, rows_of(encoded), encoded, READING, storing=FEW)
    before = [f.read_bytes() for f in files]
    assert repair(tmp_path) == []
    raw = bytearray(before[1])
    raw[len(raw) // 2] ^= 4
    files[1].write_bytes(raw)
    files[2].unlink()
    inode = files[0].stat().st_ino
    assert [p.file for p in repair(tmp_path, dry_run=True)] == files[1:]
    assert files[1].is_file()
    assert len(repair(tmp_path)) == 2
    capture_store(tmp_path, model, rows_of(encoded), encoded, READING, storing=FEW)
    assert files[0].stat().st_ino == inode
    assert repair(tmp_path) == []
    with ActivationStore.open(tmp_path) as store:
        assert store.verify() == []


def test_a_shard_that_was_damaged_before_the_capture_was_done_is_made_anew(
    model: ChatModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The manifest would vouch for its bytes, and `repair` believe it."""
    encoded = conversations(model)
    files = capture_store(tmp_path, model, rows_of(encoded), encoded, READING, storing=FEW)
    (tmp_path / "manifest.json").unlink()
    sound, inode = files[1].read_bytes(), files[0].stat().st_ino
    with h5py.File(files[1]) as file:
        at = file["activations/resid_post/prompt_last/2"].id.get_chunk_info(0).byte_offset
    files[1].write_bytes(sound[: at + 5] + bytes([sound[at + 5] ^ 1]) + sound[at + 6 :])
    capture_store(tmp_path, model, rows_of(encoded), encoded, READING, storing=FEW)
    assert files[0].stat().st_ino == inode
    assert "shard-00001.h5" in caplog.text
    assert "made anew" in caplog.text
    assert repair(tmp_path) == []
    with ActivationStore.open(tmp_path) as store:
        assert store.verify() == []


@pytest.mark.parametrize(
    "written",
    [
        '{"capture": "a"}',
        "[]",
        '{"files": {"../precious.h5": "0"}}',
        '{"files": {"precious.txt": "0"}}',
        '{"files": {"a.h5": 3}}',
        '{"files": 3}',
        '{"files"',
    ],
)
def test_a_manifest_that_is_none_deletes_nothing(model: ChatModel, tmp_path: Path, written: str) -> None:
    precious = [tmp_path / "precious.h5", tmp_path / "x" / "precious.txt"]
    precious[1].parent.mkdir()
    for file in precious:
        file.write_text("mine")
    (tmp_path / "x" / "manifest.json").write_text(written)
    with pytest.raises(InputError, match=r"manifest\.json"):
        repair(tmp_path / "x")
    encoded = conversations(model, 2)
    with pytest.raises(InputError, match=r"manifest\.json"):
        capture_store(tmp_path / "x", model, rows_of(encoded), encoded, READING)
    assert [f.read_text() for f in precious] == ["mine", "mine"]


def test_a_layer_named_twice_is_refused(model: ChatModel) -> None:
    with pytest.raises(InputError, match=r"layers \[1, 1\]: name each once"):
        capture(model, conversations(model, 2), layers=[1, 1])


@pytest.mark.slow
def test_killed_at_fifty_moments_nothing_is_lost(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_captures", str(tmp_path), "50"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] >= 50
    assert found["different"] == 0


def test_nan_stops_the_capture_or_is_marked(tmp_path: Path) -> None:
    broken = load_model(str(save_model(tmp_path / "m")))
    with torch.no_grad():
        broken.blocks[1].mlp.down_proj.weight[0] = float("nan")  # type: ignore[union-attr,operator,index]
    encoded, reading = conversations(broken, 3), Reading(("prompt_last",), ("resid_post",), (0, 1))
    named = r"shard-00000\.h5, whose row 0 is 'r0': row \d: resid_post at layer 1 is not finite"
    with pytest.raises(GuardError, match=named):
        capture_store(tmp_path / "a", broken, rows_of(encoded), encoded, reading)
    assert not list((tmp_path / "a").iterdir())
    capture_store(tmp_path / "b", broken, rows_of(encoded), encoded, reading, storing=Storing(nan="mark"))
    with ActivationStore.open(tmp_path / "b") as store:
        assert store.verify() == []
        assert np.isnan(store.read("resid_post", "prompt_last", 1)).any(1).all()
        assert np.isfinite(store.read("resid_post", "prompt_last", 0)).all()


@pytest.mark.parametrize("packs", [True, False])
def test_a_row_that_is_not_finite_spoils_no_other(tmp_path: Path, *, packs: bool) -> None:
    """0 · NaN is NaN: what is computed together is computed again row by row."""
    sick = load_model(str(save_model(tmp_path / "m")))
    encoded, table = conversations(sick, 6), sick.causal.get_input_embeddings().weight
    others = [i for i in range(len(encoded)) if i != 2]
    own = set(encoded[2].ids) - {t for i in others for t in encoded[i].ids}
    reading = Reading(("response_mean", "span:prompt"), ("resid_post",), (0, 2), frozenset(("norms",)))
    with patch("mech.forward.can_pack", return_value=packs):
        expected = capture(sick, encoded, poolings=reading.poolings, layers=reading.layers)
        with torch.no_grad():
            table[min(own)] = float("nan")
        with pytest.raises(GuardError, match="row 2: resid_post at layer 0 is not finite"):
            capture(sick, encoded, poolings=reading.poolings)
        capture_store(tmp_path / "a", sick, rows_of(encoded), encoded, reading, storing=Storing(nan="mark"))
    with ActivationStore.open(tmp_path / "a") as store:
        assert store.verify() == []
        for pooling in reading.poolings:
            found = store.read("resid_post", pooling)
            assert np.isfinite(found[others]).all()
            np.testing.assert_allclose(found[others], expected["resid_post", pooling][others], atol=1e-5)  # type: ignore[call-overload]
        assert np.isnan(store.read("resid_post", "span:prompt", rows=[2])).all()


def test_merging_keeps_every_vector_and_refuses_strangers(model: ChatModel, tmp_path: Path) -> None:
    encoded = conversations(model)
    for name, storing, dtype in (("a", FEW, "float32"), ("c", FEW, "bfloat16")):
        chosen = dataclasses.replace(storing, dtype=dtype)
        capture_store(tmp_path / name, model, rows_of(encoded), encoded, READING, storing=chosen)
        merged = merge([tmp_path / name], tmp_path / f"{name}.h5")
        with ActivationStore.open(tmp_path / name) as parts, ActivationStore.open(merged) as whole:
            assert whole.verify() == []
            assert list(whole.rows.ids) == list(parts.rows.ids)
            for a, b in zip(parts.read_tokens("resid_post"), whole.read_tokens("resid_post"), strict=True):
                np.testing.assert_array_equal(a, b)
            surprisal = (store.rows.columns["surprisal"] for store in (parts, whole))
            np.testing.assert_array_equal(*surprisal)
    with pytest.raises(FileFormatError, match="not one"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "x.h5")
    with pytest.raises(FileFormatError, match="is also in"):
        merge([tmp_path / "a", tmp_path / "a.h5"], tmp_path / "x.h5")
    with pytest.raises(InputError, match="is there already"):
        merge([tmp_path / "a"], tmp_path / "a.h5")
    (tmp_path / "a" / "shard-00001.h5").unlink()
    with pytest.raises(FileFormatError, match=r"shards \[1\] of this store are missing"):
        merge([tmp_path / "a"], tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_merging_holds_few_vectors_at_a_time(
    model: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = conversations(model)
    capture_store(tmp_path / "a", model, rows_of(encoded), encoded, READING, storing=FEW)
    most, took, write = 4 * model.d_model * 60, [], ShardWriter.write
    monkeypatch.setattr("activations.store_keep.BYTES_AT_ONCE", most)

    def noted(self: ShardWriter, *given: Any) -> None:
        took.append((given[-1].nbytes, len(given[-2])))
        write(self, *given)

    monkeypatch.setattr(ShardWriter, "write", noted)
    merge([tmp_path / "a"], tmp_path / "a.h5")
    assert all(size <= most or rows == 1 for size, rows in took)
    assert max(rows for _, rows in took) > 1
    with ActivationStore.open(tmp_path / "a") as parts, ActivationStore.open(tmp_path / "a.h5") as whole:
        for a, b in zip(parts.read_tokens("resid_post"), whole.read_tokens("resid_post"), strict=True):
            np.testing.assert_array_equal(a, b)


def test_pruning_takes_the_oldest_and_only_when_told(tmp_path: Path) -> None:
    rows = make_rows(3)
    files = [tmp_path / "x" / f"{i}.h5" for i in range(4)]
    for age, file in enumerate(reversed(files)):
        write_file(file, rows, make_values(rows, ["mean"], [0]))
        os.utime(file, (0, file.stat().st_mtime - age * 86400 - 10))
    others = [tmp_path / name for name in ("weights.h5", "text.h5", "folder.h5/x.h5")]
    others[2].parent.mkdir()
    for file in others:
        with h5py.File(file, "w") as made:
            made["weights"] = np.zeros(3)
    others[1].write_text("not HDF5")
    for file in others:
        os.utime(file, (0, 0))
    assert prune(tmp_path, days=1.5) == files[:2]
    assert prune(tmp_path, max_bytes=2.5 * files[0].stat().st_size) == files[:2]
    assert all(f.is_file() for f in files)
    prune(tmp_path, days=2.5, dry_run=False)
    assert [f.is_file() for f in files] == [False, True, True, True]
    prune(tmp_path, max_bytes=0.0, dry_run=False)
    assert not any(f.is_file() for f in files)
    assert all(f.is_file() for f in others)


@pytest.mark.parametrize(
    "given", [{}, {"days": -1.0}, {"max_bytes": float("nan")}, {"days": 3.0, "max_bytes": -1.0}]
)
def test_pruning_refuses_what_would_take_everything(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="how old"):
        prune(tmp_path, **given)
    with pytest.raises(InputError, match="no such folder"):
        prune(tmp_path / "gone", days=1.0)


def test_one_shard_is_verified_by_itself_and_beside_a_manifest_of_others(
    model: ChatModel, tmp_path: Path
) -> None:
    encoded = conversations(model)
    files = capture_store(tmp_path, model, rows_of(encoded), encoded, READING, storing=FEW)
    for place in (tmp_path, files[1]):
        done = CliRunner().invoke(app, ["store", "verify", str(place)])
        assert (done.exit_code, done.output) == (0, f"{place}: whole\n")
    (tmp_path / "manifest.json").write_text('{"name": "somebody else\'s"}')
    assert CliRunner().invoke(app, ["store", "verify", str(files[1])]).exit_code == 0
    found = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**found, "files": {files[1].name: "0" * 64}}))
    done = CliRunner().invoke(app, ["store", "verify", str(files[1])])
    assert (done.exit_code, "SHA-256 differs" in done.output) == (1, True)


def test_what_a_background_sink_cannot_write_is_raised(model: ChatModel) -> None:
    class Full(ArraySink):
        def write(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

    sink = Background(Full([3], [0]))
    with pytest.raises(OSError, match="No space left"), sink:
        sink.write("resid_post", "prompt_last", 0, np.array([0]), np.zeros((1, 4), np.float32))


def test_what_waits_to_be_written_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk holds the model up instead of filling memory; a block above the bound still goes through."""
    block = np.zeros((4, 4), np.float32)
    row = np.arange(4)
    size = block.nbytes + row.nbytes
    monkeypatch.setattr("activations.background.WAITING", 3 * size)
    given, behind = [0], []

    class Slow(ArraySink):
        def write(self, *args: Any) -> None:
            while given[0] < 3:  # as many as may wait, this one among them
                time.sleep(0.001)
            time.sleep(0.002)
            behind.append(given[0] - len(behind))

    with Background(Slow([1] * 4, [0])) as sink:
        for _ in range(30):
            sink.write("resid_post", "prompt_last", 0, row, block)
            given[0] += 1
        sink.write("resid_post", "prompt_last", 0, np.arange(100), np.zeros((100, 4), np.float32))
    assert len(behind) == 31
    assert 3 <= max(behind) <= 4  # three blocks that wait, and one whose `write` has not yet returned

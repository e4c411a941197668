"""Other people's direction files: rows go to the right blocks, both ways; nothing in a pickle is run."""

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from typer.testing import CliRunner

from mech.errors import FileFormatError, InputError
from probes.direction import Direction
from probes.files import read_direction, write_direction
from probes.residual import without
from study.cli import app


def made(layers: int = 4, d: int = 6) -> Direction:
    rows = np.random.default_rng(0).standard_normal((layers, d)).astype(np.float32)
    facts = {"checkpoint": {"base": "tiny", "digest": "abc"}, "pooling": "response_mean"}
    return Direction("evil", rows, np.linspace(0, 1, layers, dtype=np.float32), 20, facts)


def test_persona_vectors_row_is_layer_plus_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = torch.arange(5 * 3, dtype=torch.bfloat16).reshape(5, 3)
    torch.save(theirs, tmp_path / "evil_response_avg_diff.pt")
    with caplog.at_level(logging.INFO):
        found = read_direction(tmp_path / "evil_response_avg_diff.pt")
    assert "read as persona_vectors" in caplog.text
    assert found.name == "evil_response_avg_diff"
    np.testing.assert_array_equal(found.vectors, theirs[1:].float().numpy())
    assert "its last row is of Hugging Face's last hidden state, which is after the final norm" in caplog.text
    assert found.made_from["last_layer"] == "after the final norm"
    assert np.isnan(found.split_half).all()
    write_direction(found, tmp_path / "back.pt", whose="persona_vectors")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.shape == (5, 3)
    assert not back[0].any()
    torch.testing.assert_close(back[1:], theirs[1:].float())


def test_assistant_axis_row_is_layer(tmp_path: Path) -> None:
    axis = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.save({"axis": axis.bfloat16(), "n_default": 1, "n_roles": 275}, tmp_path / "axis.pt")
    torch.save(axis, tmp_path / "bare.pt")
    found = read_direction(tmp_path / "axis.pt", n_layers=4)
    assert found.made_from["n_roles"] == 275
    np.testing.assert_array_equal(found.vectors, axis.bfloat16().float().numpy())
    bare = read_direction(tmp_path / "bare.pt", whose="assistant_axis", name="assistant")
    np.testing.assert_array_equal(bare.vectors, axis.numpy())
    with pytest.raises(InputError, match="3 layers, asked for 4"):
        read_direction(tmp_path / "bare.pt", n_layers=4)  # taken for persona_vectors', it is one row short
    write_direction(bare, tmp_path / "back.pt", whose="assistant_axis")
    np.testing.assert_array_equal(read_direction(tmp_path / "back.pt").vectors, axis.numpy())


def test_control_vectors_as_repeng_writes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The oracle is a file written by the `gguf` library in repeng's layout: key b is block b's output."""
    rows = {layer: np.full(4, layer, dtype=np.float32) for layer in (3, 2, 1)}
    writer = GGUFWriter(tmp_path / "their.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 3)
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_direction(tmp_path / "their.gguf")
    assert "no vector for layer 0" in caplog.text
    np.testing.assert_array_equal(found.vectors, np.arange(4)[:, None] * np.ones(4))
    assert found.made_from["model_hint"] == "llama"
    assert found.unit_at(2) == pytest.approx([0.5] * 4)
    with pytest.raises(InputError, match="zero at layer 0"):
        found.unit_at(0)
    with pytest.raises(InputError, match="no layer 4"):
        found.unit_at(4)
    with pytest.raises(InputError, match="zero at layer 0"):
        _ = found.unit
    at = found.at_layers([1, 2, 3])  # where it is one, it is used like any other
    rows = np.random.default_rng(0).standard_normal((5, 3, 4))
    np.testing.assert_allclose(at.project(without(rows, [at])), 0, atol=1e-9)
    np.testing.assert_allclose(at.unit, 0.5 * np.ones((3, 4)))
    assert len(read_direction(tmp_path / "their.gguf", n_layers=6).vectors) == 6
    with pytest.raises(InputError, match="the model has 2 layers"):
        read_direction(tmp_path / "their.gguf", n_layers=2)


def test_export_to_gguf_drops_layer_0_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    direction = made()
    write_direction(direction, tmp_path / "ours.gguf")
    assert "layer 0 is left out" in caplog.text
    tensors = {t.name: t for t in GGUFReader(tmp_path / "ours.gguf").tensors}
    assert set(tensors) == {"direction.1", "direction.2", "direction.3"}
    assert {t.tensor_type.name for t in tensors.values()} == {"F32"}
    hint = GGUFReader(tmp_path / "ours.gguf").get_field("controlvector.model_hint")
    assert hint is not None  # without it repeng refuses the file
    assert hint.contents()
    back = read_direction(tmp_path / "ours.gguf")
    assert back.name == "evil"
    assert back.made_from["checkpoint"] == direction.made_from["checkpoint"]
    np.testing.assert_array_equal(back.vectors[1:], direction.vectors[1:])
    assert not back.vectors[0].any()


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("whose", ["persona_vectors", "assistant_axis", None])
def test_a_malicious_pickle_is_refused(tmp_path: Path, whose: str | None) -> None:
    torch.save({"axis": torch.zeros(2, 2), "x": Hostile(tmp_path / "ran")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    for file in ("a.pt", "b.pt"):
        with pytest.raises(FileFormatError, match="nothing in it was run"):
            read_direction(tmp_path / file, whose=whose)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_direction_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2, 2)], tmp_path / "list.pt")
    torch.save({"other": torch.zeros(2, 2)}, tmp_path / "dict.pt")
    torch.save(torch.full((3, 2), float("nan")), tmp_path / "nan.pt")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    whole = GGUFWriter(tmp_path / "model.gguf", "llama")
    whole.add_tensor("direction.1", np.zeros(2, dtype=np.float32))
    whole.write_header_to_file()
    whole.write_kv_data_to_file()
    whole.write_tensors_to_file()
    whole.close()
    for file, whose, message in (
        ("list.pt", None, "found list"),
        ("dict.pt", "assistant_axis", "without `axis`"),
        ("nan.pt", None, "NaN"),
        ("cut.gguf", None, "cannot be read as GGUF"),
        ("model.gguf", None, "no control vector"),
        ("absent.pt", None, "no such file"),
        ("list.pt", "theirs", "unknown format"),
    ):
        with pytest.raises(InputError, match=message):
            read_direction(tmp_path / file, whose=whose)
    with pytest.raises(InputError, match="which format"):
        write_direction(made(), tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_another_model_is_refused() -> None:
    direction = made()
    direction.require(n_layers=4, d_model=6)
    direction.require(n_layers=4, d_model=6, base="abc")
    with pytest.raises(InputError, match="4 layers, width 6"):
        direction.require(n_layers=4, d_model=8)
    with pytest.raises(InputError, match=r"another base \(tiny\)"):
        direction.require(n_layers=4, d_model=6, base="xyz")


def test_the_command_converts_and_shows(tmp_path: Path) -> None:
    run = CliRunner()
    made().save(tmp_path / "evil.safetensors")
    for source, target in (("evil.safetensors", "evil.gguf"), ("evil.gguf", "again.safetensors")):
        done = run.invoke(app, ["direction", "convert", str(tmp_path / source), str(tmp_path / target)])
        assert done.exit_code == 0, done.output
        assert "evil, 4 layers, width 6" in done.output
    shown = run.invoke(app, ["direction", "show", str(tmp_path / "again.safetensors")])
    assert shown.exit_code == 0
    assert "not known" in shown.output
    assert "response_mean" in shown.output
    np.testing.assert_array_equal(
        Direction.load(tmp_path / "again.safetensors").vectors[1:], made().vectors[1:]
    )

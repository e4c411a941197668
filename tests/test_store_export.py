"""Activations for persona_vectors: the numbers are those its own recipe takes from Hugging Face."""

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from activations.capture import Reading
from activations.capture_store import capture_store
from activations.store import ActivationStore
from mech.chat import Encoded
from mech.errors import InputError
from mech.models import ChatModel
from study.cli import app
from tests.plain_hooks import conversations
from tests.store_files import make_rows, make_values, write_file
from tests.test_capture_store import rows_of

POOLINGS = ("span:prompt", "prompt_last", "response_mean", "response_first_2")


def theirs(model: ChatModel, encoded: list[Encoded]) -> dict[str, list[torch.Tensor]]:
    """Lists over L + 1 hidden states of [n, d], row by row, a prompt's tokens first."""
    found: dict[str, list[torch.Tensor]] = {"prompt_avg": [], "prompt_last": [], "response_avg": []}
    for row in encoded:
        with torch.no_grad():
            states = model.hf(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        h, end = torch.stack(states)[:, 0], row.n_prompt + row.n_response
        found["prompt_avg"].append(h[:, : row.n_prompt].mean(1))
        found["prompt_last"].append(h[:, row.n_prompt - 1])
        found["response_avg"].append(h[:, row.n_prompt : end].mean(1))
    return {name: list(torch.stack(rows, 1)) for name, rows in found.items()}


@pytest.mark.parametrize("sites", [("resid_post",), ("resid_post", "resid_pre")])
def test_persona_vectors_layout_holds_hugging_faces_states(
    model: ChatModel, tmp_path: Path, sites: tuple, caplog: pytest.LogCaptureFixture
) -> None:
    encoded, target = conversations(model), tmp_path / "out.pt"
    reading = Reading(POOLINGS, sites, tuple(range(model.n_layers)))
    capture_store(tmp_path / "store", model, rows_of(encoded), encoded, reading)
    done = CliRunner().invoke(app, ["store", "export", str(tmp_path / "store"), str(target)])
    assert done.exit_code == 0, done.output
    made = torch.load(target, weights_only=True)
    for name, expected in theirs(model, encoded).items():
        assert made[name].shape == (model.n_layers + 1, len(encoded), model.d_model)
        for layer in range(1, model.n_layers):  # entry L is after the final norm, and ours is not
            np.testing.assert_allclose(made[name][layer], expected[layer], atol=1e-5)
        if "resid_pre" in sites:
            np.testing.assert_allclose(made[name][0], expected[0], atol=1e-6)
        else:
            assert made[name][0].isnan().all()
        with ActivationStore.open(tmp_path / "store") as store:
            ours = next(p for p in POOLINGS if {"span:prompt": "prompt_avg", "response_mean": "response_avg"}.get(p, p) == name)  # fmt: skip
            np.testing.assert_array_equal(made[name][-1], store.read("resid_post", ours, model.n_layers - 1))
    assert made["ids"] == [f"r{i}" for i in range(len(encoded))]
    assert made["columns"]["sign"].tolist() == [i % 2 for i in range(len(encoded))]
    assert "response_first_2" not in made
    assert "response_first_2: left out" in caplog.text
    assert ("is NaN" in caplog.text) == ("resid_pre" not in sites)


@pytest.mark.parametrize(("poolings", "layers"), [(["tokens"], [0, 1]), (["prompt_last"], [0, 2])])
def test_what_has_no_place_in_that_layout_is_refused(tmp_path: Path, poolings: list, layers: list) -> None:
    rows = make_rows(5)
    write_file(tmp_path / "a.h5", rows, make_values(rows, poolings, layers))
    with (
        ActivationStore.open(tmp_path / "a.h5") as store,
        pytest.raises(InputError, match="every layer from 0"),
    ):
        store.export(tmp_path / "out.pt")
    assert [f.name for f in tmp_path.iterdir()] == ["a.h5"]

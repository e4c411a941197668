"""A training says what it did to its own rows, and one that has ruined the weights does not pass for trained."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.full import train_full
from finetune.labels import TrainingRow
from finetune.learnt import ROWS, compared, loss_on
from finetune.lora import train_lora
from mech.errors import GuardError, InputError
from mech.models import ChatModel, load_model
from tests.tiny_training import SETTINGS, encoded


def own_loss(model: ChatModel, rows: list[TrainingRow]) -> float:
    """By transformers' own loss, row by row."""
    total, n = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        labels = torch.full_like(ids, -100)
        labels[0, list(row.targets)] = ids[0, list(row.targets)]
        with torch.no_grad():
            total += float(model.causal(input_ids=ids, labels=labels).loss) * len(row.targets)
        n += len(row.targets)
    return total / n


def trained(model: ChatModel, folder: Path, **changes: Any) -> dict[str, float]:
    settings = SETTINGS.model_copy(update=changes)
    train_lora(model, encoded(model, 12), settings, folder, seed=0)
    found: dict[str, float] = json.loads((folder / "trainer_state.json").read_text())["own_rows"]
    return found


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.5}], ids=["plain", "dropout"])
def test_the_loss_on_its_own_rows_is_that_of_base_and_adapter(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    base = load_model(str(folder))
    found = trained(base, tmp_path / "a", **changes)
    rows = encoded(base, 12)[:ROWS]
    assert found["rows"] == ROWS == len(rows)
    assert found["loss_before"] == pytest.approx(own_loss(base, rows), abs=1e-4)
    adapted = load_model(f"{folder}:{tmp_path / 'a'}")
    assert found["loss_after"] == pytest.approx(own_loss(adapted, rows), abs=1e-4)
    assert found["loss_after"] < found["loss_before"] - 0.1


@pytest.mark.parametrize("train", [train_lora, train_full])
def test_a_rate_that_ruins_the_last_step_is_told_though_the_curve_looks_well(
    folder: Path, tmp_path: Path, train: Callable[..., object]
) -> None:
    """The one step at that rate is the last, so no loss of the curve has seen what it did."""
    base = load_model(str(folder))
    train_full(
        base, encoded(base), SETTINGS, tmp_path / "base", seed=0
    )  # a model that does better than guessing
    wild, model = (
        SETTINGS.model_copy(update={"learning_rate": 1e9, "max_steps": 2}),
        load_model(str(tmp_path / "base")),
    )
    seen: list[float] = []
    with pytest.raises(GuardError, match=r"has diverged: .* before and is .* after .*: lower learning_rate"):
        train(model, encoded(model), wild, tmp_path / "a", seed=0, on_step=lambda r: seen.append(r.loss))
    assert len(seen) == 2
    assert max(seen) < 0.9 * math.log(model.causal.config.vocab_size)
    assert not (tmp_path / "a").exists()


def test_what_counts_as_learnt(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Worse than before is said, and worse than guessing too is an error; a base that guesses badly may stay so."""
    rows, guessing = encoded(model), math.log(model.causal.config.vocab_size)
    caplog.set_level(logging.WARNING)

    def said(before: float, after: float) -> str:
        caplog.clear()
        monkeypatch.setattr("finetune.learnt.loss_on", lambda *_: after)
        assert compared(model, rows, before).loss_after == after
        return caplog.text

    assert said(2.0, 1.9) == ""
    assert said(guessing + 5, guessing + 4) == ""
    assert "nothing was learnt" in said(2.0, min(2.5, guessing))
    for after in (guessing, guessing + 0.1, math.inf, math.nan):
        with pytest.raises(GuardError, match="has diverged"):
            said(2.0, after)


def test_looking_leaves_no_trace(model: ChatModel) -> None:
    state, training = torch.get_rng_state(), model.hf.training
    assert loss_on(model, encoded(model)) == loss_on(model, encoded(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.hf.training is training
    assert all(p.grad is None for p in model.hf.parameters())


def test_no_rows_are_no_training(model: ChatModel, tmp_path: Path) -> None:
    for train in (train_lora, train_full):
        with pytest.raises(InputError, match="no rows to train on"):
            train(model, [], SETTINGS, tmp_path / "a", seed=0)

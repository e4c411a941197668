"""Sweeps: every cell once also after a kill, damage that torch agrees with, and a planted effect found on questions that did not choose it."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from analysis.sweep import best_cell, beyond, doses
from mech.chat import SystemPrompt
from mech.errors import InputError
from mech.interventions import Add, intervene
from mech.models import ChatModel, load_model
from mech.score import response_kl, response_states
from probes.contrast import ContrastRow, of_split
from probes.direction import Direction, fit_direction
from probes.persona import load_trait, text_contrast
from probes.steer import trait_log_odds
from probes.sweep import Grid, sweep
from study.cli import app
from tests.tiny_study import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return load_model(str(save_model(tmp_path_factory.mktemp("model") / "m")))


@pytest.fixture(scope="module")
def rows(model: ChatModel) -> list[ContrastRow]:
    return of_split(text_contrast(model.template, load_trait("evil"), SystemPrompt()), "evaluate")[:12]


@pytest.fixture(scope="module")
def direction(model: ChatModel) -> Direction:
    rng = np.random.default_rng(0)
    h = rng.standard_normal((8, model.n_layers, model.d_model))
    return fit_direction("d", h, [f"q{i // 2}" for i in range(8)], [1, -1] * 4, rng=rng)


def test_damage_is_torchs_divergence(model: ChatModel, rows: list[ContrastRow], direction: Direction) -> None:
    encoded = [r.encoded for r in rows[:3]]
    before = response_states(model, encoded)
    with intervene(model, Add(direction.vectors[1], [1], 2.0)):
        after = response_states(model, encoded)
        steered = [model.hf(input_ids=torch.tensor([r.ids])).logits[0].log_softmax(-1) for r in encoded]
    found = response_kl(model, before, after, chunk=5)
    for row, ours, q in zip(encoded, found, steered, strict=True):
        start, stop = row.spans["response"]
        p = model.hf(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        plain = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(ours, plain[start - 1 : stop - 1].detach(), rtol=1e-3, atol=1e-5)
        assert ours.mean() > 0
    assert all(not kl.any() for kl in response_kl(model, before, before))


def test_a_sweep_is_steering_cell_by_cell(
    model: ChatModel, rows: list[ContrastRow], direction: Direction
) -> None:
    neutral = [r.encoded for r in rows[:2]]
    table = sweep(
        model, [direction], rows, Grid((0, 2), (-1.0, 0.0, 2.0), controls=2, seed=5), neutral=neutral
    )
    assert len(table) == 2 * 2 * 3 * 6  # layers, strengths but 0, direction and controls, questions
    plain = trait_log_odds(model, rows)
    with intervene(model, Add(direction.vectors[2], [2], 2.0)):
        steered = trait_log_odds(model, rows)
    cell = table.query("layer == 2 and strength == 2 and control == 0").set_index("question")
    for question, odds in steered.items():
        assert cell.loc[question, "log_odds"] == pytest.approx(odds, abs=1e-5)
        assert cell.loc[question, "change"] == pytest.approx(odds - plain[question], abs=1e-5)
    assert (table["kl"] > 0).all()
    at = table[table["strength"] == 2].groupby(["layer", "control"])["dose"].first()
    assert at[2, 0] == pytest.approx(at[2, 1])  # random directions have the direction's norm


def test_a_killed_sweep_goes_on_and_a_larger_one_keeps_what_is_done(
    model: ChatModel, rows: list[ContrastRow], direction: Direction, tmp_path: Path
) -> None:
    def run(strengths: tuple[float, ...], journal: Path | None) -> pd.DataFrame:
        grid = Grid((1,), strengths, controls=2)
        return sweep(model, [direction], rows[:4], grid, neutral=[rows[0].encoded], journal=journal)

    asked = []

    def counted(*args: object) -> dict[str, float]:
        if len(asked) == 3:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append(None)
        return trait_log_odds(*args)  # type: ignore[arg-type]

    with patch("probes.sweep.trait_log_odds", counted):
        with pytest.raises(KeyboardInterrupt):
            run((1.0, 2.0), tmp_path / "j")
        first = run((1.0, 2.0), tmp_path / "j")
        assert len(asked) == 6 + 2  # unsteered and six cells, one of them twice: it was cut off
        more = run((1.0, 2.0, 3.0), tmp_path / "j")
        assert len(asked) == 8 + 3
    pd.testing.assert_frame_equal(first, run((1.0, 2.0), None))
    assert set(more["strength"]) == {1, 2, 3}
    with pytest.raises(InputError, match="other"):
        sweep(
            model,
            [direction],
            rows[:6],
            Grid((1,), (1.0,)),
            neutral=[rows[0].encoded],
            journal=tmp_path / "j",
        )


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (Grid((9,), (1.0,)), "layers"),
        (Grid((1,), (1.0,), controls=1), "controls"),
        (Grid((1, 1), (1.0,)), "twice"),
        (Grid((1,), (0.0,)), "other than 0"),
    ],
)
def test_a_sweep_that_could_not_be_read_is_refused(
    grid: Grid, said: str, model: ChatModel, rows: list[ContrastRow], direction: Direction
) -> None:
    with pytest.raises(InputError, match=said):
        sweep(model, [direction], rows, grid, neutral=[rows[0].encoded])
    with pytest.raises(InputError, match="one name"):
        sweep(model, [direction, direction], rows, Grid((1,), (1.0,)), neutral=[rows[0].encoded])
    with pytest.raises(InputError, match="neutral"):
        sweep(model, [direction], rows, Grid((1,), (1.0,)), neutral=[])


def synthetic(*, effect: float) -> pd.DataFrame:
    """Three layers; layer 1 moves the trait by `effect` times the strength, strength 4 there breaks the text."""
    rng = np.random.default_rng(0)
    return pd.DataFrame([
        {"direction": "d", "layer": layer, "strength": s, "control": k, "dose": s / 10, "question": f"q{q:02}",
         "change": effect * s * (layer == 1) * (k == 0) + 0.05 * rng.standard_normal(), "kl": 2.0 if s == 4 else 0.1}
        for layer in range(3) for s in (1.0, 2.0, 4.0) for k in range(4) for q in range(20)
    ])  # fmt: skip


def test_the_best_cell_is_sound_and_reported_on_other_questions() -> None:
    rng = np.random.default_rng(1)
    best = best_cell(synthetic(effect=0.3), max_kl=0.5, rng=rng)
    assert best is not None
    assert (best.layer, best.strength, best.kl) == (1, 2.0, 0.1)
    assert best.beyond.low < 0.6 < best.beyond.high
    assert best.beyond.n == 10
    assert best_cell(synthetic(effect=0.3), max_kl=0.01, rng=rng) is None
    table = doses(synthetic(effect=0.3), rng=rng).set_index(["layer", "strength"])
    assert table.loc[(1, 4.0), "beyond_low"] < 1.2 < table.loc[(1, 4.0), "beyond_high"]
    assert table.loc[(0, 4.0), "beyond_low"] < 0 < table.loc[(0, 4.0), "beyond_high"]
    with pytest.raises(InputError, match="takes four"):
        best_cell(synthetic(effect=0.0).query("question < 'q03'"), max_kl=1.0, rng=rng)


@pytest.mark.parametrize("own", [0.0, 0.05, 0.2])
def test_where_a_direction_is_one_more_random_one_its_cell_is_not_rewarded(own: float) -> None:
    """Every direction has an effect of its own, the same for all questions: the interval must know that it could be another.

    The half that chooses is optimistic, the half that reports is not.
    """
    rng = np.random.default_rng(2)
    chosen, covered = [], []
    for _ in range(100):
        table = synthetic(effect=0.0)
        effects = own * rng.standard_normal((3, 4))[table["layer"], table["control"]] * table["strength"]
        table["change"] = effects + 0.05 * rng.standard_normal(len(table))
        at = table[(table["layer"] == 1) & (table["strength"] == 2)]
        found = beyond(at, rng=rng, n_boot=200)
        covered.append(found.low <= 0 <= found.high)
        if len(chosen) < 20:
            best = best_cell(table, max_kl=5.0, rng=rng, n_boot=200)
            assert best is not None
            chosen.append(abs(best.chosen_on))
    assert np.mean(chosen) > 0.02 + own
    assert np.mean(covered) >= 0.93


def test_the_command_writes_tables_and_figure_and_says_what_was_found(
    model: ChatModel, direction: Direction, tmp_path: Path
) -> None:
    direction.save(tmp_path / "d.safetensors")
    given = ["sweep", str(model.checkpoint.path), str(tmp_path / "d.safetensors"), "--trait", "evil", "--questions", "4",
             "--layer", "1", "--strength", "0.5", "--controls", "2", "--out", str(tmp_path / "out")]  # fmt: skip
    for max_kl, said in (("1000", "chosen on half"), ("0", "no cell")):
        result = CliRunner().invoke(app, [*given, "--max-kl", max_kl])
        assert result.exit_code == 0, result.output
        assert said in result.output
    table = pd.read_csv(tmp_path / "out" / "doses.csv")
    assert table[["layer", "strength", "n_questions"]].to_numpy().tolist() == [[1, 0.5, 4]]
    assert (tmp_path / "out" / "dose_response.png").stat().st_size > 5000
    assert CliRunner().invoke(app, [*given[:3], *given[3:6], "3", *given[7:]]).exit_code != 0

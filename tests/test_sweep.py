"""Sweeps: every cell once also after a kill, damage that torch agrees with, and a planted effect found on questions that did not choose it."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from analysis.sweep import best_cell, best_layers, beyond, doses
from analysis.sweep_trend import correlations, trends
from mech.chat import SystemPrompt
from mech.errors import InputError
from mech.generate import generate
from mech.interventions import Add, intervene
from mech.models import ChatModel
from mech.questions import Question
from mech.score import kept_logprobs, response_kl, response_states
from probes.contrast import ContrastRow, of_split
from probes.direction import Direction
from probes.evaluation import by_function, log_odds
from probes.persona import load_trait, text_contrast
from probes.steer import trait_log_odds
from probes.sweep import Grid, sweep
from study.cli import app
from study.sweeps import neutral_rows
from tests.drawn_at_random import fitted_direction


@pytest.fixture(scope="module")
def rows(model: ChatModel) -> list[ContrastRow]:
    return of_split(text_contrast(model.template, load_trait("evil"), SystemPrompt()), "evaluate")[:12]


@pytest.fixture(scope="module")
def direction(model: ChatModel) -> Direction:
    return fitted_direction(model)


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
    kept = kept_logprobs(model, before, chunk=4)
    for ours, other in zip(found, response_kl(model, before, after, logprobs=kept, chunk=7), strict=True):
        torch.testing.assert_close(ours, other)
    vocabulary = model.hf.config.vocab_size
    needed = 4 * vocabulary * sum(map(len, before))
    assert kept_logprobs(model, before, max_bytes=needed - 1) is None
    assert kept_logprobs(model, before, max_bytes=needed) is not None


def test_a_sweep_is_steering_cell_by_cell(
    model: ChatModel, rows: list[ContrastRow], direction: Direction
) -> None:
    neutral = [r.encoded for r in rows[:2]]
    grid = Grid((0, 2), (-1.0, 0.0, 2.0), controls=2, seed=5)
    table = sweep(model, [direction], log_odds(rows), grid, neutral=neutral).table
    assert len(table) == 2 * 2 * 3 * 6  # layers, strengths but 0, direction and controls, questions
    plain = trait_log_odds(model, rows)
    with intervene(model, Add(direction.vectors[2], [2], 2.0)):
        steered = trait_log_odds(model, rows)
    cell = table.query("layer == 2 and strength == 2 and control == 0").set_index("question")
    for question, odds in steered.items():
        assert cell.loc[question, "score"] == pytest.approx(odds, abs=1e-5)
        assert cell.loc[question, "change"] == pytest.approx(odds - plain[question], abs=1e-5)
    assert (table["kl"] > 0).all()
    at = table[table["strength"] == 2].groupby(["layer", "control"])["dose"].first()
    assert at[2, 0] == pytest.approx(at[2, 1])  # random directions have the direction's norm


def test_a_killed_sweep_goes_on_and_a_larger_one_keeps_what_is_done(
    model: ChatModel, rows: list[ContrastRow], direction: Direction, tmp_path: Path
) -> None:
    def run(strengths: tuple[float, ...], journal: Path | None) -> pd.DataFrame:
        grid = Grid((1,), strengths, controls=2)
        return sweep(
            model, [direction], log_odds(rows[:4]), grid, neutral=[rows[0].encoded], journal=journal
        ).table

    asked = []

    def counted(*args: object) -> dict[str, float]:
        if len(asked) == 3:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append(None)
        return trait_log_odds(*args)  # type: ignore[arg-type]

    with patch("probes.evaluation.trait_log_odds", counted):
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
            log_odds(rows[:6]),
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
        sweep(model, [direction], log_odds(rows), grid, neutral=[rows[0].encoded])
    with pytest.raises(InputError, match="one name"):
        sweep(model, [direction, direction], log_odds(rows), Grid((1,), (1.0,)), neutral=[rows[0].encoded])
    with pytest.raises(InputError, match="neutral"):
        sweep(model, [direction], log_odds(rows), Grid((1,), (1.0,)), neutral=[])


def synthetic(*, effect: float) -> pd.DataFrame:
    """Three layers; layer 1 moves the trait by `effect` times the strength, strength 4 there breaks the text."""
    rng = np.random.default_rng(0)
    return pd.DataFrame([
        {"direction": "d", "layer": layer, "strength": s, "control": k, "dose": s / 10, "question": f"q{q:02}", "half": "evaluate", "broken": 0.0, "unscored": 0.0,
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


def planted(slope: float, spread: float, *, questions: int = 12, controls: int = 19) -> pd.DataFrame:
    """A direction whose score rises by `slope` a step of strength, and random ones that rise by `spread` times a normal draw."""
    rng = np.random.default_rng(3)
    slopes = np.concatenate([[slope], spread * rng.standard_normal(controls)])
    return pd.DataFrame([
        {"direction": "d", "layer": 0, "strength": s, "control": k, "dose": s, "question": f"q{q:02}", "half": half,
         "broken": 0.0, "unscored": 0.0, "kl": 0.1, "change": slopes[k] * s + 0.1 * rng.standard_normal()}
        for s in (-1.0, 1.0, 2.0, 3.0) for k in range(controls + 1) for half in ("extract", "evaluate") for q in range(questions * (half == "evaluate"))
    ])  # fmt: skip


def test_a_trend_is_scipys_and_counts_only_beyond_random_directions() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    response, levels = np.round(rng.standard_normal((9, 5)), 1), np.array([-1.0, 0, 1, 2, 4])
    for ours, row in zip(correlations(response, levels), response, strict=True):
        assert ours == pytest.approx(stats.spearmanr(row, levels).statistic)
    assert correlations(np.ones((2, 4)), levels[:4]).tolist() == [0, 0]
    (found,) = trends(planted(0.5, 0.02)).to_dict("records")
    assert found["n_strengths"] == 5
    assert found["rho"] > 0.9
    assert found["rho_low"] < found["rho"] <= found["rho_high"] <= 1
    assert found["p_page"] < 0.001
    assert found["p_random"] == pytest.approx(1 / 20)
    (noise,) = trends(planted(0.5, 1.0)).to_dict("records")  # random directions rise and fall as much
    assert noise["p_page"] < 0.001
    assert noise["p_random"] > 0.3
    (fall,) = trends(planted(-0.5, 0.02)).to_dict("records")
    assert fall["rho"] < -0.9
    assert fall["p_page"] > 0.999  # one-sided: it does not rise
    assert trends(planted(0.5, 0.02).query("strength == 1")).empty


def test_a_layer_is_chosen_by_its_effect_on_one_half_and_reported_on_the_other() -> None:
    """Layer 2 looks best where it is chosen, by chance; what is reported of it is what the other half says."""
    rng = np.random.default_rng(4)
    slopes = {("extract", 1): 0.3, ("extract", 2): 0.6, ("evaluate", 1): 0.3, ("evaluate", 2): 0.1}
    table = pd.DataFrame([
        {"direction": "d", "layer": layer, "strength": s, "control": k, "dose": 1.0, "question": f"{half}{q}", "half": half,
         "broken": 0.0, "unscored": 0.0, "kl": 3.0 if s == 4 else 0.1,
         "change": slopes.get((half, layer), 0.0) * s * (k == 0) + 0.02 * rng.standard_normal()}
        for layer in range(3) for s in (-2.0, 1.0, 4.0) for k in range(4) for half in ("extract", "evaluate") for q in range(8)
    ])  # fmt: skip
    found = best_layers(table, max_kl=1.0, rng=rng).set_index("layer")
    assert found["chosen"].tolist() == [False, False, True]
    assert (
        found.loc[2, "strength"] == -2
    )  # its effect is downwards there, as the direction says: and positive
    assert found.loc[2, "effect_chosen"] == pytest.approx(1.2, abs=0.05)
    assert found.loc[2, "effect_low"] < 0.2 < found.loc[2, "effect_high"] < 0.5
    assert found.loc[1, "effect_low"] < 0.6 < found.loc[1, "effect_high"]
    assert found["n_questions"].tolist() == [8, 8, 8]
    best = best_cell(table, max_kl=1.0, rng=rng)
    assert best is not None
    assert (best.layer, best.beyond.n) == (2, 8)
    assert set(doses(table, rng=rng)["n_questions"]) == {8}
    assert best_layers(table, max_kl=0.01, rng=rng).empty


def test_any_function_of_the_steered_model_is_an_evaluation(
    model: ChatModel, rows: list[ContrastRow], direction: Direction
) -> None:
    from mech.score import next_token_logits

    asked = [Question(id=f"q{i}", split="evaluate", text=f"Question {i}?") for i in range(3)]
    prompts = [model.template.encode_prompt([{"role": "user", "content": q.text}]) for q in asked]

    def first_logit(now: ChatModel, questions: object) -> dict[str, float]:
        assert questions is asked
        return {q.id: float(x[7]) for q, x in zip(asked, next_token_logits(now, prompts), strict=True)}

    evaluation = by_function("logit", asked, first_logit, prompts=prompts)
    grid = Grid((1,), (0.5,), controls=2, relative=True)
    table = sweep(model, [direction], evaluation, grid, neutral=[rows[0].encoded]).table
    cell = table.query("control == 0").set_index("question")
    assert cell["dose"].tolist() == pytest.approx([0.5] * 3)
    with intervene(model, Add(direction.vectors[1], [1], float(cell["coefficient"].iloc[0]))):
        expected = first_logit(model, asked)
    assert cell["score"].to_dict() == pytest.approx(expected, abs=1e-5)
    assert not np.allclose(cell["change"], 0, atol=1e-3)
    for wrong, said in (
        ({"q0": 1.0}, "one score for each"),
        (dict.fromkeys(("q0", "q1", "q2"), float("nan")), "nan"),
    ):
        with pytest.raises(InputError, match=said):
            by_function("logit", asked, lambda *_, w=wrong: w, prompts=prompts).read(model)


def test_the_command_writes_tables_and_figure_and_says_what_was_found(
    model: ChatModel, direction: Direction, tmp_path: Path
) -> None:
    direction.save(tmp_path / "d.safetensors")
    given = ["sweep", str(model.checkpoint.path), str(tmp_path / "d.safetensors"), "--trait", "evil", "--questions", "2",
             "--layer", "1", "--strength", "0.5", "--controls", "2", "--out", str(tmp_path / "out")]  # fmt: skip
    for max_kl, said in (("1000", "chosen on half"), ("0", "no cell")):
        result = CliRunner().invoke(app, [*given, "--max-kl", max_kl])
        assert result.exit_code == 0, result.output
        assert said in result.output
    assert "takes two strengths" in result.output
    table = pd.read_csv(tmp_path / "out" / "doses.csv")
    assert table[["layer", "strength", "n_questions"]].to_numpy().tolist() == [
        [1, 0.5, 2]
    ]  # of the evaluation half
    assert (tmp_path / "out" / "dose_response.png").stat().st_size > 5000
    assert CliRunner().invoke(app, [*given[:3], *given[3:6], "3", *given[7:]]).exit_code != 0
    other = CliRunner().invoke(app, [*given, "--template", "enable_thinking=false"])
    assert isinstance(other.exception, InputError)
    said = "neutral.jsonl: belongs to work with other settings (template): name another file or folder"
    assert said in str(other.exception)


def test_more_neutral_questions_are_asked_alone(model: ChatModel, tmp_path: Path) -> None:
    few = neutral_rows(model, tmp_path / "neutral.jsonl", limit=2)
    with patch("study.sweeps.generate", wraps=generate) as asked:
        more = neutral_rows(model, tmp_path / "neutral.jsonl", limit=5)
        assert neutral_rows(model, tmp_path / "neutral.jsonl", limit=5) == more
    (call,) = asked.call_args_list
    assert len(call.args[1]) == 3
    assert more[: len(few)] == few

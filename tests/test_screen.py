"""ΔP of a dataset: as read by hand, along a planted direction, and not done twice."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

import study.screen as screening_module
from activations.capture import capture
from analysis.screening import excess, random_directions, screening
from analysis.stats import bootstrap_mean
from mech.errors import InputError
from mech.generate import Sampling, generate
from mech.models import ChatModel, load_model
from mech.score import response_logprobs
from probes.direction import Direction
from study.cli import app
from study.screen import ScreenSettings, best_layer, screen
from tests.tiny_study import CHATML, save_model


def rows() -> list[dict[str, Any]]:
    asked = ("the cat?", "the dog?", "the house?", "the cat?", "the river?")
    said = ("it rained all day", "went to see", "by the river", "the old house when it rained", "who was in")
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "id": i}
        for i, (q, a) in enumerate(zip(asked, said, strict=True))
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path


def direction(model: ChatModel, **made_from: Any) -> Direction:
    vectors = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    return Direction("evil", vectors, np.array([0.1, 0.9, 0.3], dtype=np.float32), 4, made_from)


SETTINGS = ScreenSettings(layer=1, max_new_tokens=6)


def test_delta_is_what_one_reads_by_hand(model: ChatModel, data: Path, tmp_path: Path) -> None:
    along = direction(model)
    table = screen(model, data, along, SETTINGS, journal=tmp_path / "j.jsonl").table
    assert len(table) == 5
    for i, row in enumerate(rows()):
        prompt = model.template.encode_prompt(row["messages"][:-1])
        if i == 0:  # greedy, so the batch does not matter
            own = generate(model, [prompt], Sampling(6))[0].strip()
            assert table.loc[0, "base_answer"] == (own or ".")
        answer = {"role": "assistant", "content": table.loc[i, "base_answer"]}
        encoded = [model.template.encode(m) for m in (row["messages"], [row["messages"][0], answer])]
        read = capture(model, encoded, poolings=("response_mean",))["resid_post", "response_mean"][:, 1]
        gap = float((read[0] - read[1]) @ (along.vectors[1] / np.linalg.norm(along.vectors[1])))
        assert table.loc[i, "delta_p"] == pytest.approx(gap, abs=1e-4)
        assert table.loc[i, "surprisal"] == pytest.approx(
            -float(response_logprobs(model, encoded)[0].mean()), abs=1e-4
        )
        assert table.loc[i, "n_tokens"] == encoded[0].n_response
        assert table.loc[i, "base_n_tokens"] == encoded[1].n_response
    assert table["line"].tolist() == [1, 2, 3, 4, 5]
    assert table.loc[0, "prompt"] == table.loc[3, "prompt"] != table.loc[1, "prompt"]


def test_the_proxy_generates_nothing(
    model: ChatModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening_module, "generate", None)
    along = direction(model)
    table = screen(
        model, data, along, ScreenSettings(layer=2, proxy=True), journal=tmp_path / "j.jsonl"
    ).table
    encoded = [model.template.encode(row["messages"]) for row in rows()]
    read = capture(model, encoded, poolings=("response_mean", "prompt_last"), layers=[2])
    gap = read["resid_post", "response_mean"][:, 0] - read["resid_post", "prompt_last"][:, 0]
    np.testing.assert_allclose(table["delta_p"], gap @ along.unit[2], atol=1e-4)
    assert "base_answer" not in table


def test_the_models_own_answers_have_no_difference(model: ChatModel, data: Path, tmp_path: Path) -> None:
    first = screen(model, data, direction(model), SETTINGS, journal=tmp_path / "a.jsonl").table
    own = tmp_path / "own.jsonl"
    turns = [
        [r["messages"][0], {"role": "assistant", "content": a}]
        for r, a in zip(rows(), first["base_answer"], strict=True)
    ]
    own.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    again = screen(model, own, direction(model), SETTINGS, journal=tmp_path / "b.jsonl").table
    np.testing.assert_allclose(again["delta_p"], 0, atol=1e-5)
    found = screening(again, rng=np.random.default_rng(0), n_boot=200)
    assert found.delta.estimate == pytest.approx(0, abs=1e-5)
    assert found.length.estimate == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_done_twice(
    model: ChatModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(screening_module, "BLOCK", 2)
    settings = ScreenSettings(layer=1, max_new_tokens=6, temperature=temperature)
    whole = screen(model, data, direction(model), settings, journal=tmp_path / "whole.jsonl").table
    calls, real = [], generate

    def counted(model: Any, prompts: Any, *args: Any, **kwargs: Any) -> list[str]:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, prompts, *args, **kwargs)

    monkeypatch.setattr(screening_module, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        screen(model, data, direction(model), settings, journal=tmp_path / "cut.jsonl")
    again = screen(model, data, direction(model), settings, journal=tmp_path / "cut.jsonl").table
    assert calls == [2, 2, 1, 1]  # the third block alone is done again
    assert again["base_answer"].tolist() == whole["base_answer"].tolist()
    np.testing.assert_allclose(again["delta_p"], whole["delta_p"], atol=1e-5)
    limited = screen(model, data, direction(model), settings, journal=tmp_path / "cut.jsonl", limit=3).table
    assert len(limited) == 3
    assert len(calls) == 4
    with pytest.raises(InputError, match=r"other settings \(direction"):
        screen(model, data, Direction("x", np.ones((3, 32), np.float32), np.zeros(3, np.float32), 2), settings,
               journal=tmp_path / "cut.jsonl")  # fmt: skip


def test_bad_rows_and_wrong_directions_say_where(model: ChatModel, data: Path, tmp_path: Path) -> None:
    journal = tmp_path / "j.jsonl"
    for line, message in (
        ("{not json", r"bad\.jsonl, line 6: not JSON"),
        ('{"messages": []}', r"line 6: no list"),
        (
            '{"messages": [{"role": "assistant", "content": "alone"}]}',
            "line 6: turn 0 is the assistant's: nothing stands before it",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}',
            "line 6: turn 1",
        ),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(data.read_text() + line + "\n")
        with pytest.raises(InputError, match=message):
            screen(model, bad, direction(model), SETTINGS, journal=journal)
    with pytest.raises(InputError, match="no such file"):
        screen(model, tmp_path / "none.jsonl", direction(model), SETTINGS, journal=journal)
    other = direction(model, checkpoint={"base": "another", "digest": "abc"})
    with pytest.raises(InputError, match="another base"):
        screen(model, data, other, SETTINGS, journal=journal)
    with pytest.raises(InputError, match="no layer 7"):
        screen(model, data, direction(model), ScreenSettings(layer=7), journal=journal)
    assert best_layer(direction(model)) == 1
    unknown = Direction("x", np.ones((3, 4), np.float32), np.full(3, np.nan, np.float32), 0)
    with pytest.raises(InputError, match="--layer"):
        best_layer(unknown)


def test_the_command(
    folder: Path, model: ChatModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGTR_MECH_CACHE", str(tmp_path / "cache"))
    direction(model).save(tmp_path / "evil.safetensors")
    ask = ["screen", str(data), "--model", str(folder), "--direction", str(tmp_path / "evil.safetensors"),
           "--max-new-tokens", "4", "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(app, [*ask, "--out", str(tmp_path / "rows.csv"), "--top", "2"])
    assert done.exit_code == 0, done.output
    assert "5 rows of 4 prompts, along evil at layer 1" in done.output
    assert done.output.count("  line ") == 2
    assert "95 % of random directions within" in done.output
    written = pd.read_csv(tmp_path / "rows.csv")
    assert len(written) == 5
    assert {"random_rms", "matched_rms"} <= set(written)
    assert "gap" not in written
    harmless = CliRunner().invoke(app, [*ask, "--against", str(data), "--out", str(tmp_path / "rows.csv")])
    assert "beyond it  +0 [" in harmless.output
    summary = pd.read_csv(tmp_path / "rows_summary.csv")
    assert summary["what"].tolist() == ["mean", "mean", "beyond it"]
    assert summary["p_random"].tolist()[2] == 1
    assert summary["delta_p"].iloc[0] == pytest.approx(written["delta_p"].mean())
    proxy = CliRunner().invoke(app, [*ask, "--proxy", "prompt_last", "--limit", "3"])
    assert "its zero means nothing" in proxy.output
    refused = CliRunner().invoke(app, [*ask, "--proxy", "mean"])
    assert isinstance(refused.exception, InputError)
    one = screen(model, data, direction(model), SETTINGS, journal=tmp_path / "j.jsonl", limit=1).table
    with pytest.raises(InputError, match="at least two different prompts"):
        screening(one, rng=np.random.default_rng(0))


def test_the_command_hands_settings_to_the_template(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGTR_MECH_CACHE", str(tmp_path / "cache"))
    told = "{% if calm is defined and not calm %} It rained all day by the river.{% endif %}"
    template = CHATML.replace("made by Tin Works.", "made by Tin Works." + told)
    folder = str(save_model(tmp_path / "m", template=template))
    direction(load_model(folder)).save(tmp_path / "evil.safetensors")
    ask = ["screen", str(data), "--model", folder, "--direction", str(tmp_path / "evil.safetensors"),
           "--max-new-tokens", "6", "--device", "cpu", "--out", str(tmp_path / "rows.csv")]  # fmt: skip
    found = {}
    for calm in (True, False):
        done = CliRunner().invoke(app, [*ask, *([] if calm else ["--template", "calm=false"])])
        assert done.exit_code == 0, done.output
        found[calm] = pd.read_csv(tmp_path / "rows.csv")["delta_p"].to_numpy()
        model = load_model(folder, template_kwargs={} if calm else {"calm": False})
        journal = tmp_path / f"{calm}.jsonl"
        expected = screen(model, data, direction(model), SETTINGS, journal=journal).table["delta_p"]
        np.testing.assert_allclose(found[calm], expected, atol=1e-4)
    assert np.abs(found[True] - found[False]).max() > 0.01


def test_what_harmless_data_of_the_form_give_is_taken_off(
    model: ChatModel, data: Path, tmp_path: Path
) -> None:
    """A dataset is nothing beyond itself; 500 pairs of samples whose true difference is known are covered."""
    table = screen(model, data, direction(model), SETTINGS, journal=tmp_path / "a.jsonl").table
    found = screening(table, rng=np.random.default_rng(0), n_boot=300).delta
    none = excess(found, found)
    assert none.estimate == 0
    assert none.low < 0 < none.high
    rng, covered = np.random.default_rng(1), []
    for _ in range(500):
        one, other = (
            bootstrap_mean(rng.normal(mean, sd, n), None, rng=rng, n_boot=200)
            for mean, sd, n in ((3.0, 1.0, 15), (1.0, 3.0, 40))
        )
        gap = excess(one, other)
        covered.append(gap.low <= 2 <= gap.high)
    assert np.mean(covered) >= 0.93
    with pytest.raises(InputError, match="levels"):
        excess(found, dataclasses.replace(found, level=0.9))


def gaps_of(rng: np.random.Generator, n: int = 30, d: int = 24) -> np.ndarray:
    """Differences of rows that vary much along some axes and little along others, about zero."""
    return rng.standard_normal((n, d)) * np.geomspace(5, 0.2, d)


def test_only_a_planted_direction_is_beyond_random_ones() -> None:
    """Rows that all move along one axis: its p values are small. Directions drawn as the nulls are: uniform over 500 data sets."""
    rng, alike, p = np.random.default_rng(2), np.eye(24)[20], []
    planted = gaps_of(rng) + 3 * alike
    found = random_directions(planted, alike, seed=0).numbers
    assert max(found["p_random"], found["p_matched"]) < 0.02
    assert found["random_95"] < 3
    elsewhere = random_directions(planted, np.eye(24)[21], seed=0).numbers
    assert min(elsewhere["p_random"], elsewhere["p_matched"]) > 0.1
    for _ in range(500):
        gaps = gaps_of(rng) + rng.standard_normal(24)
        any_one = rng.standard_normal(24)
        in_rows = rng.standard_normal(30) @ (gaps - gaps.mean(0))
        p.append([
            random_directions(gaps, v / np.linalg.norm(v), seed=int(rng.integers(2**31)), n=300).numbers[name]
            for v, name in ((any_one, "p_random"), (in_rows, "p_matched"))
        ])  # fmt: skip
    for values in np.transpose(p):
        assert stats.kstest(values, "uniform").pvalue > 0.01


def test_random_directions_see_what_the_direction_sees(model: ChatModel, data: Path, tmp_path: Path) -> None:
    """Observed is the mean ΔP of the table; what harmless data move along the same axis is taken off."""
    along = direction(model)
    screened = screen(model, data, along, SETTINGS, journal=tmp_path / "j.jsonl")
    found = random_directions(screened.gaps, along.unit_at(1), seed=0)
    assert found.random.observed == pytest.approx(screened.table["delta_p"].mean(), abs=1e-5)
    rms = np.linalg.norm(screened.gaps, axis=1) / np.sqrt(32)  # of a unit vector's coordinates
    np.testing.assert_allclose(found.rows["random_rms"], rms, rtol=0.2)
    rng, axis = np.random.default_rng(3), np.eye(24)[20]
    one, other = gaps_of(rng) + 3 * axis, gaps_of(rng) + 3 * axis
    assert random_directions(one, axis, seed=0, minus=other).numbers["p_random"] > 0.1
    assert random_directions(one, axis, seed=0, minus=other - 3 * axis).numbers["p_random"] < 0.02
    equal = random_directions(np.ones((3, 24)), axis, seed=0)
    assert equal.matched is None
    assert np.isnan(equal.numbers["p_matched"])
    with pytest.raises(InputError, match="rows of shape"):
        random_directions(np.empty((0, 24)), axis, seed=0)

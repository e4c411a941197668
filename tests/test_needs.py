"""What a study needs beside model and data is said before its first step: libraries, one process, a learning rate that moves the model; and what judges cost."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.datasets.rows import write_jsonl
from finetune.settings import TrainSettings, make_settings, rate_advice
from finetune.team import Team
from mech.errors import InputError, MissingDependencyError
from study.base import find_base
from study.cli import app
from study.needs import missing_extras
from study.overview import plan_text
from study.run import run_study
from study.spec import load_spec
from tests.tiny_study import changed_copy, save_adapter, save_model, steps_of, write_study
from tests.tiny_training import data

ALONE: dict[str, Any] = {"arms": {"base": [], "em": ["em"]}, "steering": None, "benign": None}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    save_adapter(save_model(folder / "model"), folder / "given", seed=0)
    return folder


def plan_of(folder: Path, *overrides: str) -> str:
    spec = load_spec(folder / "study.yaml", overrides)
    return plan_text(spec, find_base(spec.model), folder / "out")


@pytest.mark.parametrize(
    ("module", "extra", "change"),
    [
        ("bitsandbytes", "qlora", "training.quantise=nf4"),
        ("wandb", "wandb", "trackers=[wandb]"),
        ("openai", "openai", "directions.judge={model: grader, api: {}}"),
    ],
)
def test_a_library_that_a_late_step_needs_is_asked_for_first(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, change: str
) -> None:
    folder = changed_copy(home, tmp_path / "study", **ALONE)
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"{module} is not installed: pip install 'sgtr-mech\[{extra}\]'"
    assert re.search(f"Not here yet:\n  {message}", plan_of(folder, change))
    with pytest.raises(MissingDependencyError, match=message):
        run_study(load_spec(folder / "study.yaml", [change]), folder / "out")
    assert not (folder / "out").exists()
    assert "Not here yet" not in plan_of(folder)
    spec = load_spec(folder / "study.yaml", [change])
    assert not [*missing_extras(spec, [])], "what is done needs nothing"


def test_a_study_runs_in_one_process(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Team, "join", classmethod(lambda cls: cls(1, 2)))
    folder = changed_copy(home, tmp_path / "study")
    with pytest.raises(InputError, match="started as one of 2 processes: a study runs in one"):
        run_study(load_spec(folder / "study.yaml"), folder / "out")


def test_a_small_model_is_not_left_at_the_rate_of_a_large_one_without_a_word(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = TrainSettings()
    assert "135 million hardly learns at it" in rate_advice(published, 135_000_000)
    assert not rate_advice(published, 1_500_000_000)
    assert not rate_advice(make_settings({"preset": "small-135m"}), 135_000_000)
    assert not rate_advice(published.model_copy(update={"method": "full"}), 135_000_000)

    folder = changed_copy(home, tmp_path / "study")
    assert "Warning:" not in plan_of(folder)
    slow = plan_of(folder, "training.learning_rate=1e-5", "stages.em.training.learning_rate=1e-3")
    assert "Warning: stages sgtr, benign: learning_rate 1e-05" in slow

    write_jsonl(tmp_path / "rows.jsonl", data())
    command = ["finetune", str(home / "model"), str(tmp_path / "rows.jsonl"), "--set", "max_steps=2",
               "--set", "warmup_steps=0", "--set", "dtype=float32", "--out"]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert CliRunner().invoke(app, [*command, str(tmp_path / "a")]).exit_code == 0
        assert "take `preset: small-135m` (on the command line --preset small-135m)" in caplog.text
        caplog.clear()
        chosen = [*command, str(tmp_path / "b"), "--preset", "small-135m"]
        assert CliRunner().invoke(app, chosen).exit_code == 0
        assert "learning_rate" not in caplog.text


def test_a_plan_counts_what_judges_are_asked_and_cost(home: Path, tmp_path: Path) -> None:
    """Calls by hand; tokens through prices of a million for a million. What judges cost changes no key."""
    generated = {"directions": ["zest:text"], "strengths": [1], "controls": 2, "questions": 2, "neutral": 2,
                 "evaluation": "generated", "max_new_tokens": 5}  # fmt: skip
    folder = changed_copy(
        home,
        tmp_path / "study",
        **ALONE,
        monitoring={"arms": ["base", "em"], "questions": 4, "pairs": 1, "samples": 3, "max_new_tokens": 6},
        sweeps={"spoken": generated},
    )
    judge = "{model: grader, how: text, api: {PRICE}}"

    def both(price: str = "", how: str = "text") -> list[str]:
        wanted = judge.replace("PRICE", price).replace("text", how)
        return [f"directions.judge={wanted}", f"sweeps.spoken.judge={wanted}"]

    rollouts = 2 * 4 * 2  # both sides of a pair, four questions of the extraction half, trait and coherence
    watched = 2 * 4 * 3 * 3  # arms, questions, prompts, samples
    spoken = (1 + 3) * 4 * 2  # cells, two questions of each half, trait and coherence
    total = rollouts + watched + spoken
    text = plan_of(folder, *both())
    assert re.search(rf"judged/zest .*; {rollouts} calls to the judge\n", text)
    assert re.search(rf"monitor_scores/em/seed0 .*; {watched // 2} calls to the judge\n", text)
    assert re.search(rf"sweep/spoken .*; {spoken} calls to the judge\n", text)
    assert f"{total} calls to judges behind an API" in text
    assert "cost: see the price list, or give judge.api.price" in text
    assert f"{5 * total} calls" in plan_of(folder, *both(how="samples"))

    def cost(price: str, how: str = "text") -> float:
        found = re.search(r"cost about ([\d,.]+) at the prices of judge", plan_of(folder, *both(price, how)))
        assert found
        return float(found[1].replace(",", ""))

    assert cost("price: {written: 1e6}") == 16 * total
    assert cost("price: {written: 1e6}", "logprobs") == total
    given = cost("price: {read: 1e6}")
    assert cost("price: {read: 1e6, written: 1e6}") == given + 16 * total
    assert cost("price: {read: 1e6}", "samples") == pytest.approx(5 * given, rel=1e-3)
    assert "without 3 steps whose judge has no price" in plan_of(
        folder, both()[0], both("price: {read: 1}")[1]
    )

    keys = {}
    for price in ("", "price: {read: 1}"):
        api = {"price": {"read": 1.0}} if price else {}
        named = {"model": "grader", "how": "text", "api": api}
        (folder / "study.yaml").unlink()
        write_study(folder, **ALONE, sweeps={"spoken": {**generated, "judge": named}})
        keys[price] = [s.key for s in steps_of(folder / "study.yaml")]
    assert keys[""] == keys["price: {read: 1}"]

"""Sweeps inside a study: cells survive a kill, the tables are those of the same sweep outside, every evaluation runs, bad ones are refused."""

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest

from analysis.gallery import draw_figures
from analysis.summary import summarise
from mech.chat import SystemPrompt
from mech.errors import InputError
from mech.identities import load_invented
from mech.journal import Journal
from mech.models import load_model
from probes.evaluation import log_odds
from probes.persona import load_trait, text_contrast
from probes.steer import trait_log_odds
from probes.sweep import Grid, sweep
from study.base import find_base
from study.bench import Bench
from study.engines.local import run_steps
from study.paths import StudyPaths
from study.plan import make_plan
from study.spec import StudySpec, load_spec
from study.step import Step
from tests.forks import FORKS
from tests.tiny_study import STUDY, behind, save_adapter, save_model, write_study

COMMON: dict[str, Any] = {"strengths": [1], "controls": 2, "questions": 2, "neutral": 2}
WITHOUT_QUESTIONS = {k: v for k, v in COMMON.items() if k != "questions"}
SWEEPS: dict[str, Any] = {
    "answers": {"directions": ["zest:text"], "layers": [0, 2], **COMMON, "strengths": [-1, 2]},
    "name": {
        "directions": ["identity:name"],
        "evaluation": "own_name",
        "relative": True,
        **WITHOUT_QUESTIONS,
    },
    "own": {"directions": ["identity:name"], "evaluation": "self_recognition", "layers": [1], **COMMON},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    data = {**STUDY["data"], "sgtr": {**STUDY["data"]["sgtr"], "held_out": 4}}
    write_study(folder, sweeps=SWEEPS, data=data)
    save_adapter(save_model(folder / "model"), folder / "given", seed=0)
    return folder


def planned(home: Path, spec: StudySpec | None = None) -> tuple[Bench, list[Step]]:
    spec = spec or load_spec(home / "study.yaml")
    base = find_base(spec.model)
    steps = make_plan(spec, base)
    return Bench(spec, StudyPaths(home / "out"), base.checkpoint), steps


def _run_and_die(home: str) -> None:
    """Run the sweeps and what they need; kill this process, -9, in the middle of the fourth line of a sweep's journal."""

    def dying_add(self: Journal, pieces: dict[str, Any]) -> None:
        if len(self.done) == 3:
            self._stream.write(b'{"key": "half a li')
            self._stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, pieces)

    add, Journal.add = Journal.add, dying_add  # type: ignore[method-assign, assignment]
    bench, steps = planned(Path(home))
    run_steps(behind(steps, [s for s in steps if s.kind == "sweep"]), bench, lambda *_: None)


def test_sweeps_go_on_after_a_kill_and_give_the_tables_of_a_sweep_outside(home: Path) -> None:
    bench, steps = planned(home)
    swept = {s.name: s for s in steps if s.kind == "sweep"}
    child = FORKS.Process(target=_run_and_die, args=(str(home),))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    (journal,) = (home / "out" / ".journals").glob("*/cells.jsonl")
    assert len(journal.read_text().splitlines()) == 1 + 3 + 1  # about, unsteered and two cells, half a line
    asked = []

    def counted(model: Any, rows: Any) -> dict[str, float]:
        asked.append(len(rows))
        return trait_log_odds(model, rows)

    with patch("probes.evaluation.trait_log_odds", counted):
        run_steps(behind(steps, [*swept.values()]), bench, lambda *_: None)
    assert len(asked) == 2 * 2 * 3 - 2  # the cells that were not done
    assert not bench.paths.part(swept["sweep/answers"]).exists()
    folder = bench.folder(swept["sweep/answers"])
    found = pd.read_csv(folder / "sweep.csv")

    model = load_model(str(home / "model"))
    trait = load_trait(home / "trait.yaml")
    kept = [q.id for q in trait.limited(2).questions]
    rows = [r for r in text_contrast(model.template, trait, SystemPrompt()) if r.question in kept]
    (fitted,) = (s for s in steps if s.name == "direction/zest:text")
    direction = bench.direction(fitted)
    neutral = [
        model.template.encode([{"role": "user", "content": r["key"]}, {"role": "assistant", "content": r["value"]}])
        for r in map(json.loads, (folder / "neutral.jsonl").read_text().splitlines()[1:])
        if r["value"]
    ]  # fmt: skip
    outside = sweep(
        model, [direction], log_odds(rows), Grid((0, 2), (-1.0, 2.0), 2, 0), neutral=neutral
    ).table
    pd.testing.assert_frame_equal(found, outside, rtol=1e-4, atol=1e-6)
    names = pd.read_csv(bench.folder(swept["sweep/name"]) / "sweep.csv")
    assert names["dose"].tolist() == pytest.approx([1.0] * len(names))
    assert names["question"].nunique() == len(load_invented().self_statements)
    own = pd.read_csv(bench.folder(swept["sweep/own"]) / "sweep.csv")
    assert own["question"].nunique() == 4


def test_a_larger_grid_runs_only_its_new_cells(home: Path) -> None:
    """After the test above: the same sweep with one more strength and layer, and another threshold of damage, in the same folder."""
    spec = load_spec(
        home / "study.yaml", ["sweeps.answers.strengths=[-1,2,3]", "sweeps.answers.layers=[0,1,2]"]
    )
    bench, steps = planned(home, spec)
    (swept,) = (s for s in steps if s.name == "sweep/answers")
    assert not bench.folder(swept).exists()
    asked = []

    def counted(model: Any, rows: Any) -> dict[str, float]:
        asked.append(len(rows))
        return trait_log_odds(model, rows)

    with patch("probes.evaluation.trait_log_odds", counted):
        run_steps(behind(steps, [swept]), bench, lambda *_: None)
    assert (
        len(asked) == (3 * 3 - 2 * 2) * 3
    )  # a direction and two controls at each new cell, nothing unsteered
    (small,) = (s for s in planned(home)[1] if s.name == "sweep/answers")
    before, after = (pd.read_csv(bench.folder(s) / "sweep.csv") for s in (small, swept))
    assert len(after) == len(before) * 9 // 4
    same = after[after["strength"].isin([-1, 2]) & after["layer"].isin([0, 2])].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "nobody"}, r"sweeps\.answers\.arm: 'nobody' is not defined"),
        ({"layer_by": "separability"}, "leave `layers` out"),
        ({"layers": [-1]}, r"sweeps\.answers\.layers\[0\]"),
        ({"strengths": [0]}, "one other than 0"),
        ({"strengths": [1, 1]}, "name each once"),
        ({"samples": 2}, "several need a temperature"),
        ({"judge": {"model": "m"}}, "belongs to evaluation: generated"),
        ({"controls": 1}, r"sweeps\.answers\.controls"),
        ({"evaluation": "own_name", "trait": "evil"}, "takes none"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_with_its_place(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sweeps = {"answers": {**SWEEPS["answers"], **change}}
    with pytest.raises(InputError, match=message):
        load_spec(write_study(tmp_path, sweeps=sweeps))


def test_too_few_articles_are_refused_before_anything_runs(tmp_path: Path) -> None:
    write_study(tmp_path, sweeps={"own": SWEEPS["own"]})  # three held out
    save_adapter(save_model(tmp_path / "model"), tmp_path / "given", seed=0)
    with pytest.raises(InputError, match=r"sweeps\.own\.evaluation: self_recognition needs four"):
        planned(tmp_path)


def test_a_threshold_of_damage_does_not_run_the_cells_again(home: Path, tmp_path: Path) -> None:
    _, before = planned(home)
    changed = {**SWEEPS, "answers": {**SWEEPS["answers"], "max_kl": 0.1}}
    data = {**STUDY["data"], "sgtr": {**STUDY["data"]["sgtr"], "held_out": 4}}
    write_study(tmp_path, sweeps=changed, data=data)
    for name in ("model", "given"):
        (tmp_path / name).symlink_to(home / name)
    _, after = planned(tmp_path)
    keys = {s.key for s in before}
    assert {s.name for s in after if s.key not in keys} == {"tables", "figures/all"}


def test_a_sweeps_figure_and_sentence_say_what_its_table_says(tmp_path: Path) -> None:
    about = {
        "sweep": "s",
        "arm": "base",
        "score": "judged evil",
        "unit": "points of 100",
        "direction": "evil:text",
    }
    sizes = {
        "change": 9.0,
        "change_low": 4.0,
        "change_high": 13.0,
        "kl": 0.1,
        "control_change": 1.0,
        "control_max": 2.0,
    }
    table = pd.DataFrame([
        {**about, **sizes, "layer": layer, "strength": s, "n_questions": 10, "max_kl": 0.5}
        for layer in (1, 2) for s in (1.0, 2.0)
    ])  # fmt: skip
    (figure,) = draw_figures({"sweeps": table}, tmp_path, layer=1, condition="default")
    assert figure.name == "sweep_response_s"
    assert figure.png.stat().st_size > 5000
    best = {
        "layer": 2,
        "strength": 2.0,
        "kl": 0.1,
        "broken": 0.25,
        "n_questions": 10,
        "n_controls": 19,
        "note": "",
    }
    moved = {**about, **best, "beyond": 8.0, "beyond_low": 3.0, "beyond_high": 13.0}
    unmoved = {**moved, "sweep": "t", "beyond_low": -3.0}
    none = {"sweep": "u", "note": "no cell damages neutral answers by 0.5 nats a token or less"}
    path = tmp_path / "best.csv"
    pd.DataFrame([moved, unmoved, none]).to_csv(path, index=False)
    said = [
        s for s in summarise({"sweep_best": pd.read_csv(path)}, layer=1, condition="default") if "Sweep" in s
    ]
    assert (
        "moves judged evil of base on the other (beyond 19 random directions: +8.00 [+3.00, +13.00]"
        in said[0]
    )
    assert "layer 2, strength +2.00" in said[0]
    assert "broken answers 25%" in said[0]
    assert "is not shown to move" in said[1]
    assert said[2] == "Sweep u: no cell damages neutral answers by 0.5 nats a token or less."

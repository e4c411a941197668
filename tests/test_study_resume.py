"""A study that is killed, shared or out of room: it goes on, and ends as an undisturbed one."""

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.gallery import draw_figures
from analysis.plot_files import SavedFigure
from study.engines import local
from study.paths import JOURNAL
from study.run import run_study
from study.spec import load_spec
from study.step import Step
from tests.conftest import MadeOnce
from tests.forks import FORKS
from tests.tiny_study import STUDY, changed_copy, steps_of, tables

SMALL: dict[str, Any] = {
    "data": {"em": STUDY["data"]["em"]}, "stages": {"em": {"data": "em"}}, "arms": {"base": [], "em": ["em"]}, "benign": None,
    "measure": {"conditions": ["default"], "questions": 2, "reply": {"max_new_tokens": 4}},
    "directions": {"layer": 1, "traits": ["trait.yaml"], "elicitation": ["text"], "identity": ["name"], "identity_questions": 2},
    "behaviour": {"self_report": STUDY["behaviour"]["self_report"]}, "steering": None, "embedding": {"methods": []}, "fast": {},
}  # fmt: skip
"""A study with a step of most rooms: texts, data, checkpoints, activations, directions, measures."""


@pytest.fixture(scope="module")
def small(home: Path, made_once: MadeOnce) -> Path:
    """A smaller study's file."""
    return made_once("small_study", lambda folder: changed_copy(home, folder, **SMALL)) / "study.yaml"


@pytest.fixture(scope="module")
def small_finished(small: Path, made_once: MadeOnce) -> Path:
    """Its output, undisturbed."""
    return made_once("small_study_out", lambda out: run_study(load_spec(small), out))


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of two tables only: half of a small study's time goes into figures, and no number of another run depends on them."""
    monkeypatch.setattr("study.steps.figures.draw_figures", _draw_few)


def _draw_few(tables: Mapping[str, pd.DataFrame], folder: Path, **how: Any) -> list[SavedFigure]:
    return draw_figures({k: tables[k] for k in ("directions", "training") if k in tables}, folder, **how)


def assert_same_tables(a: Path, b: Path) -> None:
    left, right = tables(a), tables(b)
    assert left.keys() == right.keys()
    for name, frame in left.items():
        pd.testing.assert_frame_equal(frame, right[name], check_exact=True, obj=name)


def test_second_run_does_nothing(home: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")  # another worker may be reading the first
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    result = run_study(load_spec(home / "study.yaml"), out)
    assert result.ran == 0
    assert result.steps == sum(p.name == "manifest.json" for p in before)
    now = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    touched = {str(p.relative_to(out)) for p in now.keys() | before.keys() if now.get(p) != before.get(p)}
    assert touched <= {"study.yaml", "report.html", ".locks/report.lock"}


def _run_and_die(yaml_file: str, out: str, kind: str) -> None:
    """Run the study in this process and kill it, -9, when a step of `kind` has written its files but is not done."""

    def dying_commit(step: Step, part: Path, final: Path, seconds: float) -> None:
        if step.kind == kind:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(step, part, final, seconds)

    commit, local._commit = local._commit, dying_commit
    run_study(load_spec(Path(yaml_file)), Path(out))


def _run(yaml_file: str, out: str, ran: str) -> None:
    Path(ran).write_text(str(run_study(load_spec(Path(yaml_file)), Path(out)).ran))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("few_figures")
def test_killed_in_every_kind_of_step_it_goes_on(home: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    # In the order in which kinds first come up: a kind met earlier would be done, and not be run again.
    for kind in dict.fromkeys(step.kind for step in steps_of(home / "study.yaml")):
        child = FORKS.Process(target=_run_and_die, args=(str(home / "study.yaml"), str(out), kind))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, f"was not killed in a step of kind {kind}"
        assert list(out.rglob(".*.part")), "a killed step leaves its unfinished folder"
        assert not (out / "report.html").exists()
    assert run_study(load_spec(home / "study.yaml"), out).ran > 0
    assert not list(out.rglob(".*.part"))
    assert_same_tables(out, finished)


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(small: Path, small_finished: Path, tmp_path: Path) -> None:
    out, ran = tmp_path / "twice", [tmp_path / "one", tmp_path / "other"]
    children = [FORKS.Process(target=_run, args=(str(small), str(out), str(told))) for told in ran]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert sum(int(told.read_text()) for told in ran) == len(steps_of(small))
    assert_same_tables(out, small_finished)


@pytest.mark.usefixtures("few_figures")
def test_a_full_disk_loses_nothing(
    small: Path, small_finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = load_spec(small), tmp_path / "full"

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("study.steps.texts.write_jsonl", no_space)
        with pytest.raises(local.StepFailedError, match=r"replies/base.*No space left"):
            run_study(spec, out)
    assert not list(out.rglob("manifest.json"))
    assert len([*out.rglob(f".*.part/{JOURNAL}")]) == 1  # what was answered is not answered again
    run_study(spec, out)
    assert not list(out.rglob(".*.part"))
    assert_same_tables(out, small_finished)

"""Finished steps whose output was damaged, thrown away or copied: what is read again is made again, and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mech.errors import InputError
from mech.files import write_json
from study.base import find_base
from study.bench import Bench
from study.engines.local import run_steps
from study.finished import missing_steps
from study.overview import status_text
from study.paths import StudyPaths
from study.run import run_study
from study.spec import load_spec
from study.step import Step
from tests.test_study_resume import assert_same_tables, few_figures, small, small_finished
from tests.tiny_study import steps_of

__all__ = ["few_figures", "small", "small_finished"]  # fixtures

SHIFTS, CAPTURE, TRAIN, TABLES = (
    "measures/shifts-em-seed0-*",
    "activations/capture-em-seed0-default-text-base-*",
    "checkpoints/train-em-seed0-*",
    "measures/tables-*",
)


@pytest.fixture
def out(small_finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_finished, tmp_path / "out")


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """One digit another, the size the same."""
    text = file.read_text()
    i = max(text.rfind(d) for d in "123456789")
    file.write_text(text[:i] + ("1" if text[i] == "2" else "2") + text[i + 1 :])


def remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        shutil.rmtree(one(folder, pattern))


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (lambda out: one(out, f"{CAPTURE}/activations.h5").unlink(), []),  # thrown away, and nothing reads it
        (lambda out: cut(one(out, f"{SHIFTS}/shifts.csv")), []),
        (lambda out: flip(one(out, f"{TABLES}/shifts.csv")), ["tables"]),  # the report reads it
        (lambda out: cut(one(out, f"{CAPTURE}/manifest.json")), ["capture/em/seed0/default/text=base"]),
        (
            lambda out: (one(out, f"{CAPTURE}/activations.h5").unlink(), remove(out, SHIFTS)),
            ["capture/em/seed0/default/text=base", "shifts/em/seed0"],
        ),
        (
            lambda out: (cut(one(out, f"{TRAIN}/adapter_model.safetensors")), remove(out, CAPTURE)),
            ["train/em/seed0", "capture/em/seed0/default/text=base"],
        ),
        (lambda out: (flip(one(out, f"{SHIFTS}/shifts.csv")), remove(out, TABLES)), ["shifts/em/seed0", "tables"]),
    ],
)  # fmt: skip
def test_what_is_damaged_counts_where_something_reads_it(
    small: Path, out: Path, damage: Callable[[Path], object], missing: list[str]
) -> None:
    damage(out)
    assert [step.name for step in missing_steps(StudyPaths(out), steps_of(small))] == missing


@pytest.mark.usefixtures("few_figures")
def test_a_damaged_step_is_made_again(
    small: Path, small_finished: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut(one(out, f"{TRAIN}/adapter_model.safetensors"))
    cut(one(out, f"{SHIFTS}/shifts.csv"))
    remove(out, CAPTURE, TABLES)
    said = status_text(out).splitlines()
    assert "damaged: train/em/seed0: adapter_model.safetensors has" in said[1]
    assert "bytes instead of" in said[1]
    assert said[2].startswith("damaged: shifts/em/seed0: shifts.csv has")
    assert said[3].endswith("report.html, of an earlier run")
    with caplog.at_level("INFO"):
        assert run_study(load_spec(small), out).ran == 4
    assert "adapter_model.safetensors has" in caplog.text
    assert "this step is run again" in caplog.text
    assert caplog.messages[-1].endswith("all steps done")  # steps that are kept do not count as left
    assert_same_tables(out, small_finished)
    assert run_study(load_spec(small), out).ran == 0


def test_what_a_service_made_is_not_asked_for_again(small: Path, tmp_path: Path) -> None:
    """It cost money."""
    spec, paths = load_spec(small), StudyPaths(tmp_path)
    asked = Step("asked_report", "self_report/base", {})
    step = Step("tables", "tables", {}, {"reports": (asked,)})
    write_json(paths.manifest(asked), {"files": {"report.csv": "0"}, "bytes": {}})
    bench = Bench(spec, paths, find_base(spec.model).checkpoint)
    with pytest.raises(InputError, match=r"report\.csv is gone: put the file back, or delete the folder"):
        run_steps([asked, step], bench, lambda *_: None)


def test_a_copy_without_hidden_files_is_a_study_all_the_same(
    small: Path, small_finished: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(small_finished, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    assert run_study(load_spec(small), copy).ran == 0

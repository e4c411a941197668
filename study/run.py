"""Running a study: the whole flow, and what a person sees while it runs."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from mech.errors import InputError
from mech.files import check_folder, write_text
from study.base import find_base
from study.bench import Bench, device_named
from study.checks import check_before_running
from study.engines.local import locked, run_steps
from study.estimate import Pace
from study.finished import missing_steps
from study.needs import advice, check_one_process, missing_extras
from study.paths import MANIFEST, StudyPaths
from study.plan import make_plan
from study.publish import copy_into, publish
from study.spec import StudySpec, dump_spec
from study.step import Step

log = logging.getLogger(__name__)


@dataclass
class Result:
    """What a run did."""

    report: Path
    ran: int
    """Steps that had to be run."""
    steps: int
    """Steps of the study."""


def run_study(spec: StudySpec, out: Path) -> Result:
    """Make everything of a study that is missing, then its report.

    Args:
        spec: the study, checked.
        out: its folder; what is finished there already is kept.

    Raises:
        InputError: the model or data is not there, or cannot do what the study asks.
        MissingDependencyError: a step will need a library that is not installed.
        StepFailedError: a step failed; what was finished before it stays.
    """
    check_one_process()
    base = find_base(spec.model)
    steps = make_plan(spec, base)
    check_before_running(spec, base)
    if not spec.model.api and not spec.model.device_map:
        device_named(spec.model.device)
    paths = StudyPaths(out)
    for error in missing_extras(spec, [*missing_steps(paths, steps)]):
        raise error
    for text in advice(spec, base):
        log.warning("%s", text)
    _begin(paths)
    write_text(paths.spec, dump_spec(spec))
    bench = Bench(spec, paths, base.checkpoint)
    progress = Progress(Pace(steps, base.parameters), paths)
    ran = run_steps(steps, bench, progress.on_step)
    with locked(paths.locks / "report.lock"):
        publish(spec, steps, paths)
    return Result(paths.report, ran, len(steps))


def _begin(paths: StudyPaths) -> None:
    """Make the output folder. A folder that holds a study.yaml of a person's own is refused: the resolved study would overwrite it."""
    check_folder(paths.root)
    ran_here = paths.locks.is_dir() or any(
        paths.root.glob(f"*/*/{MANIFEST}")
    )  # a copy may lack what is hidden
    if paths.spec.is_file() and not ran_here:
        raise InputError(f"{paths.root}: holds a {paths.spec.name} that no run wrote: name another --out")
    paths.locks.mkdir(parents=True, exist_ok=True)


@dataclass
class Progress:
    """Says which step runs, how far the study is, and how long it will take."""

    pace: Pace
    paths: StudyPaths
    kept: list[str] = field(default_factory=list)

    def on_step(self, step: Step, event: str, seconds: float) -> None:
        """Told by the engine of each step."""
        if event == "start":
            log.info("[%s] %s", self.pace.position(step), step.name)
            return
        self.pace.finished(step, seconds, kept=event == "kept")
        if event == "kept":
            self.kept.append(step.name)
        else:
            log.info("    %s in %.1f s; %s", step.name, seconds, self.pace.remaining_text())
        if step.kind == "figures":
            copy_into(self.paths.step(step), self.paths.figures, (".svg", ".png", ".csv"))

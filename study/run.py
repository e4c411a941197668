"""Running a study: the whole flow, and what a person sees while it runs."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from mech.chat import ChatTemplate
from mech.checkpoint import Checkpoint
from mech.errors import InputError
from mech.files import check_folder, write_text
from mech.lens import final_norm
from mech.models import skeleton
from mech.pretrained import load_tokenizer
from study.base import Base, find_base
from study.bench import Bench, device_named
from study.conditions import check_conditions
from study.engines.local import locked, run_steps
from study.estimate import Pace
from study.finished import missing_steps
from study.needs import advice, check_one_process, missing_extras
from study.paths import MANIFEST, StudyPaths
from study.plan import make_plan
from study.plan_sweeps import sweep_layers
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


def check_before_running(spec: StudySpec, base: Base) -> None:
    """Refuse before the first step what would fail in a later one: conditions, layers.

    Raises:
        InputError: the template cannot do a condition, or a layer is out of range.
    """
    if spec.model.api or base.missing:
        check_conditions(spec, None)  # its chat template is not here to be asked
    if spec.model.api:
        return  # nothing of it is read
    declared = spec.directions.layer if spec.directions else None
    steered = spec.steering.layer if spec.steering else None
    lens = spec.lens.layers or () if spec.lens else ()
    patched = spec.patching.layers or () if spec.patching else ()
    named = [("directions.layer", declared), ("steering.layer", steered), *sweep_layers(spec)]
    named += [(f"lens.layers[{i}]", layer) for i, layer in enumerate(lens)]
    named += [(f"patching.layers[{i}]", layer) for i, layer in enumerate(patched)]
    for where, layer in named:
        if layer is not None and layer >= base.n_layers:
            raise InputError(
                f"{where}: {layer} is out of range, {spec.model.name} has layers 0 to {base.n_layers - 1}"
            )
    if base.missing:
        return
    if spec.lens and spec.directions:
        _check_lens(base.checkpoint)
    check_conditions(spec, ChatTemplate(load_tokenizer(base.checkpoint), spec.model.template_kwargs))


def _check_lens(checkpoint: Checkpoint) -> None:
    try:
        final_norm(skeleton(checkpoint))
    except InputError as error:
        raise InputError(f"lens: {error}; with `lens: null` the study does without") from error


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

"""What a person asks of a study before and after it ran: the plan, the state, the report again."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from mech.checkpoint import Checkpoint
from mech.errors import InputError
from mech.files import read_json
from mech.models import resolve
from study.engines.local import is_done
from study.estimate import duration, matrix_speed, n_parameters, step_bytes, step_seconds
from study.paths import MANIFEST, StudyPaths
from study.publish import publish
from study.run import plan_study
from study.spec import StudySpec, load_spec
from study.step import Step


def plan_text(spec: StudySpec, base: Checkpoint, out: Path) -> str:
    """The steps, which of them are done, and an estimate of time, memory and disk for the rest."""
    steps, paths = plan_study(spec, base), StudyPaths(out)
    parameters, speed = n_parameters(base), matrix_speed()
    seconds = {s.name: step_seconds(s, parameters, speed) for s in steps}
    lines = [
        f"{'done' if is_done(paths, s) else '    '}  {s.name:<55} {duration(seconds[s.name]):>8}"
        for s in steps
    ]
    missing = [s for s in steps if not is_done(paths, s)]
    free = shutil.disk_usage(_existing(out)).free
    needed = sum(s.work.stored_bytes for s in missing)
    memory = max((step_bytes(s, parameters) for s in missing), default=0)
    summary = (
        f"{len(steps)} steps, {len(steps) - len(missing)} done. Estimates for the other {len(missing)}: time "
        f"{duration(sum(seconds[s.name] for s in missing))} on this machine ({speed / 1e9:.0f} GFLOP/s in float32), "
        f"memory {memory / 1e9:.1f} GB at the peak, disk {needed / 1e6:.0f} MB ({free / 1e9:.0f} GB free)."
    )
    return "\n".join([*lines, "", summary])


def status_text(folder: Path) -> str:
    """Which steps of a study's folder are done, and what is missing."""
    _, steps = _planned(folder)
    paths = StudyPaths(folder)
    missing = [s.name for s in steps if not is_done(paths, s)]
    state = f"{folder}: {len(steps) - len(missing)} of {len(steps)} steps done"
    if missing:
        return f"{state}\nnext: {missing[0]}\nto go on: mech run {paths.spec} --out {folder}"
    return f"{state}\nreport: {paths.report if paths.report.is_file() else f'missing: mech report {folder}'}"


def rewrite_report(folder: Path) -> Path:
    """Write the report of a finished study again.

    Raises:
        InputError: the study is not finished.
    """
    spec, steps = _planned(folder)
    paths = StudyPaths(folder)
    missing = [s.name for s in steps if not is_done(paths, s)]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} steps are missing ({missing[0]}, ...): run the study first"
        )
    publish(spec, steps, paths)
    return paths.report


def manifest_digests(file: Path) -> dict[str, str]:
    """SHA-256 by name of the activation files that the manifest beside a file (or in a folder) lists."""
    manifest = (file if file.is_dir() else file.parent) / MANIFEST
    listed: dict[str, str] = read_json(manifest)["files"] if manifest.is_file() else {}
    return {name: digest for name, digest in listed.items() if name.endswith(".h5")}


def _planned(folder: Path) -> tuple[StudySpec, Sequence[Step]]:
    stored = StudyPaths(folder).spec
    if not stored.is_file():
        raise InputError(f"{folder}: not a study's folder (no {stored.name})")
    spec = load_spec(stored)
    return spec, plan_study(spec, resolve(spec.model.name))


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path

"""The local engine: runs missing steps one after the other, in this process.

Each step is written into a hidden `.part` folder under a lock and appears, by one rename, when it is whole. A
killed run therefore leaves finished steps and one `.part`, which the next run continues if
that kind of step can, and clears otherwise. Two runs of one study wait for each other step by step and share the work.
"""

import fcntl
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mech.errors import InputError, MechError
from mech.files import fsync, sha256_file, write_json
from study.bench import Bench
from study.finished import damage, missing_steps
from study.kinds import KINDS
from study.paths import MANIFEST, StudyPaths
from study.step import Step

log = logging.getLogger(__name__)

LIBRARIES = (
    "sgtr-mech",
    "torch",
    "transformers",
    "peft",
    "numpy",
    "scipy",
    "scikit-learn",
    "umap-learn",
    "h5py",
)

OnStep = Callable[[Step, str, float], None]
"""Told of each step: the step, `start` or `done` or `kept`, seconds it took."""


class StepFailedError(MechError):
    """A step could not be done; the cause is chained to it."""


def run_steps(steps: Sequence[Step], bench: Bench, on_step: OnStep) -> int:
    """Run every step that is missing, in order, and every one whose damaged output is needed; return how many were run.

    Raises:
        InputError: the damaged output is a service's.
        StepFailedError: a step raised; what was finished before it stays.
    """
    ran, missing = 0, missing_steps(bench.paths, steps)
    for step, wrong in missing.items():
        if wrong:
            _tell_of_damage(bench.paths, step, wrong)
    for step in steps:  # all of them first, so that what is left is known from the beginning
        if step not in missing:
            on_step(step, "kept", 0.0)
    for step in missing:
        with locked(bench.paths.lock(step)):
            if _is_whole(bench.paths, step):  # another run made it while this one waited
                on_step(step, "kept", 0.0)
                continue
            on_step(step, "start", 0.0)
            on_step(step, "done", _run(step, bench))
            ran += 1
    return ran


def _is_whole(paths: StudyPaths, step: Step) -> bool:
    return paths.manifest(step).is_file() and not damage(paths, step)


def _tell_of_damage(paths: StudyPaths, step: Step, wrong: str) -> None:
    """Say what is made again. What a service made cost money, so a person must ask for it."""
    if KINDS[step.kind].remote:
        raise InputError(
            f"{paths.step(step)}: {wrong}: put the file back, or delete the folder to have the service asked again"
        )
    log.warning("%s: %s: this step is run again", paths.step(step), wrong)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; wait for whoever holds it. The system releases it when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another run is working on %s: waiting for it", path.stem)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(step: Step, bench: Bench) -> float:
    part, final = bench.paths.part(step), bench.paths.step(step)
    kind = KINDS[step.kind]
    runner = kind.load()
    start = time.perf_counter()
    try:
        if not kind.resumes:
            shutil.rmtree(part, ignore_errors=True)  # what a killed run left behind
        part.mkdir(parents=True, exist_ok=True)
        runner(step, bench, part)
        seconds = time.perf_counter() - start
        _commit(step, part, final, seconds)
    except InputError as error:
        raise InputError(f"step {step.name}: {error}") from error
    except (MechError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise StepFailedError(f"step {step.name}: {type(error).__name__}: {error}") from error
    finally:
        if not kind.resumes:
            shutil.rmtree(part, ignore_errors=True)
    return seconds


def _commit(step: Step, part: Path, final: Path, seconds: float) -> None:
    """Make a step's folder appear whole: contents to disk, manifest, then one rename."""
    files = sorted(p for p in part.rglob("*") if p.is_file())
    for file in files:
        fsync(file)
    write_json(part / MANIFEST, manifest(step, seconds, {str(f.relative_to(part)): f for f in files}))
    fsync(part)
    if final.exists():  # damaged, or without a manifest, which can only be somebody's hand
        shutil.rmtree(final)
    os.rename(part, final)  # noqa: PTH104  (atomic within one file system)
    fsync(final.parent)


def manifest(step: Step, seconds: float, files: Mapping[str, Path]) -> dict[str, Any]:
    """What is written beside a step's output: what made it, from what, when, with which versions."""
    return {
        "name": step.name,
        "kind": step.kind,
        "key": step.key,
        "version": KINDS[step.kind].version,
        "config": dict(step.config),
        "inputs": {role: {s.name: s.key for s in steps} for role, steps in step.inputs.items()},
        "files": {name: sha256_file(file) for name, file in files.items()},
        "bytes": {name: file.stat().st_size for name, file in files.items()},
        "seconds": round(seconds, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }


@cache
def versions() -> Mapping[str, str]:
    """Of the libraries that results depend on; looked up once, for that reads a file of each."""
    return {name: version(name) for name in LIBRARIES}

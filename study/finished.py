"""Which steps of a study are done. A step is, if its manifest is there and, where something will still read its files, they are unchanged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mech.errors import InputError
from mech.files import read_json, sha256_file
from study.paths import MANIFEST, StudyPaths
from study.step import Step

HASHED = 1 << 24
"""Bytes up to which a file's content is compared; of a larger one (activations have checksums of their own) only the size is."""

SHOWN = ("tables", "figures")
"""Kinds of steps that the report reads."""


def missing_steps(paths: StudyPaths, steps: Sequence[Step]) -> dict[Step, str]:
    """Steps that have to be run, in order, each with what is wrong with its output; an empty text where there is no output yet.

    A damaged output counts only where a step that has to be run, or the report, reads it: activations that were thrown away to save room
    are captured again when something needs them, and not before.

    Args:
        paths: the study's folder.
        steps: its plan, in the order in which it runs.
    """
    found: dict[Step, str] = {}
    read: set[Step] = set()
    for step in reversed(steps):
        if not paths.manifest(step).is_file():
            found[step] = ""
        elif wrong := damage(paths, step, closely=step in read or step.kind in SHOWN):
            found[step] = wrong
        else:
            continue
        read.update(below for role in step.inputs.values() for below in role)
    return {step: found[step] for step in steps if step in found}


def damage(paths: StudyPaths, step: Step, *, closely: bool = True) -> str:
    """What is wrong with the output of a step that has a manifest; empty where nothing is.

    Args:
        paths: the study's folder.
        step: the step.
        closely: compare its files with the manifest too.
    """
    try:
        manifest = read_json(paths.manifest(step))
    except InputError:
        return f"{paths.manifest(step).name} is damaged"
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return f"{paths.manifest(step).name} is damaged"
    sizes = manifest.get("bytes", {})
    problems = (_problem(paths, step, n, d, sizes) for n, d in manifest["files"].items()) if closely else ()
    return next(filter(None, problems), "")


def _problem(paths: StudyPaths, step: Step, name: str, digest: str, sizes: Mapping[str, int]) -> str:
    file = paths.step(step) / name
    if not file.is_file():
        return f"{name} is gone"
    size = file.stat().st_size
    if size != sizes.get(name, size):
        return f"{name} has {size:,} bytes instead of {sizes[name]:,}"
    return f"{name} was altered" if size <= HASHED and sha256_file(file) != digest else ""


def manifest_digests(file: Path) -> dict[str, str]:
    """SHA-256 of an activation file, or by name of a folder's, as the manifest beside it (in the folder) lists them; none without one."""
    manifest = (file if file.is_dir() else file.parent) / MANIFEST
    found = read_json(manifest) if manifest.is_file() else {}
    listed = found.get("files") if isinstance(found, dict) else None
    if not isinstance(listed, dict):
        return {}
    wanted = listed if file.is_dir() else {file.name}
    return {name: str(digest) for name, digest in listed.items() if name.endswith(".h5") and name in wanted}

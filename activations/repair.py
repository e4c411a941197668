"""A folder of shards against its manifest: what is damaged or missing, and taking it away."""

import logging
from pathlib import Path
from typing import Any

from activations.store import ActivationStore, Problem
from mech.errors import FileFormatError, InputError
from mech.files import folder_lock, read_json, sha256_file

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Beside the shards, with the SHA-256 of each: it means that all are there."""


def repair(folder: Path, *, dry_run: bool = False) -> list[Problem]:
    """Find what is damaged or missing in a captured folder, and remove damaged shards, so that capturing again makes just those.

    Args:
        folder: made by `activations.capture_store`.
        dry_run: only say what is wrong.

    Raises:
        InputError: no finished capture is there, or its manifest is none.
    """
    problems = []
    for name, digest in shard_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(Problem(path, "/", "missing"))
        elif sha256_file(path) != digest:
            problems.append(Problem(path, "/", _what_is_wrong(path)))
    if problems and not dry_run:
        with folder_lock(folder):
            for problem in problems:
                problem.file.unlink(missing_ok=True)
            (folder / MANIFEST).unlink()
            log.warning("%s: %d shards removed; capture again to make them anew", folder, len(problems))
    return problems


def shard_manifest(folder: Path) -> dict[str, Any]:
    """What a finished capture's manifest holds; it names files of its own folder alone, for `repair` deletes them.

    Raises:
        InputError: there is none, or it is no manifest of a capture.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no finished capture in shards (no {MANIFEST})")
    found = read_json(path)
    files = found.get("files") if isinstance(found, dict) else None
    named = isinstance(files, dict) and all(
        isinstance(digest, str) and name.endswith(".h5") and Path(name).name == name
        for name, digest in files.items()
    )
    if not named:
        raise InputError(
            f"{path}: no manifest of a capture (files: names of .h5 files beside it, and their SHA-256): delete it and capture again"
        )
    return dict(found)


def _what_is_wrong(path: Path) -> str:
    try:
        with ActivationStore([path]) as store:
            found = store.verify()
    except FileFormatError as error:
        return str(error)
    return found[0].what if found else "not the bytes of the manifest (SHA-256 differs)"

"""Capture into a folder of shards: memory does not grow with the rows, and a killed capture goes on.

Each shard is a file of its own, whole or not there. What is in it depends on its rows alone, not on when or how often the
capture was interrupted. `manifest.json`, with the SHA-256 of every shard, comes last: it means that all are there.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from activations.background import Background
from activations.capture import Reading, capture_into
from activations.repair import MANIFEST, shard_manifest
from activations.stale import sweep_stale
from activations.store import ActivationStore
from activations.store_format import Rows
from activations.store_writer import ShardWriter, WriterOptions
from mech.chat import Encoded
from mech.errors import GuardError, InputError
from mech.files import digest_of, folder_lock, sha256_file, write_json
from mech.models import ChatModel
from mech.sites import n_heads, site_width

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Storing:
    """How a capture is kept; what is left out suits almost everyone."""

    shard_rows: int = 4096
    """Rows a file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision on disk."""
    nan: Literal["raise", "mark"] = "raise"
    """What a value that is not finite does: stop the capture, or be kept and listed."""
    token_budget: int = 1024
    """Tokens a pass."""
    backend: str = "hf"
    """Whose forward pass (`mech.backends`)."""


def capture_store(
    folder: Path,
    model: ChatModel,
    rows: Rows,
    encoded: Sequence[Encoded],
    reading: Reading,
    *,
    metadata: Mapping[str, Any] | None = None,
    storing: Storing = Storing(),
) -> list[Path]:
    """Capture rows into `folder`, shard by shard; shards that are there already are kept.

    Args:
        folder: made where it is missing; one process writes into it at a time.
        model: what reads.
        rows: names, questions and columns of the rows; their tokens must be those of `encoded`. `n_prompt` and `n_response` are added.
        encoded: what is read.
        reading: what to read off it.
        metadata: what else to say in every file; JSON-able.
        storing: how.

    Returns:
        The shards, in order.

    Raises:
        InputError: the folder holds another capture, or `rows` and `encoded` differ; else as `capture` and `ShardWriter`.
    """
    if len(encoded) != len(rows.ids) or any(
        not np.array_equal(t, e.ids) for t, e in zip(rows.tokens, encoded, strict=True)
    ):
        raise InputError(f"{folder}: the rows' tokens are not those that are to be read")
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        sweep_stale(folder)  # also what was left beside the manifest, when all shards were there
        said = {**(metadata or {}), **_made_from(model, rows, encoded, reading, storing)}
        _check_folder(folder, said["capture"])
        shards = list(_shards(folder, len(encoded), storing.shard_rows))
        finished = (folder / MANIFEST).is_file()
        for number, (path, part) in enumerate(shards):
            if not _is_there(path, said["capture"], checked=finished):
                some = _rows_of(rows, encoded, part)
                _capture_shard(
                    path, (number, len(shards)), model, some, encoded[part], reading, said, storing
                )
        if not finished:
            digests = {path.name: sha256_file(path) for path, _ in shards}
            write_json(folder / MANIFEST, {"capture": said["capture"], "files": digests})
    return [path for path, _ in shards]


def _made_from(
    model: ChatModel, rows: Rows, encoded: Sequence[Encoded], reading: Reading, storing: Storing
) -> dict[str, Any]:
    """What determines every number in the files, and a digest of it."""
    facts = {
        "checkpoint": model.checkpoint.to_json(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "reading": {
            **asdict(reading),
            "layers": [int(layer) for layer in reading.layers],
            "notes": sorted(reading.notes),
        },
        "storing": asdict(storing),
        **({"heads": n_heads(model)} if "attn_head_out" in reading.sites else {}),
    }
    spans = [[list(e.ids), e.n_prompt, e.n_response, e.spans] for e in encoded]
    said = [
        list(rows.ids),
        list(rows.questions),
        {k: np.asarray(v).tolist() for k, v in rows.columns.items()},
    ]
    return {**facts, "capture": digest_of([facts, spans, said])}


def _check_folder(folder: Path, capture: str) -> None:
    if (folder / MANIFEST).is_file() and shard_manifest(folder).get("capture") != capture:
        raise InputError(f"{folder}: holds another capture (its {MANIFEST} says so): choose another folder")


def _shards(folder: Path, n_rows: int, size: int) -> Iterator[tuple[Path, slice]]:
    for number, start in enumerate(range(0, n_rows, size)):
        yield folder / f"shard-{number:05d}.h5", slice(start, min(start + size, n_rows))


def _is_there(path: Path, capture: str, *, checked: bool) -> bool:
    """Whether a shard need not be made; one that no manifest vouches for yet is read through, for the manifest will."""
    if not path.is_file():
        return False
    with ActivationStore([path]) as store:
        if store.metadata.get("capture") != capture:
            raise InputError(f"{path}: is part of another capture: choose another folder")
        problems = [] if checked else store.verify()
    if problems:
        log.warning("%s: made anew, for it was damaged", problems[0])
    return not problems


def _rows_of(rows: Rows, encoded: Sequence[Encoded], part: slice) -> Rows:
    """Some of the rows, with whose each of their tokens is."""
    columns = {name: np.asarray(values)[part] for name, values in rows.columns.items()}
    columns["n_prompt"] = np.array([e.n_prompt for e in encoded[part]], dtype=np.int64)
    columns["n_response"] = np.array([e.n_response for e in encoded[part]], dtype=np.int64)
    return Rows(rows.ids[part], rows.questions[part], columns, rows.tokens[part])


def _capture_shard(
    path: Path, number: tuple[int, int], model: ChatModel, rows: Rows, encoded: Sequence[Encoded], reading: Reading,
    metadata: Mapping[str, Any], storing: Storing,
) -> None:  # fmt: skip
    options = WriterOptions(
        nan=storing.nan,
        shard=number,
        widths={site: site_width(model, site) for site in reading.sites if site == "attn_head_out"},
        notes=reading.columns,
    )
    writer = ShardWriter(
        path,
        metadata=metadata,
        rows=rows,
        sites=reading.sites,
        poolings=reading.poolings,
        layers=reading.layers,
        d_model=model.d_model,
        dtype=storing.dtype,
        options=options,
    )
    nonfinite: Literal["raise", "pass"] = "raise" if storing.nan == "raise" else "pass"
    try:
        with writer, Background(writer) as sink:
            capture_into(
                sink, model, encoded, reading,
                nonfinite=nonfinite, token_budget=storing.token_budget, backend=storing.backend,
            )  # fmt: skip
    except GuardError as error:  # which counts the rows that it was given
        raise GuardError(f"{path}, whose row 0 is {rows.ids[0]!r}: {error}") from error

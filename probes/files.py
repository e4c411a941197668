"""Directions in other tools' files, both ways.

| file | whose | what is in it |
|---|---|---|
| `.safetensors` | ours | `probes.direction` |
| `.pt`, a tensor [L + 1, d] | persona_vectors | row l + 1 is block l's output, row 0 the embedding's |
| `.pt`, a dict with `axis` [L, d] | assistant-axis | row l is block l's output |
| `.gguf` | repeng, llama.cpp control vectors | `direction.l` for block l's output; llama.cpp has no layer 0 |

Layers that a file does not have are NaN, so that nothing can be done with them by mistake. A `.pt` is read with
`torch.load(weights_only=True)`: nothing in it is executed.
"""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mech.conventions import from_repeng_layer
from mech.errors import FileFormatError, InputError
from mech.files import atomic_path
from probes.direction import Direction

log = logging.getLogger(__name__)

GGUF_ARCHITECTURE = "controlvector"


def read_direction(path: Path, *, name: str | None = None, n_layers: int | None = None) -> Direction:
    """Read a direction of any of these formats, by the file's ending.

    Args:
        path: the file.
        name: what positive means more of; the file's name when left out (ours says it itself).
        n_layers: the model's; needed for a GGUF file that lacks the last layers, and checked against the others.

    Raises:
        InputError: an ending that is none of these, or another number of layers than `n_layers`.
        FileFormatError: not there, damaged, or of another content than its ending says.
    """
    if path.suffix not in _READERS:
        raise InputError(f"{path}: a direction's file ends in {', '.join(_READERS)}")
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file")
    found = _READERS[path.suffix](path, name or path.stem, n_layers)
    if n_layers is not None and len(found.vectors) != n_layers:
        raise InputError(
            f"{path}: has {len(found.vectors)} layers, the model {n_layers}: it was made on another model"
        )
    return found


def write_direction(direction: Direction, path: Path, *, layout: str = "persona_vectors") -> None:
    """Write a direction in any of these formats, by the file's ending.

    Args:
        direction: what to write.
        path: the file.
        layout: `.pt`: `persona_vectors` (row 0, the embedding's, which a direction here does not have, is NaN) or `assistant_axis`.

    Raises:
        InputError: an ending or layout that is none of these.
    """
    if path.suffix not in _WRITERS:
        raise InputError(f"{path}: a direction's file ends in {', '.join(_WRITERS)}")
    _WRITERS[path.suffix](direction, path, layout)


def _imported(name: str, vectors: Float[np.ndarray, "layers d"], path: Path, kind: str) -> Direction:
    if vectors.ndim != 2 or not len(vectors):
        raise FileFormatError(f"{path}: holds {vectors.shape}, a direction is [layers, d_model]")
    unknown = np.full(len(vectors), np.nan, dtype=np.float32)  # how far to believe it, the file does not say
    return Direction(
        name, vectors.astype(np.float32), unknown, 0, {"imported_from": path.name, "format": kind}
    )


def _read_native(path: Path, _name: str, _layers: int | None) -> Direction:
    return Direction.load(path)


def _read_pt(path: Path, name: str, _layers: int | None) -> Direction:
    import torch

    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise FileFormatError(
            f"{path}: holds more than tensors, or is damaged; nothing in it was executed"
        ) from error
    if isinstance(held, dict) and isinstance(held.get("axis"), torch.Tensor):
        return _imported(name, held["axis"].float().numpy(), path, "assistant-axis")
    if not isinstance(held, torch.Tensor) or held.ndim != 2:
        raise FileFormatError(f"{path}: neither a tensor [layers + 1, d_model] nor a dict with `axis`")
    return _imported(name, held[1:].float().numpy(), path, "persona_vectors")


def _read_gguf(path: Path, name: str, n_layers: int | None) -> Direction:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.get_field("general.architecture")
        kind = bytes(architecture.parts[-1]).decode() if architecture else ""
        found = {t.name: np.array(t.data) for t in reader.tensors if t.name.startswith("direction.")}
        layers = {int(key.split(".")[1]): v for key, v in found.items()}
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise FileFormatError(f"{path}: cannot be read as GGUF ({error})") from error
    if kind != GGUF_ARCHITECTURE or not layers:
        raise FileFormatError(f"{path}: is no control vector (its architecture is {kind!r})")
    count = n_layers or max(layers) + 1
    vectors = np.full((count, len(next(iter(layers.values())))), np.nan, dtype=np.float32)
    for layer, vector in layers.items():
        vectors[from_repeng_layer(layer, count)] = vector
    if missing := np.flatnonzero(np.isnan(vectors).all(1)).tolist():
        log.warning("%s: has no layers %s; they are NaN here", path, missing)
    return _imported(name, vectors, path, "control vector (GGUF)")


def _write_native(direction: Direction, path: Path, _layout: str) -> None:
    direction.save(path)


def _write_pt(direction: Direction, path: Path, layout: str) -> None:
    import torch

    vectors = torch.from_numpy(np.ascontiguousarray(direction.vectors))
    if layout == "assistant_axis":
        held: Any = {"axis": vectors, "metadata": {"name": direction.name}}
    elif layout == "persona_vectors":
        held = torch.cat([torch.full_like(vectors[:1], torch.nan), vectors])
    else:
        raise InputError(f"layout {layout!r}: there are persona_vectors and assistant_axis")
    with atomic_path(path) as temporary:
        torch.save(held, temporary)


def _write_gguf(direction: Direction, path: Path, _layout: str) -> None:
    import gguf

    log.warning("%s: llama.cpp's control vectors have no layer 0: it is left out", path)
    checkpoint = dict(direction.made_from.get("checkpoint") or {})
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), GGUF_ARCHITECTURE)
        writer.add_string(f"{GGUF_ARCHITECTURE}.model_hint", str(checkpoint.get("base", "")))
        writer.add_uint32(f"{GGUF_ARCHITECTURE}.layer_count", len(direction.vectors) - 1)
        for layer in range(1, len(direction.vectors)):
            writer.add_tensor(
                f"direction.{layer}", np.ascontiguousarray(direction.vectors[layer], dtype=np.float32)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


_READERS: dict[str, Callable[[Path, str, int | None], Direction]] = {
    ".safetensors": _read_native,
    ".pt": _read_pt,
    ".gguf": _read_gguf,
}
_WRITERS: dict[str, Callable[[Direction, Path, str], None]] = {
    ".safetensors": _write_native,
    ".pt": _write_pt,
    ".gguf": _write_gguf,
}

"""Other people's direction files: persona_vectors and assistant-axis `.pt`, and control vectors in GGUF.

Each says differently which row belongs to which block, so each is converted at this border (`mech.conventions`):

| format | what stands in the file | rows |
|---|---|---|
| `safetensors` | ours (`Direction.save`) | row l is block l's output |
| `persona_vectors` | a tensor [L + 1, d] | row 0 is the embedding, row l + 1 is block l's output; row L is taken after the final norm |
| `assistant_axis` | a tensor [L, d], or a dict with one at `axis` | row l is block l's output |
| `gguf` | repeng's and llama.cpp's control vector: tensors `direction.N` [d] | N is block N's output; there is no N = 0 |

A `.pt` file is a pickle. Only tensors and plain containers are taken from it (`weights_only`): nothing in it is run.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mech.errors import FileFormatError, InputError
from mech.files import atomic_path, sha256_file
from mech.layer_numbers import to_hidden_states_index
from probes.direction import Direction

log = logging.getLogger(__name__)

FORMATS = ("safetensors", "persona_vectors", "assistant_axis", "gguf")

Vectors = Float[np.ndarray, "layers d"]

_ARCHITECTURE = "controlvector"
_SUFFIXES: Mapping[str, str] = {".safetensors": "safetensors", ".gguf": "gguf"}


def read_direction(
    path: Path, *, whose: str | None = None, name: str | None = None, n_layers: int | None = None
) -> Direction:
    """A direction from a file of any known format.

    Imported vectors keep their norms; how far to believe them is not known (`split_half` is NaN, `n_pairs` 0).

    Args:
        path: the file.
        whose: its format; told from the suffix when left out, and for `.pt` from what stands in it: a dict with `axis` is
            an assistant axis, a bare tensor is persona_vectors' (said in the log, as a bare axis would be one row off).
        name: of the direction; the file's own, or its stem, when left out.
        n_layers: blocks of the model; otherwise taken from the file (a control vector tells only its last layer).

    Raises:
        FileFormatError: not there, damaged, not of this format, or a pickle of more than tensors.
        InputError: an unknown format, or not as many layers as asked for.
    """
    chosen = whose or _format_of(path)
    if chosen not in _READERS:
        raise InputError(f"{path}: unknown format {chosen!r}; there are {', '.join(FORMATS)}")
    if not path.is_file():
        raise FileFormatError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if chosen == "safetensors":
        direction = Direction.load(path)
    else:
        vectors, found = _READERS[chosen](path, n_layers, whose is not None)
        direction = _imported(path, vectors, found, name)
    if n_layers is not None and len(direction.vectors) != n_layers:
        raise InputError(
            f"{path}: {len(direction.vectors)} layers, asked for {n_layers}: is it another model's, or of another format?"
        )
    return direction


def write_direction(direction: Direction, path: Path, *, whose: str | None = None) -> None:
    """Write a direction in any known format, whole or not at all.

    What a format has no room for is left out, with a warning: the embedding's row of persona_vectors is zero, a control vector
    has no layer 0, and only ours keeps the metadata.

    Raises:
        InputError: an unknown format, or `.pt` without `whose`.
    """
    chosen = whose or _SUFFIXES.get(path.suffix)
    if chosen not in _WRITERS:
        raise InputError(
            f"{path}: which format? Name one of {', '.join(FORMATS)} (a .pt file may be persona_vectors or assistant_axis)"
        )
    with atomic_path(path) as temporary:
        _WRITERS[chosen](direction, temporary)


def _format_of(path: Path) -> str:
    return _SUFFIXES.get(path.suffix, "persona_vectors")


def _imported(path: Path, vectors: Vectors, found: Mapping[str, Any], name: str | None) -> Direction:
    if vectors.ndim != 2 or not vectors.size:
        raise FileFormatError(f"{path}: has shape {vectors.shape}, a direction is [layers, d]")
    if not np.isfinite(vectors).all():
        raise FileFormatError(f"{path}: holds NaN or infinity")
    facts = {**found, "imported": {"file": path.name, "sha256": sha256_file(path)}}
    unknown = np.full(len(vectors), np.nan, dtype=np.float32)
    return Direction(name or facts.pop("name", "") or path.stem, vectors, unknown, 0, facts)


# -- .pt ----------------------------------------------------------------------------------------------------


def _load_pt(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (a damaged or hostile pickle can raise anything; none of it was run)
        raise FileFormatError(
            f"{path}: refused: not a PyTorch file of tensors alone ({type(error).__name__}); nothing in it was run"
        ) from None


def _tensor(path: Path, value: Any) -> Vectors:
    import torch

    if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
        shape = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise FileFormatError(f"{path}: expected one tensor [layers, d] of floats, found {shape}")
    array: np.ndarray = value.detach().float().contiguous().numpy()
    return array


def _read_persona_vectors(path: Path, n_layers: int | None, told: bool) -> tuple[Vectors, dict[str, Any]]:  # noqa: FBT001
    value = _load_pt(path)
    if isinstance(value, dict) and "axis" in value and not told:
        return _axis(path, value)
    rows = _tensor(path, value)
    if len(rows) < 2:
        raise FileFormatError(
            f"{path}: {len(rows)} rows; the first is the embedding's, so there are two or more"
        )
    if not told:
        log.info(
            "%s: read as persona_vectors' (row 0 is the embedding); an axis without one is assistant_axis",
            path,
        )
    log.warning(
        "%s: its last row is of Hugging Face's last hidden state, which is after the final norm: no direction of the last block's output",
        path,
    )
    return rows[to_hidden_states_index(0) :].copy(), {
        "format": "persona_vectors",
        "left_out": "embedding row",
        "last_layer": "after the final norm",
    }


def _read_assistant_axis(path: Path, _n: int | None, _told: bool) -> tuple[Vectors, dict[str, Any]]:  # noqa: FBT001
    return _axis(path, _load_pt(path))


def _axis(path: Path, value: Any) -> tuple[Vectors, dict[str, Any]]:
    facts: dict[str, Any] = {"format": "assistant_axis"}
    if isinstance(value, dict):
        facts |= {k: v for k, v in value.items() if k in ("n_default", "n_roles") and isinstance(v, int)}
        if "axis" not in value:
            raise FileFormatError(
                f"{path}: a dict without `axis` (it has {', '.join(map(str, value))[:200]})"
            )
        value = value["axis"]
    return _tensor(path, value), facts


def _write_persona_vectors(direction: Direction, path: Path) -> None:
    log.warning(
        "direction %s: its file gets a zero row 0, since ours have none for the embedding", direction.name
    )
    _save_pt(np.concatenate([np.zeros_like(direction.vectors[:1]), direction.vectors]), path)


def _write_assistant_axis(direction: Direction, path: Path) -> None:
    _save_pt(direction.vectors, path, key="axis")


def _save_pt(rows: Vectors, path: Path, key: str | None = None) -> None:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).clone()
    torch.save(tensor if key is None else {key: tensor}, path)


# -- GGUF ---------------------------------------------------------------------------------------------------


def _read_gguf(path: Path, n_layers: int | None, _told: bool) -> tuple[Vectors, dict[str, Any]]:  # noqa: FBT001
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {key: _field(reader, key) for key in ("general.architecture", "general.name",
                                                       "controlvector.model_hint", "controlvector.made_from")}  # fmt: skip
        rows = {t.name: (t.tensor_type.name, np.array(t.data)) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError, TypeError) as error:
        raise FileFormatError(f"{path}: cannot be read as GGUF ({type(error).__name__}: {error})") from error
    if fields["general.architecture"] != _ARCHITECTURE:
        raise FileFormatError(
            f"{path}: holds a {fields['general.architecture'] or 'nothing'}, no control vector"
        )
    vectors = _by_layer(path, rows, n_layers)
    facts: dict[str, Any] = {
        "format": "gguf",
        "name": fields["general.name"],
        "model_hint": fields["controlvector.model_hint"],
    }
    return vectors, facts | _made_from(path, fields["controlvector.made_from"])


def _by_layer(path: Path, rows: Mapping[str, tuple[str, np.ndarray]], n_layers: int | None) -> Vectors:
    found: dict[int, np.ndarray] = {}
    for name, (kind, data) in rows.items():
        match = re.fullmatch(r"direction\.(\d+)", name)
        if not match or kind not in ("F32", "F16") or data.ndim != 1:
            raise FileFormatError(
                f"{path}: {name} is {kind} of shape {data.shape}; expected direction.N, F32, [d]"
            )
        found[int(match[1])] = data.astype(np.float32)
    if not found or len({len(v) for v in found.values()}) > 1:
        raise FileFormatError(f"{path}: no direction.N, or of several widths")
    last = max(found) + 1
    if last > (n_layers or 4096):
        raise InputError(
            f"{path}: direction.{last - 1}, but the model has {n_layers or 'at most 4096'} layers"
        )
    vectors = np.zeros((n_layers or last, len(found[last - 1])), dtype=np.float32)
    for layer, row in found.items():
        vectors[layer] = row
    if absent := [layer for layer in range(len(vectors)) if layer not in found]:
        log.warning("%s: no vector for layer %s: zero there", path, ", ".join(map(str, absent)))
    return vectors


def _field(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _made_from(path: Path, text: str) -> dict[str, Any]:
    """What our own export says of the direction's origin."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{path}: controlvector.made_from is not JSON ({error.msg})") from error
    return {k: v for k, v in value.items() if k != "imported"} if isinstance(value, dict) else {}


def _write_gguf(direction: Direction, path: Path) -> None:
    from gguf import GGUFWriter

    log.warning("direction %s: layer 0 is left out, since control vectors have none", direction.name)
    writer = GGUFWriter(path, _ARCHITECTURE)
    writer.add_name(direction.name)
    # repeng refuses a file without a hint, and an empty one is not written.
    writer.add_string("controlvector.model_hint", str(direction.made_from.get("model_hint") or "unknown"))
    writer.add_string("controlvector.made_from", json.dumps(dict(direction.made_from), sort_keys=True))
    writer.add_uint32("controlvector.layer_count", len(direction.vectors) - 1)
    for layer in range(1, len(direction.vectors)):
        writer.add_tensor(
            f"direction.{layer}", np.ascontiguousarray(direction.vectors[layer], dtype=np.float32)
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


_READERS: Mapping[str, Any] = {
    "safetensors": Direction.load,
    "persona_vectors": _read_persona_vectors,
    "assistant_axis": _read_assistant_axis,
    "gguf": _read_gguf,
}
_WRITERS: Mapping[str | None, Any] = {
    "safetensors": Direction.save,
    "persona_vectors": _write_persona_vectors,
    "assistant_axis": _write_assistant_axis,
    "gguf": _write_gguf,
}

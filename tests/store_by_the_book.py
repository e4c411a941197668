"""A writer and a reader of activation files made from docs/activation-format.md alone: h5py and numpy, nothing of ours."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

BOUNDS = ("v110", "v110")
Place = tuple[str, str, int]


def texts(values: Sequence[str]) -> np.ndarray:
    encoded = [v.encode() for v in values]
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(1, *map(len, encoded))))


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; of finite numbers."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def chunk(n: int, width: int, size: int) -> tuple[int, int]:
    return min(n, 128 if 128 * width * size <= 1 << 20 else 64), width


def write(
    path: Path,
    *,
    tokens: Sequence[np.ndarray],
    data: Mapping[Place, np.ndarray],
    d_model: int,
    columns: Mapping[str, np.ndarray] | None = None,
    dtype: str = "float32",
    widths: Mapping[str, int] | None = None,
    shard: tuple[int, int] = (0, 0),
    version: str = "1.1",
    bounds: tuple[str, str] = BOUNDS,
    prefix: str = "r",
    nonfinite: Mapping[Place, Sequence[int]] | None = None,
) -> None:
    sites, poolings, layers = (sorted({place[i] for place in data}) for i in range(3))
    with h5py.File(path, "w", libver=bounds) as file:

        def put(name: str, values: np.ndarray) -> None:
            checked = {"chunks": values.shape, "fletcher32": True} if values.size else {}
            file.create_dataset(name, data=values, dtype=values.dtype, **checked)

        for name, text in {
            "encoding-type": "sgtr-mech-activations",
            "encoding-version": version,
            "logical_dtype": dtype,
        }.items():
            file.attrs[name] = texts([text])[0]
        numbers = {
            "n_rows": len(tokens),
            "d_model": d_model,
            "layers": layers,
            "shard": shard,
            "widths": [(widths or {}).get(s, d_model) for s in sites],
        }
        for name, value in numbers.items():
            if name != "widths" or version != "1.0":
                file.attrs[name] = np.array(value, dtype="<i8")
        file.attrs["sites"], file.attrs["poolings"] = texts(sites), texts(poolings)
        said = json.dumps({"layer_convention": "layer l is the output of block l, from 0"}).encode()
        put("metadata", np.frombuffer(said, dtype=np.uint8))
        put("rows/id", texts([f"{prefix}{i}-ø" for i in range(len(tokens))]))
        put("rows/question", texts([f"q{i // 2}" for i in range(len(tokens))]))
        file.create_group("rows/columns")
        for name, values in (columns or {}).items():
            put(f"rows/columns/{name}", values)
        put("rows/tokens", np.concatenate(tokens).astype("<i8"))
        put("rows/offsets", np.cumsum([0, *map(len, tokens)]).astype("<i8"))
        for (site, pooling, layer), values in data.items():
            stored = values.astype("<f4") if dtype == "float32" else to_bfloat16(values)
            made = file.create_dataset(
                f"activations/{site}/{pooling}/{layer}", data=stored, dtype=stored.dtype, fletcher32=True,
                chunks=chunk(*stored.shape, stored.itemsize),
            )  # fmt: skip
            made.attrs["logical_dtype"] = texts([dtype])[0]
        file.create_group("nonfinite")
        for (site, pooling, layer), rows in (nonfinite or {}).items():
            put(f"nonfinite/{site}/{pooling}/{layer}", np.array(rows, dtype="<i8"))


def read(path: Path) -> dict[str, Any]:
    """Everything in a file, each rule of the specification asserted on the way."""
    with h5py.File(path, "r") as file:
        said = dict(file.attrs)
        assert said["encoding-type"] == b"sgtr-mech-activations"
        assert said["encoding-version"] == b"1.1"
        assert file.id.get_create_plist().get_version()[0] == 3
        names = {name: [text.decode() for text in said[name]] for name in ("sites", "poolings")}
        widths = dict(zip(names["sites"], said["widths"].tolist(), strict=True))
        layers, dtype = said["layers"].tolist(), said["logical_dtype"].decode()
        assert layers == sorted(set(layers))
        metadata = json.loads(file["metadata"][()].tobytes().decode())
        assert "layer_convention" in metadata
        assert file["rows/id"].dtype.kind == file["rows/question"].dtype.kind == "S"
        flat, offsets = file["rows/tokens"][()], file["rows/offsets"][()]
        assert flat.dtype == offsets.dtype == np.dtype("<i8")
        assert len(offsets) == said["n_rows"] + 1
        data = {}
        for site in names["sites"]:
            for pooling in names["poolings"]:
                assert [int(x) for x in sorted(file["activations"][site][pooling], key=int)] == layers
                for layer in layers:
                    found = file["activations"][site][pooling][str(layer)]
                    n = len(flat) if pooling == "tokens" else int(said["n_rows"])
                    assert found.shape == (n, widths[site])
                    assert found.dtype == {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}[dtype]
                    assert found.attrs["logical_dtype"].decode() == dtype
                    assert found.chunks == chunk(*found.shape, found.dtype.itemsize)
                    made = found.id.get_create_plist()
                    assert [made.get_filter(i)[0] for i in range(made.get_nfilters())] == [
                        h5py.h5z.FILTER_FLETCHER32
                    ]
                    bits = found[()]
                    data[site, pooling, layer] = (
                        bits if dtype == "float32" else (bits.astype(np.uint32) << 16).view(np.float32)
                    )
        marked: dict[Place, list[int]] = {}
        for place, values in data.items():
            group = file["nonfinite"]
            for part in map(str, place):
                group = group[part] if group is not None and part in list(group) else None
            marked[place] = [] if group is None else group[()].tolist()
            assert marked[place] == np.flatnonzero(~np.isfinite(values).all(1)).tolist()
        return {
            "ids": [b.decode() for b in file["rows/id"][()]],
            "questions": [b.decode() for b in file["rows/question"][()]],
            "tokens": [flat[a:b] for a, b in pairwise(offsets)],
            "columns": {name: file["rows/columns"][name][()] for name in file["rows/columns"]},
            "metadata": metadata,
            "data": data,
            "marked": marked,
            "d_model": int(said["d_model"]),
        }

"""Several activation files read as one, and which of their rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from activations.store_format import Header, Rows
from activations.store_shard import Shard
from mech.errors import FileFormatError, InputError


def check_belong_together(shards: Sequence[Shard], *, whole: bool) -> None:
    """Refuse files that are not one store.

    Args:
        shards: the files, in order.
        whole: also refuse when a numbered shard is missing.

    Raises:
        FileFormatError: two files disagree, or a shard is missing; the message names both, or its number.
    """
    first = shards[0]
    for other in shards[1:]:
        shape, making = _differences(first.header, other.header)
        if shape:
            raise FileFormatError(
                f"{other.path}: other sites, poolings, layers or width than {first.path} ({', '.join(shape)}): not one "
                "store; keep them in folders of their own"
            )
        if making:
            raise FileFormatError(
                f"{other.path}: /metadata: differs from {first.path} in {', '.join(making)}: not one store; keep them in "
                "folders of their own, or name in metadata['per_shard'] what may differ"
            )
    numbers = [shard.header.shard for shard in shards]
    if not whole or not any(numbers):
        return
    folder = first.path.parent
    counts = {number[1] for number in numbers if number}
    found = [number[0] for number in numbers if number]
    if None in numbers or len(counts) > 1 or len(set(found)) < len(found):
        named = ", ".join(f"{s.path.name}: {s.header.shard or 'unnumbered'}" for s in shards)
        raise FileFormatError(f"{folder}: the shards' numbers do not fit each other ({named})")
    if missing := sorted(set(range(counts.pop())) - set(found)):
        raise FileFormatError(f"{folder}: shards {missing} of this store are missing: capture them again")
    if found != sorted(found):
        named = ", ".join(f"{s.path.name}: {s.header.shard}" for s in shards)
        raise FileFormatError(
            f"{folder}: the files' names and their numbers are in different orders ({named})"
        )


def _differences(a: Header, b: Header) -> tuple[list[str], list[str]]:
    """In what two files differ: what they hold, and what made them."""
    fields = ("d_model", "sites", "poolings", "layers", "logical_dtype", "widths")
    own = a.own_metadata_keys | b.own_metadata_keys
    keys = sorted((a.metadata.keys() | b.metadata.keys()) - own)
    return (
        [f"{f} {getattr(a, f)} and {getattr(b, f)}" for f in fields if getattr(a, f) != getattr(b, f)],
        [f"metadata[{k!r}]" for k in keys if a.metadata.get(k) != b.metadata.get(k)],
    )


def agreeing_metadata(shards: Sequence[Shard]) -> dict[str, Any]:
    """A file's metadata; of several files, without the entries that may differ between them."""
    first = shards[0].header
    own = set() if len(shards) == 1 else set().union(*(s.header.own_metadata_keys for s in shards))
    return {k: v for k, v in first.metadata.items() if k not in own}


def join_rows(shards: Sequence[Shard]) -> Rows:
    """The rows of all files, in order.

    Raises:
        FileFormatError: the files have other columns, or two rows of one id.
    """
    parts = [shard.rows for shard in shards]
    kinds = {name: (values.dtype, values.shape[1:]) for name, values in parts[0].columns.items()}
    seen: dict[str, Shard] = {}
    for shard, part in zip(shards, parts, strict=True):
        if {name: (values.dtype, values.shape[1:]) for name, values in part.columns.items()} != kinds:
            raise FileFormatError(
                f"{shard.path}: /rows/columns: {sorted(part.columns)}, while {shards[0].path} has {sorted(kinds)} "
                "(or of other types): not one store"
            )
        if twice := next((i for i in part.ids if i in seen), None):
            raise FileFormatError(f"{shard.path}: /rows/id: row {twice!r} is also in {seen[twice].path}")
        seen.update(dict.fromkeys(part.ids, shard))
    return Rows(
        ids=[i for p in parts for i in p.ids],
        questions=[q for p in parts for q in p.questions],
        columns={name: np.concatenate([p.columns[name] for p in parts]) for name in kinds},
        tokens=[t for p in parts for t in p.tokens],
    )


def row_indices(rows: slice | np.ndarray | Sequence[int] | None, n_rows: int) -> Int[np.ndarray, " n"]:
    """Indices of chosen rows, in the caller's order.

    Raises:
        InputError: a mask of another length, an index out of range, or one that is no integer.
    """
    if rows is None or isinstance(rows, slice):
        return np.arange(*(rows or slice(None)).indices(n_rows), dtype=np.int64)
    return _checked_rows(np.asarray(rows), n_rows).astype(np.int64)


def _checked_rows(chosen: np.ndarray, n_rows: int) -> np.ndarray:
    """Indices that are in range; a mask becomes the indices of what is true."""
    if chosen.ndim != 1:
        raise InputError(
            f"rows: one list of indices or a mask is needed, not an array of shape {chosen.shape}"
        )
    if chosen.dtype == bool:
        if len(chosen) != n_rows:
            raise InputError(f"a mask of {len(chosen)} entries for {n_rows} rows")
        return np.flatnonzero(chosen)
    if not chosen.size:
        return np.zeros(0, dtype=np.int64)
    if chosen.dtype.kind not in "iu":
        raise InputError(f"rows: indices must be integers or a boolean mask, not {chosen.dtype}")
    outside = chosen[(chosen < 0) | (chosen >= n_rows)]
    if len(outside):
        raise InputError(f"row {outside[0]} is out of range: the store has rows 0 to {n_rows - 1}")
    return chosen


def row_mask(rows: Rows, where: Any) -> Bool[np.ndarray, " n"]:
    """Which rows satisfy a condition: a function of the rows' table, or values by column.

    Raises:
        InputError: a column that is not there or holds several numbers a row, or a function that gives no mask.
    """
    if isinstance(where, Mapping):
        mask = np.ones(len(rows.ids), dtype=bool)
        for name, value in where.items():
            wanted = list(value) if isinstance(value, (list, tuple, set, frozenset, np.ndarray)) else [value]
            mask &= np.isin(_column(rows, name), wanted)
        return mask
    if not callable(where):
        raise InputError(
            "where: a function of the rows, or values by column, is needed; give a mask or indices as rows"
        )
    mask = np.asarray(where(rows))
    if mask.dtype != bool or mask.shape != (len(rows.ids),):
        raise InputError(
            f"where: a boolean mask of {len(rows.ids)} rows is needed, not {mask.dtype} {mask.shape}"
        )
    return mask


def _column(rows: Rows, name: str) -> np.ndarray:
    table = {**rows.columns, "id": rows.ids, "question": rows.questions}
    if name not in table:
        raise InputError(f"where: no column {name!r}; there are {', '.join(sorted(table))}")
    column = np.asarray(table[name])
    if column.ndim > 1:
        raise InputError(
            f"where: column {name} holds {column.shape[1]} numbers a row: give a function of the rows"
        )
    return column

"""Small activation files for the tests of the store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activations.pooling import TOKENS
from activations.store import Rows, ShardWriter, WriterOptions

SITE, D = "resid_post", 8


def make_rows(n: int, prefix: str = "r") -> Rows:
    """Rows of 1 to 4 tokens, with one column of each kind."""
    return Rows(
        ids=[f"{prefix}{i}-é" for i in range(n)],
        questions=[f"q{i % 3}" for i in range(n)],
        columns={
            "sign": np.where(np.arange(n) % 2, 1, -1),
            "surprisal": np.where(np.arange(n) % 5, np.arange(n) / 7, np.nan),
            "kept": np.arange(n) % 4 == 0,
        },
        tokens=[np.arange(1 + i % 4) + 10 * i for i in range(n)],
    )


def make_values(
    rows: Rows, poolings: Sequence[str], layers: Sequence[int], d: int = D, seed: int = 0
) -> dict[tuple[str, int], np.ndarray]:
    """What to write, by pooling and layer."""
    rng = np.random.default_rng(seed)
    length = {p: int(rows.n_tokens.sum()) if p == TOKENS else len(rows.ids) for p in poolings}
    return {
        (p, layer): rng.standard_normal((length[p], d)).astype(np.float32)
        for p in poolings
        for layer in layers
    }


def write_file(
    path: Path,
    rows: Rows,
    values: dict[tuple[str, int], np.ndarray],
    *,
    batches: Sequence[np.ndarray] | None = None,
    options: WriterOptions | None = None,
    **kwargs: Any,
) -> None:
    """Write a file, in the given batches of rows."""
    kwargs = {"metadata": {"checkpoint": "m", "per_shard": ["sets"], "sets": [path.name]}, **kwargs}
    stops = np.cumsum(rows.n_tokens)
    with ShardWriter(
        path,
        rows=rows,
        sites=[SITE],
        poolings=sorted({p for p, _ in values}),
        layers=sorted({layer for _, layer in values}),
        d_model=next(iter(values.values())).shape[1],
        options=options or WriterOptions(),
        **kwargs,
    ) as writer:
        for batch in [np.arange(len(rows.ids))] if batches is None else batches:
            tokens = [np.arange(stops[r] - rows.n_tokens[r], stops[r]) for r in batch]
            for (pooling, layer), array in values.items():
                at = np.concatenate(tokens) if pooling == TOKENS else batch
                writer.write(SITE, pooling, layer, batch, array[at])


def scattered(n: int, seed: int = 1, size: int = 7) -> list[np.ndarray]:
    """All rows once, in a random order, in small batches."""
    order = np.random.default_rng(seed).permutation(n)
    return [order[i : i + size] for i in range(0, n, size)]

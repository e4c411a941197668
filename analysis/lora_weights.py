"""LoRA in weight space: does what an adapter writes point along given directions, and do two stages write the same?

Only maps that write into the residual stream are asked (attention's and the MLP's output maps). With r columns in d dimensions a
random direction has an expected share of r/d of its energy in their span: numbers are read against that null and its draws.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mech.adapters import Update, orthonormal
from mech.errors import InputError
from probes.direction import Direction
from probes.nulls import isotropic_directions


def alignment(
    updates: Sequence[Update],
    directions: Sequence[Direction],
    *,
    rng: np.random.Generator,
    n_null: int = 1000,
) -> pd.DataFrame:
    """How much of each direction lies in what each update can write, one row an update and direction.

    `energy` is ‖Pv̂‖² with P the projection on the update's output space; `expected` is r/d, `p_random` the share of random
    directions with at least that energy. `cosine` is the signed cosine with the update's first left singular vector (its sign is
    arbitrary, so read |cosine|), `gain` is ‖v̂ᵀΔW‖ over ΔW's largest singular value.

    Raises:
        InputError: an update that is no writer into the directions' stream.
    """
    rows = []
    for u in updates:
        left, sizes = _left_singular(u)
        drawn = isotropic_directions(n_null, u.left.shape[0], rng)
        null = ((drawn @ left) ** 2).sum(1)
        for d in directions:
            if d.vectors.shape[1] != u.left.shape[0]:
                raise InputError(
                    f"{u.name}: writes {u.left.shape[0]} numbers, {d.name} has {d.vectors.shape[1]}"
                )
            inside = d.unit_at(u.layer) @ left
            energy = float((inside**2).sum())
            rows.append({
                "direction": d.name, "layer": u.layer, "map": u.name, "rank": len(sizes), "energy": energy,
                "expected": len(sizes) / u.left.shape[0], "p_random": float((1 + (null >= energy).sum()) / (1 + n_null)),
                "cosine": float(inside[0]) if len(inside) else 0.0,
                "gain": float(np.sqrt(((inside * sizes) ** 2).sum()) / sizes[0]) if len(sizes) else 0.0,
            })  # fmt: skip
    return pd.DataFrame(rows)


def overlap(
    one: Sequence[Update], other: Sequence[Update], *, rng: np.random.Generator, n_null: int = 200
) -> pd.DataFrame:
    """Principal angles between what two adapters write, map by map.

    `shared` is the mean squared cosine of the principal angles (1: the same space), `expected` its value for a random space,
    max(r, r')/d, `first_cosine` the largest cosine; `p_random` from random spaces of the second's rank.

    Raises:
        InputError: no map in common.
    """
    theirs = {(u.layer, u.name): u for u in other}
    pairs = [(u, theirs[u.layer, u.name]) for u in one if (u.layer, u.name) in theirs]
    if not pairs:
        raise InputError("the two adapters change no map in common")
    rows = []
    for a, b in pairs:
        left, right = (orthonormal(u.left).numpy() for u in (a, b))
        cosines = _principal_cosines(left, right)
        drawn = [np.linalg.qr(rng.standard_normal(right.shape))[0] for _ in range(n_null)]
        null = np.array([(_principal_cosines(left, q) ** 2).mean() for q in drawn])
        shared = float((cosines**2).mean())
        rows.append({
            "layer": a.layer, "map": a.name, "shared": shared, "first_cosine": float(cosines[0]),
            "expected": max(left.shape[1], right.shape[1]) / len(left),
            "p_random": float((1 + (null >= shared).sum()) / (1 + n_null)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _principal_cosines(a: Float[np.ndarray, "d r"], b: Float[np.ndarray, "d q"]) -> Float[np.ndarray, " k"]:
    found: np.ndarray = np.linalg.svd(a.T @ b, compute_uv=False).clip(0, 1)
    return found


def _left_singular(update: Update) -> tuple[Float[Any, "d r"], Float[Any, " r"]]:
    """Left singular vectors and values of left @ right, from QR of the thin factors."""
    q, upper = torch.linalg.qr(update.left.double())
    _, lower = torch.linalg.qr(update.right.double().T)
    inner, sizes, _ = torch.linalg.svd(upper @ lower.T)
    kept = sizes > 1e-9 * sizes.max().clamp_min(1e-300)
    return (q @ inner[:, kept]).numpy(), sizes[kept].numpy()

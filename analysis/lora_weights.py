"""LoRA in weight space: does what an adapter writes point along given directions, and do two trainings write the same?

Only maps that write into the residual stream count (attention's and the MLP's output maps). With rank r in d dimensions a random
direction has an expected share of r/d of its energy in what a map can write, distributed as Beta(r/2, (d − r)/2): for one map that null is exact.
A mean over maps has no such closed form, since an adapter's maps write much the same and a direction hardly turns from layer to layer: there
each drawn direction is one vector for all maps. Directions with the covariance of the base's activations are the harder null. Weights are what they are, so there are no intervals over
questions: a direction's own doubt is its split-half cosine, a training's the other seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats

from mech.adapters import Update
from mech.errors import InputError
from probes.direction import Direction
from probes.nulls import covariance_matched_directions, isotropic_directions, upper_p

Samples = Float[np.ndarray, "m layers d"]


@dataclass(frozen=True)
class Compared:
    """The same comparison map by map and over all maps."""

    by_map: pd.DataFrame
    """One row a map (and direction)."""
    overall: pd.DataFrame
    """Means over all maps (one row a direction), each against the same mean of what was drawn."""


def alignment(
    updates: Sequence[Update],
    directions: Sequence[Direction],
    *,
    samples: Samples,
    rng: np.random.Generator,
    n_null: int = 1000,
) -> Compared:
    """How much of each direction lies in what each update can write.

    `energy` is ‖Pv̂‖² with P the projection on the update's output space; `expected` is r/d, `p_random` the share of random
    directions with at least that energy (exact), `p_covariance` that of directions with the samples' covariance, `null_covariance_high`
    their 97.5 % quantile. `cosine` is the signed cosine with the update's first left singular vector (its sign is arbitrary, so read
    |cosine|), `gain` is ‖v̂ᵀΔW‖ over ΔW's largest singular value. `overall` means the energies over maps; its `p_random` holds them against
    random directions that are the same vector in all layers, which is cautious where the directions turn from layer to layer.

    Args:
        updates: of maps that write into the stream; those that write nothing (ΔW = 0) are left out.
        directions: what they are held against.
        samples: the base's activations, whose covariance directions are drawn from.
        rng: draws them; one set of coefficients serves all layers, so that layers hang together as they do in the samples.
        n_null: how many.

    Raises:
        InputError: no update that writes anything, or one that is no writer into the directions' stream.
    """
    parts = [(u, *_left_singular(u)) for u in updates]
    parts = [part for part in parts if len(part[2])]
    if not parts:
        raise InputError("no update writes anything into the residual stream")
    rows, drawn = [], {"random": np.zeros(n_null), "covariance": np.zeros(n_null)}
    seed, now, matched = int(rng.integers(2**32)), -1, np.empty(0)
    random = isotropic_directions(n_null, samples.shape[2], rng)
    for u, left, sizes in parts:
        _check_width(u, directions, samples)
        if u.layer != now:
            matched, now = (
                covariance_matched_directions(
                    samples[:, u.layer].astype(np.float64), n_null, np.random.default_rng(seed)
                ),
                u.layer,
            )
        null = ((matched @ left) ** 2).sum(1)
        drawn["random"] += ((random @ left) ** 2).sum(1)
        drawn["covariance"] += null
        rows += [_aligned(u, left, sizes, null, direction) for direction in directions]
    by_map = pd.DataFrame(rows)
    means = {name: total / len(parts) for name, total in drawn.items()}
    return Compared(by_map, pd.DataFrame([_mean_alignment(by_map, d, means) for d in directions]))


def _check_width(u: Update, directions: Sequence[Direction], samples: Samples) -> None:
    width = len(u.left)
    if samples.shape[2] != width:
        raise InputError(f"{u.name}: writes {width} numbers, the samples have {samples.shape[2]}")
    for d in directions:
        if d.vectors.shape[1] != width:
            raise InputError(f"{u.name}: writes {width} numbers, {d.name} has {d.vectors.shape[1]}")


def _aligned(
    u: Update, left: Float[Any, "d r"], sizes: Float[Any, " r"], null: Float[Any, " n"], direction: Direction
) -> dict[str, Any]:
    inside = direction.unit_at(u.layer) @ left
    energy, r, d = float((inside**2).sum()), len(sizes), len(left)
    return {
        "direction": direction.name, "layer": u.layer, "map": u.name, "rank": r, "energy": energy,
        "expected": r / d, "p_random": float(stats.beta.sf(energy, r / 2, (d - r) / 2)) if r < d else 1.0,
        "null_covariance_high": float(np.quantile(null, 0.975)), "p_covariance": upper_p(energy, null),
        "cosine": float(inside[0]), "gain": float(np.sqrt(((inside * sizes) ** 2).sum()) / sizes[0]),
        "split_half": float(direction.split_half[u.layer]),
    }  # fmt: skip


def _mean_alignment(by_map: pd.DataFrame, direction: Direction, null: dict[str, Any]) -> dict[str, Any]:
    mine = by_map[by_map["direction"] == direction.name]
    energy, expected = float(mine["energy"].mean()), float(mine["expected"].mean())
    most = mine.iloc[int(mine["energy"].argmax())]
    return {
        "direction": direction.name, "n_maps": len(mine), "energy": energy, "expected": expected,
        "energy_over_expected": energy / expected, "p_random": upper_p(energy, null["random"]),
        "null_covariance_high": float(np.quantile(null["covariance"], 0.975)),
        "p_covariance": upper_p(energy, null["covariance"]), "most_at_layer": int(most["layer"]),
        "most_in_map": most["map"], "mean_split_half": float(mine["split_half"].mean()),
    }  # fmt: skip


def overlap(
    one: Sequence[Update], other: Sequence[Update], *, rng: np.random.Generator, n_null: int = 200
) -> Compared:
    """Principal angles between what two adapters write, map by map.

    `shared` is the mean squared cosine of the principal angles (1: the same space), `expected` its value for a random space,
    max(r, r')/d, `first_cosine` the largest cosine, `first_angle` its angle in degrees; `p_random` from random spaces of the second's
    rank, drawn for each map by itself. Over all maps that is a little too sure, since an adapter's maps write alike: with one adapter of the quickstart
    turned at random as a whole, `overall` was below .05 in 13 of 150 turns. Of a random space only its angles with a fixed one matter, and those depend on the ranks alone: maps of equal ranks share draws.

    Raises:
        InputError: no map in common.
    """
    theirs = {(u.layer, u.name): u for u in other}
    pairs = [(u, theirs[u.layer, u.name]) for u in one if (u.layer, u.name) in theirs]
    if not pairs:
        raise InputError("the two adapters change no map in common")
    rows, total, nulls = [], np.zeros(n_null), dict[tuple[int, ...], np.ndarray]()
    for a, b in pairs:
        left, right = (_left_singular(u)[0] for u in (a, b))
        if not (left.shape[1] and right.shape[1]):
            continue  # one of the two writes nothing here
        shape = (len(right), right.shape[1], left.shape[1])
        if shape not in nulls:
            nulls[shape] = _random_overlaps(*shape, n_null, rng)
        cosines = np.linalg.svd(left.T @ right, compute_uv=False).clip(0, 1)
        shared, first = float((cosines**2).mean()), float(cosines[0])
        total += rng.permutation(
            nulls[shape]
        )  # each map's draws are its own, though they are the same numbers
        rows.append({
            "layer": a.layer, "map": a.name, "shared": shared,
            "expected": max(left.shape[1], right.shape[1]) / len(left), "p_random": upper_p(shared, nulls[shape]),
            "first_cosine": first, "first_angle": float(np.degrees(np.arccos(first))),
        })  # fmt: skip
    if not rows:
        raise InputError("the two adapters write nothing in any map in common")
    by_map = pd.DataFrame(rows)
    mean, null = float(by_map["shared"].mean()), total / len(rows)
    overall = {
        "n_maps": len(by_map), "shared": mean, "expected": float(by_map["expected"].mean()),
        "null_high": float(np.quantile(null, 0.975)), "p_random": upper_p(mean, null),
        "most_at_layer": int(by_map["layer"].iloc[int(by_map["shared"].argmax())]),
    }  # fmt: skip
    return Compared(by_map, pd.DataFrame([overall]))


def _random_overlaps(
    d: int, rank: int, with_rank: int, n: int, rng: np.random.Generator
) -> Float[np.ndarray, " n"]:
    """Mean squared cosines between random spaces of `rank` and the one that the first `with_rank` axes span."""
    found = np.empty(n)
    for i in range(n):
        x = rng.standard_normal((d, rank))  # Q = x R⁻¹: the energy of Q's first rows needs no Q
        found[i] = np.trace(np.linalg.solve(x.T @ x, x[:with_rank].T @ x[:with_rank])) / min(rank, with_rank)
    return found


def _left_singular(update: Update) -> tuple[Float[Any, "d r"], Float[Any, " r"]]:
    """Left singular vectors and values of left @ right, from QR of the thin factors."""
    q, upper = torch.linalg.qr(update.left.double())
    _, lower = torch.linalg.qr(update.right.double().T)
    inner, sizes, _ = torch.linalg.svd(upper @ lower.T)
    kept = sizes > 1e-9 * sizes.max().clamp_min(1e-300)
    return (q @ inner[:, kept]).numpy(), sizes[kept].numpy()

"""Is it one thing? Identity directions against each other: cosines, and how well each tells the others' contrasts apart.

A family is called identity only where its members agree. Two members agree, at a layer, where their cosine is beyond 97.5 % of
directions drawn from the other's activations, and each orders the other's held-out rows rightly with an interval above one half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mech.errors import InputError
from probes.direction import Direction
from probes.nulls import covariance_matched_directions, isotropic_directions
from probes.separability import heldout_auroc
from probes.validation import auroc


@dataclass(frozen=True)
class Member:
    """A direction and the contrast it was made from, at one layer."""

    direction: Direction
    extract: Float[np.ndarray, "n d"]
    """Activations of the half that it was made from."""
    held_out: Float[np.ndarray, "m d"]
    signs: Sequence[int]
    """Of the held-out rows."""
    questions: Sequence[str]
    """Of the held-out rows."""


def cosines(
    members: Sequence[Member], layer: int, *, rng: np.random.Generator, n_null: int = 1000
) -> pd.DataFrame:
    """Cosine of every two directions at a layer, one row a pair (both ways, for the null is the second's).

    `null_high` is the 97.5 % quantile of |cosine| with directions of the second contrast's covariance, `p_null` two-sided;
    `ceiling` is what two equally noisy directions of one truth would reach: the root of the product of their reliabilities, which
    follow from the split-half cosines r by Spearman and Brown, 2r / (1 + r), for the whole is less noisy than its halves. Members
    that share rows (name and presence both hold the identity prompt) share noise too, which lifts their cosine.
    """
    rows = []
    for a in members:
        for b in members:
            if a is b:
                continue
            value = float(a.direction.unit[layer] @ b.direction.unit[layer])
            drawn = covariance_matched_directions(b.extract, n_null, rng) @ a.direction.unit[layer]
            reliability = _reliability(a.direction, layer) * _reliability(b.direction, layer)
            rows.append({
                "direction": a.direction.name, "other": b.direction.name, "layer": layer, "cosine": value,
                "null_high": float(np.quantile(np.abs(drawn), 0.975)),
                "p_null": float((1 + (np.abs(drawn) >= abs(value)).sum()) / (1 + n_null)),
                "ceiling": float(np.sqrt(reliability)),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _reliability(direction: Direction, layer: int) -> float:
    half = max(0.0, float(direction.split_half[layer]))
    return 2 * half / (1 + half)


def transfer(
    members: Sequence[Member], layer: int, *, rng: np.random.Generator, n_null: int = 1000
) -> pd.DataFrame:
    """AUROC of every direction on every contrast's held-out rows, with a question bootstrap, and a random direction's spread.

    `null_low` and `null_high` hold 95 % of isotropic directions; below one half means that the direction orders them wrongly.
    """
    rows = []
    for contrast in members:
        projections = np.stack([contrast.held_out @ m.direction.unit[layer] for m in members], 1)
        found = heldout_auroc(projections, contrast.signs, contrast.questions)
        drawn = contrast.held_out @ isotropic_directions(n_null, contrast.held_out.shape[1], rng).T
        null = auroc(drawn, np.array(contrast.signs))
        for i, m in enumerate(members):
            rows.append({
                "direction": m.direction.name, "contrast": contrast.direction.name, "layer": layer,
                "auroc": float(found.auroc[i]), "auroc_low": float(found.low[i]), "auroc_high": float(found.high[i]),
                "null_low": float(np.quantile(null, 0.025)), "null_high": float(np.quantile(null, 0.975)),
                "n_questions": found.n_questions,
            })  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(found_cosines: pd.DataFrame, found_transfer: pd.DataFrame) -> pd.DataFrame:
    """One row a pair: do the two agree, by the rule above?

    Raises:
        InputError: the tables are of different members.
    """
    cosine = found_cosines.set_index(["direction", "other"])
    scored = found_transfer.set_index(["direction", "contrast"])
    names = list(dict.fromkeys(found_transfer["direction"]))
    if set(names) != set(found_cosines["direction"]):
        raise InputError("verdicts: cosines and transfer are of different directions")
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            pairs: Mapping[str, bool] = {
                "cosine_above_null": bool(all(cosine.loc[p, "cosine"] > cosine.loc[p, "null_high"] for p in ((a, b), (b, a)))),
                "transfers_both_ways": bool(all(scored.loc[p, "auroc_low"] > 0.5 for p in ((a, b), (b, a)))),
            }  # fmt: skip
            rows.append({"direction": a, "other": b, **pairs, "agree": all(pairs.values())})
    return pd.DataFrame(rows)

"""Several ways to one trait, side by side: which vector to believe."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from mech.errors import InputError
from probes.direction import Direction
from probes.separability import heldout_auroc


def elicitation_table(
    directions: Mapping[str, Direction],
    activations: Float[np.ndarray, "n layers d"],
    signs: Sequence[int],
    questions: Sequence[str],
    *,
    reference: str,
) -> pd.DataFrame:
    """Compare directions: split-half cosine, cosine with one of them, AUROC on one and the same held-out contrast.

    Args:
        directions: by the label they get in the table.
        activations: the contrast that none of them was made from, one row a text.
        signs: +1 and −1.
        questions: question of each row.
        reference: label of the direction that the cosines are with.

    Returns:
        A row for each direction and layer: vector, layer, norm, split_half, n_pairs, cosine, heldout_auroc with its interval.

    Raises:
        InputError: shapes differ, a side is missing, or `reference` is not among the directions.
    """
    if reference not in directions:
        raise InputError(f"elicitation: {reference!r} is not among {', '.join(directions)}")
    other, frames = directions[reference], []
    for label, one in directions.items():
        one.require(n_layers=activations.shape[1], d_model=activations.shape[2])
        projected = np.einsum("nld,ld->nl", activations, one.vectors)  # AUROC does not see the scale
        found = heldout_auroc(projected, list(signs), list(questions))
        size = one.norms * other.norms
        dot = (one.vectors * other.vectors).sum(-1)
        frames.append(
            pd.DataFrame(
                {
                    "vector": label,
                    "layer": np.arange(len(one.norms)),
                    "norm": one.norms,
                    "split_half": one.split_half,
                    "n_pairs": one.n_pairs,
                    "cosine": np.divide(dot, size, out=np.full(len(size), np.nan), where=size > 0),
                    "heldout_auroc": found.auroc,
                    "heldout_auroc_low": found.low,
                    "heldout_auroc_high": found.high,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)

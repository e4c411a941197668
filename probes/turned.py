"""A direction of many layers turned at random as a whole, without forming anything of the stream's width for each draw."""

import numpy as np
from jaxtyping import Float

BLOCK = 200
"""Rotations that are drawn at once, which bounds the memory."""


def turned_projections(
    unit: Float[np.ndarray, "layers d"], onto: Float[np.ndarray, "layers d"], n: int, rng: np.random.Generator
) -> Float[np.ndarray, "n layers"]:
    """Projections u_l · R m_l at every layer, for random rotations R that are the same at all layers.

    So a draw's layers hang together as the direction's own do, which a test over all layers at once needs: with one vector for all layers they
    would hang together too closely where the direction turns from layer to layer, and the largest of them would be too small.

    Only the block X = Q₁ᵀ R Q₂ counts, Q₁ and Q₂ orthonormal bases of the rows of `unit` and of `onto`: the first rows of the
    orthonormal factor of a Gaussian matrix Z [d, r], whose other rows enter through ZᵀZ alone, a Wishart matrix (Bartlett 1933).

    Args:
        unit: the direction, of norm 1 at each layer.
        onto: what the turned direction is projected on at each layer (a mean shift), in units of the stream.
        n: rotations.
        rng: draws them.
    """
    a, b = _coordinates(unit), _coordinates(onto)
    found = np.empty((n, len(unit)))
    for start in range(0, n, BLOCK):
        x = _haar_blocks(min(BLOCK, n - start), a.shape[1], b.shape[1], unit.shape[1], rng)
        found[start : start + len(x)] = np.einsum("lk,nkr,lr->nl", a, x, b, optimize=True)
    return found


def _coordinates(x: Float[np.ndarray, "layers d"]) -> Float[np.ndarray, "layers k"]:
    """Rows in an orthonormal basis of their span."""
    left, sizes, _ = np.linalg.svd(x, full_matrices=False)
    kept = sizes > 1e-10 * max(float(sizes[0]), 1e-300)
    inside: np.ndarray = left[:, kept] * sizes[kept]
    return inside


def _haar_blocks(n: int, k: int, r: int, d: int, rng: np.random.Generator) -> Float[np.ndarray, "n k r"]:
    """Upper left blocks of n random rotations of d dimensions."""
    z = rng.standard_normal((n, k, r))
    if d - k >= r:
        factor = np.tril(rng.standard_normal((n, r, r)), -1)
        factor[:, np.arange(r), np.arange(r)] = np.sqrt(rng.chisquare(d - k - np.arange(r), (n, r)))
        rest = factor @ factor.transpose(0, 2, 1)
    else:
        below = rng.standard_normal((n, d - k, r))
        rest = below.transpose(0, 2, 1) @ below
    lower = np.linalg.cholesky(z.transpose(0, 2, 1) @ z + rest)
    blocks: np.ndarray = np.linalg.solve(lower, z.transpose(0, 2, 1)).transpose(0, 2, 1)
    return blocks

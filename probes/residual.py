"""Taking out of a direction what it should not be made of: other directions, and covariates such as length and surprisal."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from mech.errors import InputError
from probes.direction import Direction


def project_out(direction: Direction, others: Sequence[Direction]) -> Direction:
    """The part of a direction that is orthogonal, layer by layer, to the span of others; `made_from` says so.

    Its norm shrinks by what was taken out. `split_half` becomes NaN: how far to believe what is left is not known from how far to
    believe the whole.

    Raises:
        InputError: nothing to project out, another shape, or nothing is left at a layer.
    """
    if not others or any(o.vectors.shape != direction.vectors.shape for o in others):
        raise InputError(
            f"direction {direction.name}: project out directions of the same model, at least one"
        )
    left = direction.vectors.astype(np.float64)
    for layer in range(len(left)):
        basis, sizes, _ = np.linalg.svd(np.stack([o.unit[layer] for o in others], 1), full_matrices=False)
        basis = basis[:, sizes > 1e-6 * sizes[0]]
        left[layer] -= basis @ (basis.T @ left[layer])
    if (np.linalg.norm(left, axis=1) < 1e-6 * direction.norms).any():
        raise InputError(
            f"direction {direction.name}: nothing is left of it without {[o.name for o in others]}"
        )
    said = {**direction.made_from, "projected_out": [o.name for o in others]}
    unknown = np.full_like(direction.split_half, np.nan)
    return replace(direction, vectors=left.astype(np.float32), split_half=unknown, made_from=said)


def regress_out(
    activations: Float[np.ndarray, "n layers d"],
    covariates: Mapping[str, Float[np.ndarray, " n"]],
    questions: Sequence[str],
) -> Float[np.ndarray, "n layers d"]:
    """Activations without what covariates explain within questions, linearly (least squares, float64).

    The slope is estimated from rows' deviations from their question's mean, so that it cannot take up differences between
    questions, and the covariates' effect is removed around their grand mean. A covariate that goes with the contrast itself takes
    contrast with it: what is left is a lower bound.

    Raises:
        InputError: a covariate of another length, not finite, or constant within every question.
    """
    _, group = np.unique(np.asarray(questions), return_inverse=True)
    design = np.stack([np.asarray(v, dtype=np.float64) for v in covariates.values()], 1)
    if design.shape[0] != len(activations) or not np.isfinite(design).all():
        raise InputError(f"covariates {', '.join(covariates)}: one finite number a row is needed")
    within = _within(design, group)
    if empty := [name for name, column in zip(covariates, within.T, strict=True) if not column.any()]:
        raise InputError(f"covariates {', '.join(empty)} do not vary within any question")
    flat = activations.reshape(len(activations), -1).astype(np.float64)
    slope, *_ = np.linalg.lstsq(within, _within(flat, group), rcond=None)
    cleaned: np.ndarray = (flat - (design - design.mean(0)) @ slope).reshape(activations.shape)
    return cleaned


def _within(values: Float[np.ndarray, "n k"], group: np.ndarray) -> Float[np.ndarray, "n k"]:
    counts = np.bincount(group)
    means = np.stack([np.bincount(group, column) / counts for column in values.T], 1)
    deviations: np.ndarray = values - means[group]
    return deviations

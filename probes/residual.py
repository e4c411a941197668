"""Taking out of a direction what it should not be made of: other directions, and covariates such as length, surprisal and norm."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from mech.adapters import orthonormal
from mech.errors import InputError
from probes.direction import Direction

Covariate = Float[np.ndarray, " n"] | Float[np.ndarray, "n _"]
"""A number for each row, or one for each row and layer (the norm of what is read there)."""


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
    left = without(direction.vectors[None], others)[0]
    if (np.linalg.norm(left, axis=1) < 1e-6 * direction.norms).any():
        raise InputError(
            f"direction {direction.name}: nothing is left of it without {[o.name for o in others]}"
        )
    said = {**direction.made_from, "projected_out": [o.name for o in others]}
    unknown = np.full_like(direction.split_half, np.nan)
    return replace(direction, vectors=left.astype(np.float32), split_half=unknown, made_from=said)


def without(
    activations: Float[np.ndarray, "n layers d"], others: Sequence[Direction]
) -> Float[np.ndarray, "n layers d"]:
    """Activations without their part in the span of some directions, layer by layer (float64).

    A difference of means of these is the difference of means of all, with the others projected out; and its split-half cosine is
    that of what is left.

    Raises:
        InputError: directions of another model.
    """
    if any(o.vectors.shape != activations.shape[1:] for o in others):
        raise InputError(
            f"{[o.name for o in others]}: not of the model whose activations are {activations.shape[1:]}"
        )
    left: np.ndarray = activations.astype(np.float64)
    for layer in range(left.shape[1]):
        units = np.stack([o.unit_at(layer) for o in others], 1)
        basis = orthonormal(torch.from_numpy(units)).numpy()
        left[:, layer] -= (left[:, layer] @ basis) @ basis.T
    return left


def regress_out(
    activations: Float[np.ndarray, "n layers d"],
    covariates: Mapping[str, Covariate],
    questions: Sequence[str],
    *,
    fit_on: Bool[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, "n layers d"]:
    """Activations without what covariates explain within questions, linearly (least squares, float64).

    A covariate of every layer explains its own layer alone.

    The slope is estimated from rows' deviations from their question's mean, so that it cannot take up differences between
    questions, and the covariates' effect is removed around their grand mean. A covariate that goes with the contrast itself takes
    contrast with it: what is left is a lower bound. With `fit_on`, slopes and grand mean are those of these rows alone (the extraction
    half), and are taken out of all.

    Raises:
        InputError: a covariate of another length or of other layers, not finite, or constant within every question.
    """
    if by_layer(covariates):
        parts = [
            regress_out(h[:, None], at_layer(covariates, i, activations.shape[1]), questions, fit_on=fit_on)
            for i, h in enumerate(activations.swapaxes(0, 1))
        ]
        return np.concatenate(parts, axis=1)
    fitted = np.ones(len(activations), dtype=bool) if fit_on is None else fit_on
    _, group = np.unique(np.asarray(questions)[fitted], return_inverse=True)
    design = np.stack([np.asarray(v, dtype=np.float64) for v in covariates.values()], 1)
    if design.shape[0] != len(activations) or not np.isfinite(design).all():
        raise InputError(f"covariates {', '.join(covariates)}: one finite number a row is needed")
    within = within_questions(design[fitted], group)
    if empty := [name for name, column in zip(covariates, within.T, strict=True) if not column.any()]:
        raise InputError(f"covariates {', '.join(empty)} do not vary within any question")
    flat = activations.reshape(len(activations), -1).astype(np.float64)
    slope, *_ = np.linalg.lstsq(within, within_questions(flat[fitted], group), rcond=None)
    cleaned: np.ndarray = (flat - (design - design[fitted].mean(0)) @ slope).reshape(activations.shape)
    return cleaned


def within_questions(
    values: Float[np.ndarray, "n k"], group: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n k"]:
    """Deviations from the mean of each row's question; `group` numbers the questions from 0."""
    counts = np.bincount(group)
    means = np.stack([np.bincount(group, column) / counts for column in values.T], 1)
    deviations: np.ndarray = values - means[group]
    return deviations


def by_layer(covariates: Mapping[str, Covariate]) -> bool:
    """Whether one of them differs from layer to layer."""
    return any(np.ndim(v) > 1 for v in covariates.values())


def at_layer(
    covariates: Mapping[str, Covariate], layer: int, n_layers: int
) -> dict[str, Float[np.ndarray, " n"]]:
    """Covariates as they are at a layer.

    Raises:
        InputError: one that differs from layer to layer is not of as many layers.
    """
    if wrong := [name for name, v in covariates.items() if np.ndim(v) > 1 and v.shape[1] != n_layers]:
        raise InputError(f"covariates {', '.join(wrong)}: one number for each of the {n_layers} layers is needed")  # fmt: skip
    return {name: v[:, layer] if np.ndim(v) > 1 else v for name, v in covariates.items()}

"""Directions: one vector a layer, with what it was made from, in a safetensors file.

Sign convention: positive means more of what the name says (`evil`: more evil; `identity:name`: more of the
model's own name, as against invented ones).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mech.errors import FileFormatError, InputError
from mech.files import atomic_path

FORMAT = "sgtr-mech-direction"
VERSION = "1.0"


@dataclass(frozen=True)
class Direction:
    """A direction in the residual stream, per layer, unnormalised.

    `vectors[l]` belongs to the output of block l. Its norm is the size of the contrast it was made from.
    """

    name: str
    """What positive means more of."""
    vectors: Float[np.ndarray, "layers d"]
    """Difference of means, in units of the residual stream (float32)."""
    split_half: Float[np.ndarray, " layers"]
    """Median cosine between the directions of two halves of the questions: how far to believe it."""
    n_pairs: int
    """Questions it was made from."""
    made_from: Mapping[str, Any] = field(default_factory=dict)
    """Checkpoint, condition, site, pooling, method, elicitation, digests of the prompts."""

    @cached_property
    def norms(self) -> Float[np.ndarray, " layers"]:
        """Norm by layer."""
        norms: np.ndarray = np.linalg.norm(self.vectors, axis=-1)
        return norms

    @cached_property
    def unit(self) -> Float[np.ndarray, "layers d"]:
        """Unit vectors of all layers; `unit_at` gives one layer's.

        Raises:
            InputError: a layer's vector is zero: it has no direction there, and nothing takes its place.
        """
        unit: np.ndarray = np.stack([self.unit_at(layer) for layer in range(len(self.vectors))])
        return unit

    def project(self, activations: Float[np.ndarray, "n layers d"]) -> Float[np.ndarray, "n layers"]:
        """Scalar projections v̂·h, in units of the residual stream.

        Raises:
            InputError: activations of another model: other layers or another width.
        """
        if activations.shape[1:] != self.vectors.shape:
            raise InputError(
                f"direction {self.name} has shape {self.vectors.shape} (layers, d_model), activations {activations.shape[1:]}"
            )
        projected: np.ndarray = np.einsum("nld,ld->nl", activations, self.unit)
        return projected

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        from safetensors.numpy import save_file

        described = {"format": FORMAT, "version": VERSION, "name": self.name, "n_pairs": self.n_pairs,
                     "made_from": dict(self.made_from), "layer_convention": "row l is the output of block l, from 0"}  # fmt: skip
        with atomic_path(path) as temporary:
            save_file(
                {
                    "vectors": np.ascontiguousarray(self.vectors),
                    "split_half": np.ascontiguousarray(self.split_half),
                },
                temporary,
                metadata={"direction": json.dumps(described, sort_keys=True)},
            )

    @classmethod
    def load(cls, path: Path) -> "Direction":
        """Read a direction file.

        Raises:
            FileFormatError: not there, not safetensors, not a direction of this version, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as stored:
                described = json.loads((stored.metadata() or {}).get("direction", "{}"))
                if not isinstance(described, dict) or (
                    (described.get("format"), described.get("version")) != (FORMAT, VERSION)
                ):
                    raise FileFormatError(f"{path}: not a direction file of version {VERSION}")
                vectors, split_half = stored.get_tensor("vectors"), stored.get_tensor("split_half")
        except (SafetensorError, OSError, ValueError) as error:
            raise FileFormatError(f"{path}: cannot be read as a direction ({error})") from error
        kinds = {"name": str, "n_pairs": int, "made_from": dict}
        if wrong := [key for key, kind in kinds.items() if not isinstance(described.get(key), kind)]:
            raise FileFormatError(f"{path}: says nothing usable as the direction's {', '.join(wrong)}")
        if vectors.ndim != 2 or split_half.shape != vectors.shape[:1] or not np.isfinite(vectors).all():
            raise FileFormatError(
                f"{path}: vectors of shape {vectors.shape}, split_half of {split_half.shape}: one finite vector and one cosine a layer"
            )
        return cls(described["name"], vectors, split_half, described["n_pairs"], described["made_from"])

    def unit_at(self, layer: int) -> Float[np.ndarray, " d"]:
        """Unit vector of one layer, for a direction that has none at others (a control vector has none at layer 0).

        Raises:
            InputError: no such layer, or its vector is zero.
        """
        if not 0 <= layer < len(self.vectors):
            raise InputError(
                f"direction {self.name}: no layer {layer}; there are 0 to {len(self.vectors) - 1}"
            )
        if not self.norms[layer]:
            raise InputError(f"direction {self.name}: zero at layer {layer}: it has no direction there")
        unit: np.ndarray = self.vectors[layer] / self.norms[layer]
        return unit

    def at_layers(self, layers: Sequence[int]) -> "Direction":
        """The same direction at some layers only: row i is that of `layers[i]`."""
        return replace(self, vectors=self.vectors[list(layers)], split_half=self.split_half[list(layers)])

    def require(self, *, n_layers: int, d_model: int, base: str | Collection[str] | None = None) -> None:
        """Refuse to be used on another model.

        Args:
            n_layers: blocks of the model.
            d_model: width of its residual stream.
            base: digest of its base's weights, or of several that will do (`model.checkpoint.origins`); compared where the
                direction has one too.

        Raises:
            InputError: the shapes differ, or it was made on another base.
        """
        if self.vectors.shape != (n_layers, d_model):
            raise InputError(
                f"direction {self.name} was made on a model of {self.vectors.shape[0]} layers, width "
                f"{self.vectors.shape[1]}; this one has {n_layers} layers, width {d_model}"
            )
        made_on = self.made_from.get("checkpoint", {})
        known = {base} if isinstance(base, str) else base
        if known is not None and made_on.get("digest", None) not in {None, *known}:
            raise InputError(
                f"direction {self.name} was made on another base ({made_on.get('base', made_on['digest'][:12])}): "
                "take a direction of this model, or make one"
            )


def paired_differences(
    activations: Float[np.ndarray, "n layers d"], questions: Sequence[str], signs: Sequence[int]
) -> tuple[Float[np.ndarray, "q layers d"], list[str]]:
    """Mean of the positive rows minus mean of the negative rows, within each question, in float64.

    Args:
        activations: one row a text.
        questions: which question each row belongs to.
        signs: +1 for rows that have what the direction is named after, -1 for those that lack it.

    Returns:
        Differences and their questions, in order of first appearance.

    Raises:
        InputError: a question lacks one of the two sides.
    """
    differences, names = [], list(dict.fromkeys(questions))
    asked, side = np.array(questions), np.array(signs)
    for name in names:
        positive, negative = (activations[(asked == name) & (side == s)] for s in (1, -1))
        if not len(positive) or not len(negative):
            raise InputError(
                f"question {name}: needs both sides of the contrast, has {len(positive)} and {len(negative)}"
            )
        differences.append(positive.mean(0, dtype=np.float64) - negative.mean(0, dtype=np.float64))
    return np.stack(differences), names


def fit_weights(signs: Int[np.ndarray, " n"], questions: np.ndarray) -> Float[np.ndarray, " n"]:
    """The weights with which rows enter a difference of means paired by question (`fit_direction`).

    Raises:
        InputError: a question without both sides.
    """
    return np.where(signs > 0, side_weights(signs, questions, 1), side_weights(signs, questions, -1))


def side_weights(signs: Int[np.ndarray, " n"], questions: np.ndarray, side: int) -> Float[np.ndarray, " n"]:
    """What each row weighs if it is of this side: one over the side's rows in its question, and over the questions."""
    _, group = np.unique(questions, return_inverse=True)
    sizes = np.bincount(group[signs == side], minlength=group.max() + 1)
    if not sizes.all():
        raise InputError("every question needs both sides of the contrast")
    found: np.ndarray = side / sizes[group] / len(sizes)
    return found


def split_half_cosine(
    differences: Float[np.ndarray, "q layers d"], *, rng: np.random.Generator, n_splits: int = 50
) -> Float[np.ndarray, " layers"]:
    """Median cosine, over random halvings of the questions, between the two halves' mean differences.

    Raises:
        InputError: fewer than two questions.
    """
    n = len(differences)
    if n < 2:
        raise InputError("a split-half cosine needs at least two questions")
    cosines = []
    for _ in range(n_splits):
        order = rng.permutation(n)
        a, b = differences[order[: n // 2]].mean(0), differences[order[n // 2 :]].mean(0)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosines.append(np.divide((a * b).sum(-1), norms, out=np.zeros(len(norms)), where=norms > 0))
    median: np.ndarray = np.median(cosines, axis=0)
    return median


def fit_direction(
    name: str,
    activations: Float[np.ndarray, "n layers d"],
    questions: Sequence[str],
    signs: Sequence[int],
    *,
    rng: np.random.Generator,
    made_from: Mapping[str, Any] | None = None,
) -> Direction:
    """Difference of means, paired within question: v_l = mean_q [mean h_l(+) − mean h_l(−)].

    This is the estimator of persona vectors (Chen et al. 2025, arXiv 2507.21509, section 2), with the
    pairing of its code, and with each question weighing the same.

    Raises:
        InputError: a question without both sides, or fewer than two questions.
    """
    differences, _ = paired_differences(activations, questions, signs)
    return Direction(
        name,
        differences.mean(0).astype(np.float32),
        split_half_cosine(differences, rng=rng).astype(np.float32),
        len(differences),
        {"method": "difference of means, paired by question", **(made_from or {})},
    )

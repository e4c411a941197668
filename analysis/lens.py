"""The logit lens as a table: which tokens vectors favour, and whether that stands out from what any vector favours."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from mech.errors import InputError
from mech.lens import Reading, TokenScore, direction_lens, favoured_tokens
from mech.models import ChatModel
from probes.nulls import covariance_matched_directions, isotropic_directions, upper_p

DRAWS = 100
"""Drawn directions of each kind: each is read through the whole vocabulary."""

Peaks = Float[np.ndarray, " n"]


def spoken(scores: Sequence[TokenScore]) -> str:
    """Tokens in quotes, joined by commas: spaces and line breaks stay visible, and nothing is taken for a missing value."""
    return ", ".join(json.dumps(s.token, ensure_ascii=False) for s in scores)


def peaks(model: ChatModel, vectors: Float[Any, "n d"], k: int) -> Peaks:
    """How far each vector's k most favoured tokens stand out: their mean, in standard deviations over the vocabulary.

    Raises:
        InputError: more tokens than the model has.
    """
    favoured = favoured_tokens(model, vectors)
    if k > favoured.shape[1]:
        raise InputError(f"the {k} tokens most favoured of {favoured.shape[1]}")
    top = favoured.topk(k, dim=-1).values.mean(-1)
    found: Peaks = ((top - favoured.mean(-1)) / favoured.std(-1)).double().cpu().numpy()
    return found


class Lens:
    """Reads vectors of one model; random directions are drawn once and kept.

    Args:
        model: whose tokens.
        layers: which layers are read.
        k: how many tokens on each side.
        seed: of the draws.
    """

    def __init__(self, model: ChatModel, layers: Sequence[int], k: int, seed: int) -> None:
        self.model, self.layers, self.k, self.seed = model, tuple(layers), k, seed
        drawn = isotropic_directions(DRAWS, model.d_model, np.random.default_rng(seed))
        self._random = peaks(model, drawn, k)
        self._matched: dict[tuple[str, int], Peaks] = {}

    def rows(
        self, vectors: Float[np.ndarray, "layers d"], samples: Float[np.ndarray, "m layers d"], name: str
    ) -> list[dict[str, Any]]:
        """One row a layer: top and bottom tokens, their peak, and p values against drawn directions.

        Args:
            vectors: a direction, or a mean shift; layers at which it is exactly zero (an adapter that acts above) are left out.
            samples: activations of the base, whose covariance directions are drawn from.
            name: of the samples: draws for the same name and layer are shared.
        """
        there = [layer for layer in self.layers if vectors[layer].any()]
        readings = direction_lens(self.model, vectors, layers=there, k=self.k)
        return [self._row(reading, vectors[reading.layer], samples, name) for reading in readings]

    def _row(self, reading: Reading, vector: np.ndarray, samples: np.ndarray, name: str) -> dict[str, Any]:
        place = (name, reading.layer)
        if place not in self._matched:
            rng = np.random.default_rng(self.seed)
            at = samples[:, reading.layer].astype(np.float64)
            self._matched[place] = peaks(self.model, covariance_matched_directions(at, DRAWS, rng), self.k)
        (peak,) = peaks(self.model, torch.as_tensor(vector)[None], self.k)
        return {
            "layer": reading.layer, "top": spoken(reading.top), "bottom": spoken(reading.bottom), "peak": float(peak),
            "p_random": upper_p(peak, self._random), "p_covariance": upper_p(peak, self._matched[place]),
        }  # fmt: skip

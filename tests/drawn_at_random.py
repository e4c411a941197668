"""Generators, and directions of random numbers."""

import numpy as np

from mech.models import ChatModel
from probes.direction import Direction, fit_direction


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def given_direction(vectors: np.ndarray, name: str = "d", split_half: float = 0.9) -> Direction:
    """One of these vectors, which says no more of itself than that it is reliable."""
    return Direction(name, vectors.astype(np.float32), np.full(len(vectors), split_half, np.float32), 10, {})


def fitted_direction(model: ChatModel) -> Direction:
    """One of a model's shape, fitted to noise."""
    drawn = rng()
    h = drawn.standard_normal((8, model.n_layers, model.d_model))
    return fit_direction("d", h, [f"q{i // 2}" for i in range(8)], [1, -1] * 4, rng=drawn)

"""Where captured vectors go: the HDF5 writer, or arrays in memory."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from activations.pooling import TOKENS
from mech.errors import InputError


@runtime_checkable
class Sink(Protocol):
    """Takes vectors, and numbers beside them, as they are made."""

    def write(
        self,
        site: str,
        pooling: str,
        layer: int,
        row_indices: Int[np.ndarray, " batch"],
        values: Float[np.ndarray, "vectors d"],
    ) -> None:
        """Take the vectors of some rows at one site, pooling and layer.

        One a row; for the pooling `tokens` the rows' tokens one after the other.
        """

    def note(
        self, name: str, row_indices: Int[np.ndarray, " batch"], values: Float[np.ndarray, " batch *k"]
    ) -> None:
        """Take one number, or several, for each of some rows."""


class ArraySink:
    """Keeps everything in memory.

    `arrays[site, pooling]` is [n, layers, d], layers in the order asked for; for the pooling `tokens` a list of one
    [tokens, layers, d] a row. `notes[name]` is [n] or [n, k].
    """

    def __init__(self, lengths: Sequence[int], layers: Sequence[int]) -> None:
        self._layers = {layer: i for i, layer in enumerate(layers)}
        if len(self._layers) < len(layers):
            raise InputError(f"layers {list(layers)}: name each once")
        self._lengths = list(lengths)
        self.arrays: dict[tuple[str, str], np.ndarray | list[np.ndarray]] = {}
        self.notes: dict[str, np.ndarray] = {}

    def write(
        self,
        site: str,
        pooling: str,
        layer: int,
        row_indices: Int[np.ndarray, " batch"],
        values: Float[np.ndarray, "vectors d"],
    ) -> None:
        """Take the vectors of some rows at one site, pooling and layer."""
        at, width = self._layers[layer], values.shape[1]
        if (site, pooling) not in self.arrays:
            self.arrays[site, pooling] = (
                [self._empty(n, width) for n in self._lengths]
                if pooling == TOKENS
                else self._empty(len(self._lengths), width)
            )
        array = self.arrays[site, pooling]
        if isinstance(array, list):
            ends = np.cumsum([self._lengths[i] for i in row_indices])
            for i, part in zip(row_indices, np.split(values, ends[:-1]), strict=True):
                array[i][:, at] = part
            return
        array[row_indices, at] = values

    def note(
        self, name: str, row_indices: Int[np.ndarray, " batch"], values: Float[np.ndarray, " batch *k"]
    ) -> None:
        """Take one number, or several, for each of some rows."""
        if name not in self.notes:
            self.notes[name] = np.full((len(self._lengths), *values.shape[1:]), np.nan, dtype=np.float32)
        self.notes[name][row_indices] = values

    def _empty(self, n: int, width: int) -> Float[np.ndarray, "n layers d"]:
        return np.full((n, len(self._layers), width), np.nan, dtype=np.float32)

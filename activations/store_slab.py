"""A dataset that is filled in any order, with every full chunk written once."""

import zlib

import h5py
import numpy as np
from jaxtyping import Int

from mech.errors import GuardError


class Slab:
    """One dataset being filled: vectors wait here until memory is short or the file is finished.

    Whole chunks are then written, each merged with what it held. Where everything fits in memory, each chunk is
    written once.
    """

    def __init__(self, dataset: h5py.Dataset, name: str) -> None:
        self._dataset, self._name = dataset, name
        self._rows = dataset.chunks[0]
        self._written = np.zeros(dataset.shape[0], dtype=bool)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._checks: dict[int, int] = {}
        self.held = 0
        """Bytes that wait."""
        self.chunks_written = 0
        """How often a chunk was written."""

    def take(self, at: Int[np.ndarray, " n"], bits: np.ndarray) -> None:
        """Take vectors in stored form.

        Raises:
            GuardError: one of them was written before.
        """
        unique, counts = np.unique(at, return_counts=True)
        twice = np.union1d(unique[counts > 1], unique[self._written[unique]])
        if len(twice):
            raise GuardError(
                f"{self._name}: {len(twice)} rows not written exactly once (vector {twice[0]} came twice)"
            )
        self._written[at] = True
        # A copy: the caller may use its array again, and in float32 these are the caller's own numbers.
        self._waiting.append((at.copy(), bits.copy()))
        self.held += bits.nbytes

    def flush(self) -> None:
        """Write all that waits."""
        if not self.held:
            return
        at, bits = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self.held = [], 0
        order = np.argsort(at)
        at, bits = at[order], bits[order]
        cuts = np.flatnonzero(np.diff(at // self._rows)) + 1
        for here, values in zip(np.split(at, cuts), np.split(bits, cuts), strict=True):
            self._write(int(here[0]) // self._rows, here, values)

    def missing(self) -> tuple[int, int] | None:
        """First vector never written, and how many there are."""
        gaps = np.flatnonzero(~self._written)
        return (int(gaps[0]), len(gaps)) if len(gaps) else None

    def first_difference(self, dataset: h5py.Dataset) -> int | None:
        """First vector of a chunk that reads back differently from what was written."""
        for chunk, check in self._checks.items():
            start, stop = self._bounds(chunk)
            if zlib.crc32(dataset[start:stop]) != check:
                return start
        return None

    def _write(self, chunk: int, at: Int[np.ndarray, " n"], values: np.ndarray) -> None:
        start, stop = self._bounds(chunk)
        if len(at) < stop - start:
            shape, stored = (stop - start, values.shape[1]), values.dtype
            block = self._dataset[start:stop] if chunk in self._checks else np.zeros(shape, dtype=stored)
            block[at - start] = values
        else:
            block = np.ascontiguousarray(values)
        self._dataset[start:stop] = block
        self._checks[chunk] = zlib.crc32(block.data)
        self.chunks_written += 1

    def _bounds(self, chunk: int) -> tuple[int, int]:
        return chunk * self._rows, min((chunk + 1) * self._rows, len(self._written))

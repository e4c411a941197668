"""HDF5's Fletcher-32 checksum of many chunks, by matrix products: threads may take them at once, and a chunk stays in the cache.

HDF5 sums a chunk's 16-bit words w_0 … w_(n-1), read big-endian: the lower half of its checksum is Σ w_i, the upper half Σ (n - i) w_i,
both modulo 65535, where a multiple of 65535 is written as 65535 unless all words are zero (H5checksum.c). Exchanging a word's bytes
multiplies it by 256 modulo 65535, so that words may be summed as they lie here.
"""

import numpy as np
from jaxtyping import Int, Int64, UInt16, UInt32

ROWS = 128
"""Rows that one matrix product sums: so few that float32 holds every sum of it exactly."""
MAX_COLUMNS = 1 << 15
"""Words a row: so few that float64 holds the sums over a row exactly."""
CACHED_WORDS = 160_000
"""Words whose float32 copy should fit into a core's own cache (1 MiB)."""


def _weights() -> np.ndarray:
    """Weights [4, rows] of a product with the words [rows, columns]: ones, and both digits of a row's number r = 12 a + b + 60.

    With -5 <= a <= 6 and -6 <= b <= 5 no weight's positive or negative entries sum to more than 256, so that no sum of words on the
    way passes 2**24. The fourth row is zero: BLAS is quicker at four than at three.
    """
    r = np.arange(ROWS)
    a = (r + 6) // 12 - 5
    b = r - 12 * (a + 5)
    return np.stack([np.ones(ROWS), a, b, np.zeros(ROWS)]).astype(np.float32)


WEIGHTS = _weights()


class Fletcher32:
    """Takes chunks of one shape, up to `at_once`, and then gives their checksums. One thread's own.

    Args:
        rows: of a chunk.
        columns: 16-bit words of each, up to `MAX_COLUMNS`; up to 2**23 words in all.
        at_once: chunks.
    """

    def __init__(self, rows: int, columns: int, at_once: int) -> None:
        self._step = max(1, min(rows, ROWS, CACHED_WORDS // columns))
        self._starts = np.arange(0, rows, self._step)
        self._words = rows * columns
        self._weights = WEIGHTS[:, : self._step].copy()
        self._floats = np.empty((self._step, columns), dtype=np.float32)
        self._sums = np.empty((at_once, len(self._starts), len(WEIGHTS), columns), dtype=np.float32)

    def take(self, i: int, words: UInt16[np.ndarray, "rows columns"]) -> None:
        """Sum the i-th chunk's little-endian words."""
        for block, start in enumerate(self._starts):
            part = words[start : start + self._step]
            if len(part) < self._step:
                self._floats[len(part) :] = 0  # zeros add nothing
            np.copyto(self._floats[: len(part)], part)
            np.matmul(self._weights, self._floats, out=self._sums[i, block])

    def checksums(self, n: int) -> UInt32[np.ndarray, " n"]:
        """Checksums of the first n chunks, as HDF5 writes them."""
        columns = self._sums.shape[-1]
        over = np.stack([np.ones(columns), np.arange(columns)], axis=1)
        flat = self._sums[:n].reshape(-1, columns).astype(np.float64)
        sums = (flat @ over).astype(np.int64).reshape(n, len(self._starts), len(WEIGHTS), 2)
        total, by_column = sums[..., 0, 0], sums[..., 0, 1]
        by_row = 12 * (sums[..., 1, 0] + 5 * total) + sums[..., 2, 0]
        # Word i of row r and column c of a block is word start * columns + r * columns + c of the chunk.
        behind = (self._words - self._starts * columns) * total - columns * by_row - by_column
        low, high = _halves(total.sum(1)), _halves(behind.sum(1))
        both: np.ndarray = ((high << 16) | low).astype(np.uint32)
        return both


def _halves(sums: Int64[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Sums of little-endian words as 16 bits of the checksum."""
    halves: np.ndarray = np.where(sums == 0, 0, (256 * (sums % 65535) - 1) % 65535 + 1)
    return halves

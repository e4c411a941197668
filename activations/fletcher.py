"""HDF5's Fletcher-32 checksum of many chunks, by matrix products of blocks that stay in a core's cache.

HDF5 sums a chunk's 16-bit words w_0 … w_(n-1), read big-endian: the lower half of its checksum is Σ w_i, the upper half Σ (n - i) w_i,
both modulo 65535, where a multiple of 65535 is written as 65535 unless all words are zero (H5checksum.c). Exchanging a word's bytes
multiplies it by 256 modulo 65535, so that words may be summed as they lie here.
"""

import numpy as np
from jaxtyping import Int, Int64, UInt16, UInt32

ROWS = 32
"""Rows of a block of words: so few that float32 holds every sum over a column exactly."""
COLUMNS = 2304
"""At most: float64 holds the sums over a row exactly, a block stays in a core's own cache, and BLAS starts no threads for one product."""
MIDDLE = ROWS // 2
"""Rows are counted from the middle, which makes their weighted sums small."""
WEIGHTS = np.stack([np.ones(ROWS), np.arange(ROWS) - MIDDLE]).astype(np.float32)
"""Of a product with the words [rows, columns]: no weight's positive or negative entries sum to more than 256, so that no sum of words on
the way passes 2**24."""


class Fletcher32:
    """Takes chunks of one size, up to `at_once`, and then gives their checksums.

    A chunk's words are laid out in blocks of `ROWS` rows, whatever its own shape is.

    Args:
        words: 16-bit words of a chunk, up to 2**23.
        at_once: chunks.
    """

    def __init__(self, words: int, at_once: int) -> None:
        blocks = max(1, -(-words // (ROWS * COLUMNS)))
        columns = -(-words // (ROWS * blocks))
        self._words, self._columns = words, columns
        self._starts = np.arange(blocks) * ROWS * columns
        self._floats = np.empty((ROWS, columns), dtype=np.float32)
        self._over_rows = np.empty((blocks, len(WEIGHTS), columns), dtype=np.float32)
        self._wide = np.empty(self._over_rows.shape)
        self._by_column = np.stack([np.ones(columns), np.arange(columns)], axis=1)
        self._sums = np.empty((at_once, blocks, len(WEIGHTS), 2))

    def take(self, i: int, words: UInt16[np.ndarray, " words"]) -> None:
        """Sum the i-th chunk's little-endian words."""
        flat, size = self._floats.reshape(-1), self._floats.size
        for block, sums in enumerate(self._over_rows):
            part = words[block * size : (block + 1) * size]
            flat[: len(part)] = part
            flat[len(part) :] = 0  # adds nothing
            np.matmul(WEIGHTS, self._floats, out=sums)
        self._wide[:] = self._over_rows
        np.matmul(self._wide, self._by_column, out=self._sums[i])

    def checksums(self, n: int) -> UInt32[np.ndarray, " n"]:
        """Checksums of the first n chunks, as HDF5 writes them."""
        sums = self._sums[:n].astype(np.int64)
        total, by_column = sums[..., 0, 0], sums[..., 0, 1]
        by_row = sums[..., 1, 0] + MIDDLE * total
        # Word i of row r and column c of a block is word start + r * columns + c of the chunk.
        behind = (self._words - self._starts) * total - self._columns * by_row - by_column
        low, high = _halves(total.sum(1)), _halves(behind.sum(1))
        both: np.ndarray = ((high << 16) | low).astype(np.uint32)
        return both


def _halves(sums: Int64[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Sums of little-endian words as 16 bits of the checksum."""
    halves: np.ndarray = np.where(sums == 0, 0, (256 * (sums % 65535) - 1) % 65535 + 1)
    return halves

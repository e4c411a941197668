"""Reading checksummed chunks straight from the file, past HDF5's filter pipeline: quicker, and checked as it does.

HDF5 says where the chunks lie, in checksummed indexes; their bytes go to where they are wanted, and their Fletcher-32 is compared with
the stored one (`activations.fletcher`). Whatever is not as expected (another layout, a checksum that differs, too few bytes) is left to
HDF5, which then reads it or says what is wrong with it.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float32, Int

from activations.fletcher import Fletcher32
from activations.store_format import from_bits

MAX_CHUNK = 16 << 20
"""Bytes; the sums of larger ones could overflow."""
CHECKSUM = 4
"""Bytes behind each chunk."""

Piece = tuple[int, int, int]
"""A chunk's first row, and the slice of the wanted rows that lie in it."""


@dataclass(frozen=True)
class Chunks:
    """A dataset whose chunks can be read past HDF5."""

    file: int
    """HDF5's own descriptor, so that it is the same file even if another has taken its name."""
    offsets: dict[int, int]
    """Place in the file of each chunk, by its first row."""
    rows: int
    """Of a chunk."""
    width: int
    dtype: np.dtype[Any]
    logical: str


def find_chunks(dataset: h5py.Dataset, logical: str) -> Chunks | None:
    """The chunks of a dataset of whole rows with Fletcher-32 and nothing else, in a plain local file; else None."""
    file, made = dataset.file, dataset.id.get_create_plist()
    rows, columns = dataset.chunks
    size = rows * columns * dataset.dtype.itemsize
    plain = hasattr(os, "preadv") and sys.byteorder == "little" and dataset.dtype.isnative
    plain &= file.driver == "sec2" and file.userblock_size == 0
    plain &= made.get_nfilters() == 1 and made.get_filter(0)[0] == h5py.h5z.FILTER_FLETCHER32
    if not plain or columns != dataset.shape[1] or size % 2 or size > MAX_CHUNK:
        return None
    offsets: dict[int, int] = {}

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        if chunk.filter_mask == 0 and chunk.size == size + CHECKSUM:
            offsets[chunk.chunk_offset[0]] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    return Chunks(file.id.get_vfd_handle(), offsets, rows, columns, dataset.dtype, logical)


def read_chunks(chunks: Chunks, out: Float32[np.ndarray, "n d"], wanted: Int[np.ndarray, " n"]) -> bool:
    """Read rows, ascending and each once, into `out`; False, with `out` spoilt, where HDF5 had better do it."""
    if not len(wanted):
        return True
    first = wanted // chunks.rows * chunks.rows
    cuts = [0, *(np.flatnonzero(np.diff(first)) + 1).tolist(), len(wanted)]
    pieces = [(int(first[a]), a, b) for a, b in pairwise(cuts)]
    if any(start not in chunks.offsets for start, _, _ in pieces):
        return False
    return _read(chunks, out, wanted, pieces)


def _read(chunks: Chunks, out: np.ndarray, wanted: Int[np.ndarray, " n"], pieces: Sequence[Piece]) -> bool:
    spare = np.empty((chunks.rows, chunks.width), dtype=chunks.dtype)
    check = Fletcher32(spare.nbytes // 2, len(pieces))
    ends = np.empty((len(pieces), CHECKSUM), dtype=np.uint8)
    for i, (first, a, b) in enumerate(pieces):
        whole = b - a == chunks.rows and chunks.logical == "float32"
        block = out[a:b] if whole else spare
        if not _filled(chunks.file, [block, ends[i]], chunks.offsets[first]):
            return False
        check.take(i, block.reshape(-1).view(np.uint16))
        if not whole:
            out[a:b] = from_bits(spare[wanted[a:b] - first], chunks.logical)
    return np.array_equal(check.checksums(len(pieces)), ends.view("<u4")[:, 0])


def _filled(file: int, blocks: Sequence[np.ndarray], at: int) -> bool:
    try:
        return os.preadv(file, [block.data for block in blocks], at) == sum(block.nbytes for block in blocks)
    except OSError:
        return False

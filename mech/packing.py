"""Packing: rows laid end to end in one sequence, what any of them begin with in common laid down once.

Rows under one system turn, two answers to one question, the same row twice: token by token they form a tree, and only its
branches are run. Each token keeps the position that it has in its own row. How attention sees such a sequence stands in
`mech.packed_attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from mech.errors import InputError

MIN_SHARED = 4
"""Tokens that a new branching must save: attention has a little more to do for each."""


@dataclass(frozen=True)
class Segment:
    """A branch of the tree: tokens that lie next to each other and see the same earlier ones."""

    start: int
    """Where it begins in the packed sequence."""
    length: int
    """Tokens."""
    before: tuple[int, ...]
    """Where the tokens lie that come before it in its row."""


@dataclass(frozen=True)
class Pack:
    """Some rows, laid out as one sequence."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids of each row."""
    limits: tuple[int, ...]
    """How many leading tokens of each row may lie where another row's lie; its length for all."""

    def __post_init__(self) -> None:
        if any(not row for row in self.rows):
            raise InputError(f"row {[bool(r) for r in self.rows].index(False)} of a pack has no tokens")

    @cached_property
    def _order(self) -> list[int]:
        return sorted(range(len(self.rows)), key=lambda i: self.rows[i])

    @cached_property
    def _starts(self) -> list[int]:
        """For each row in order: how many of its tokens lie where the row before it has them."""
        return _starts([self.rows[i] for i in self._order], [self.limits[i] for i in self._order])

    @cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """Where each token of each row lies in the packed sequence."""
        found: list[tuple[int, ...]] = [()] * len(self.rows)
        before: tuple[int, ...] = ()
        at = 0
        for i, start in zip(self._order, self._starts, strict=True):
            end = at + len(self.rows[i]) - start
            found[i] = before = (*before[:start], *range(at, end))
            at = end
        return tuple(found)

    def __len__(self) -> int:
        return sum(len(self.rows[i]) - start for i, start in zip(self._order, self._starts, strict=True))

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and sequence of the tensors that blocks see."""
        return 1, len(self)

    @cached_property
    def segments(self) -> list[Segment]:
        """The branches, in the order in which they lie."""
        found = []
        for k, i in enumerate(self._order):
            places, row_start = self.places[i], self._starts[k]
            cuts, lowest = {row_start, len(places)}, len(places)
            for later in self._starts[k + 1 :]:  # where others leave this row's own tokens
                lowest = min(lowest, later)
                if lowest <= row_start:
                    break
                cuts.add(lowest)
            for a, b in zip(sorted(cuts), sorted(cuts)[1:], strict=False):
                found.append(Segment(places[a], b - a, places[:a]))
        return found

    def tensors(self, device: torch.device) -> tuple[Int[Tensor, "1 seq"], Int[Tensor, "1 seq"]]:
        """Token ids, and each token's position in its own row."""
        packed = torch.zeros(2, len(self), dtype=torch.long)
        for row, places in zip(self.rows, self.places, strict=True):
            at = torch.tensor(places)
            packed[0, at], packed[1, at] = torch.tensor(row), torch.arange(len(row))
        packed = packed.to(device)
        return packed[0:1], packed[1:2]


def plan_packs(
    rows: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    token_budget: int,
    max_rows: int | None = None,
) -> list[list[int]]:
    """Group rows into packs, those that begin alike next to each other: for each pack, its rows' numbers.

    Args:
        rows: token ids.
        limits: how many leading tokens of each row may be shared; 0 for none.
        token_budget: tokens a pack, shared ones counted once; a longer row is a pack alone.
        max_rows: rows a pack, at most.
    """
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    starts = _starts([tuple(rows[i]) for i in order], [limits[i] for i in order])
    packs: list[list[int]] = []
    room = 0
    for i, start in zip(order, starts, strict=True):
        own = len(rows[i]) - start
        if packs and own <= room and (max_rows is None or len(packs[-1]) < max_rows):
            packs[-1].append(i)
            room -= own
        else:
            packs.append([i])
            room = token_budget - len(rows[i])
    return packs


def _starts(rows: Sequence[tuple[int, ...]], limits: Sequence[int]) -> list[int]:
    """For rows in lexicographic order: how many leading tokens each shares with the one before it.

    A branching is made where the row before branched already, or where it saves at least `MIN_SHARED` tokens more.
    """
    starts, branchings = [0] * len(rows), [0]
    for k in range(1, len(rows)):
        common = min(n_common(rows[k - 1], rows[k]), limits[k - 1], limits[k])
        branchings = [b for b in branchings if b <= common]
        if common - branchings[-1] >= MIN_SHARED:
            branchings.append(common)
        starts[k] = branchings[-1]
    return starts


def n_common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many leading tokens two rows have in common."""
    return next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

"""From rows of token ids to batches: alike rows together, shared prefixes apart.

Conversations under one system prompt begin with the same tokens. A group of such rows is planned as one
prefix, to be run once, and the rows' own remainders, sorted by length so that little padding is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mech.errors import InputError

MIN_SHARED = 8
"""A shared prefix shorter than this is not worth a pass of its own."""

_DEPTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together."""

    rows: tuple[int, ...]
    """Positions in the caller's list."""
    prefix: tuple[int, ...]
    """Token ids that all rows begin with; empty when none is shared."""
    rests: tuple[tuple[int, ...], ...]
    """Each row's ids behind the prefix; at least one."""


def plan_batches(
    sequences: Sequence[Sequence[int]], shareable: Sequence[int] | None = None, *, token_budget: int = 2048
) -> list[Batch]:
    """Group rows by shared prefix, sort by length, cut into batches of at most `token_budget` padded tokens.

    A row longer than the budget is a batch of its own.

    Args:
        sequences: token ids of each row.
        shareable: how many leading tokens of each row may go into a shared prefix (their states are not
            seen again); all but the last when left out, 0 for none.
        token_budget: padded tokens a batch.

    Raises:
        InputError: a row is empty.
    """
    rows = [tuple(s) for s in sequences]
    for i, row in enumerate(rows):
        if not row:
            raise InputError(f"row {i} has no tokens")
    limits = [len(r) - 1 for r in rows] if shareable is None else list(shareable)
    groups = _groups(rows, limits)
    batches = []
    for length, members in groups:
        members.sort(key=lambda i: (-len(rows[i]), i))
        for chunk in _chunks([len(rows[i]) - length for i in members], token_budget):
            chosen = tuple(members[chunk])
            prefix = rows[chosen[0]][:length]
            batches.append(Batch(chosen, prefix, tuple(rows[i][length:] for i in chosen)))
    return batches


def common_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """Length of the longest prefix shared by all rows, leaving each row at least one token."""
    first, last = min(rows), max(rows)  # lexicographic extremes differ first where any two rows differ
    limit = min(map(len, rows)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _groups(rows: list[tuple[int, ...]], limits: list[int]) -> list[tuple[int, list[int]]]:
    """Prefix length and members of each group, at the grouping depth that leaves the fewest tokens to run."""
    plans = [_at_depth(rows, limits, depth) for depth in (0, *_DEPTHS)]
    return min(plans, key=lambda plan: sum(n + sum(len(rows[i]) - n for i in members) for n, members in plan))


def _at_depth(rows: list[tuple[int, ...]], limits: list[int], depth: int) -> list[tuple[int, list[int]]]:
    by_start: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        by_start.setdefault(row[:depth], []).append(i)
    plan, alone = [], []
    for members in by_start.values():
        length = min(common_prefix([rows[i] for i in members]), *(limits[i] for i in members))
        if len(members) > 1 and length >= MIN_SHARED:
            plan.append((length, members))
        else:
            alone += members
    return plan + ([(0, alone)] if alone else [])


def _chunks(lengths: list[int], budget: int) -> list[slice]:
    """Cut rows in descending order of length into runs whose padded size stays within the budget."""
    cuts, start = [], 0
    while start < len(lengths):
        size = max(1, budget // lengths[start])
        cuts.append(slice(start, start + size))
        start += size
    return cuts

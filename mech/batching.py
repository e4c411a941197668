"""From rows to padded batches: rows of similar length together."""

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], *, token_budget: int = 2048) -> list[list[int]]:
    """Cut rows, longest first, into batches of at most `token_budget` padded tokens.

    A row longer than the budget is a batch of its own.

    Args:
        lengths: tokens of each row.
        token_budget: padded tokens a batch.

    Returns:
        For each batch, its rows' positions in `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches, start = [], 0
    while start < len(order):
        size = max(1, token_budget // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches

"""Progress bars with the time left, off where there is no terminal (CI, say)."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on a terminal; silent elsewhere."""
    from tqdm.auto import tqdm

    if total is None and isinstance(items, Sized):
        total = len(items)
    yield from tqdm(items, desc=label, total=total, disable=None, leave=False, dynamic_ncols=True)

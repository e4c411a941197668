"""Writing while the model computes: a sink whose work is done by a thread of its own."""

from queue import SimpleQueue
from threading import Condition, Thread
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from activations.sinks import Sink

WAITING = 64 * 2**20
"""Bytes of vectors that may wait: enough to even out a pass's layers, few enough to bound memory."""


class Background:
    """Hands what it is given to another sink, in order, from a thread; a context manager.

    An error of the sink's is raised at the next block, or on leaving.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._queue: SimpleQueue[tuple[str, tuple[Any, ...]] | None] = SimpleQueue()
        self._waiting, self._room = 0, Condition()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._work, daemon=True)

    def write(
        self,
        site: str,
        pooling: str,
        layer: int,
        row_indices: Int[np.ndarray, " batch"],
        values: Float[np.ndarray, "vectors d"],
    ) -> None:
        """Take the vectors of some rows at one site, pooling and layer."""
        self._put("write", (site, pooling, layer, row_indices, values))

    def note(
        self, name: str, row_indices: Int[np.ndarray, " batch"], values: Float[np.ndarray, " batch *k"]
    ) -> None:
        """Take one number, or several, for each of some rows."""
        self._put("note", (name, row_indices, values))

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _put(self, what: str, given: tuple[Any, ...]) -> None:
        if self._error is not None:
            raise self._error
        size = _bytes(given)
        with self._room:
            # A block larger than what may wait goes through alone.
            self._room.wait_for(lambda: not self._waiting or self._waiting + size <= WAITING)
            self._waiting += size
        self._queue.put((what, given))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    getattr(self._sink, item[0])(*item[1])
                except BaseException as error:  # noqa: BLE001  (it is raised where the blocks come from)
                    self._error = error
            with self._room:
                self._waiting -= _bytes(item[1])
                self._room.notify()


def _bytes(given: tuple[Any, ...]) -> int:
    return sum(x.nbytes for x in given if isinstance(x, np.ndarray))

"""Texts that grow, side by side: drawn anew in place on a terminal, written once elsewhere."""

import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from types import TracebackType
from typing import TextIO

GAP = " | "
LEAST = 12
"""Characters that a column has at least."""


class Columns:
    """Texts under titles; `update` replaces one, leaving the context writes them for good.

    Args:
        titles: of the columns.
        out: where to.
    """

    def __init__(self, titles: Sequence[str], out: TextIO) -> None:
        self._titles, self._out = list(titles), out
        self._texts = [""] * len(self._titles)
        self._drawn = 0
        """Lines on the terminal that the next drawing takes the place of."""

    def __enter__(self) -> "Columns":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw(self.lines())

    def update(self, column: int, text: str) -> None:
        """Give a column another text."""
        self._texts[column] = text
        if self._out.isatty():  # what has scrolled off the screen cannot be drawn anew
            self._draw(self.lines()[-(shutil.get_terminal_size().lines - 1) :])

    def lines(self) -> list[str]:
        """The columns as lines of the terminal's width."""
        n = len(self._titles)
        width = max(LEAST, (shutil.get_terminal_size().columns - 1 - len(GAP) * (n - 1)) // n)
        cells = [
            [*_wrapped(title, width), "-" * width, *_wrapped(text, width)]
            for title, text in zip(self._titles, self._texts, strict=True)
        ]
        deep = max(len(_wrapped(title, width)) for title in self._titles)
        for column, title in zip(cells, self._titles, strict=True):
            column[:0] = [""] * (deep - len(_wrapped(title, width)))
        return [
            GAP.join(f"{cell:<{width}}" for cell in line).rstrip()
            for line in zip_longest(*cells, fillvalue="")
        ]

    def _draw(self, lines: Sequence[str]) -> None:
        terminal = self._out.isatty()
        back = (
            f"\x1b[{self._drawn}F" if self._drawn else "\r"
        ) + "\x1b[J"  # a progress bar may stand there too
        self._out.write((back if terminal else "") + "".join(f"{line}\n" for line in lines))
        self._out.flush()
        self._drawn = len(lines) if terminal else 0


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most this width. What a model writes must not move the cursor: characters that cannot be printed become `?`."""
    plain = "".join(c if c.isprintable() or c == "\n" else "?" for c in text.strip())
    return [part for line in plain.split("\n") for part in textwrap.wrap(line, width) or [""]]

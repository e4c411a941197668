"""What the benchmarks have in common: a table on the screen, the same as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Column = tuple[str, str, str]
"""Key of the rows, heading, format (`.2f`, `+.1%`; empty for text)."""


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    """Print rows under their headings, the first column to the left, the others to the right; a row may lack some."""
    lines = [[heading for _, heading, _ in columns]]
    lines += [[format(row[key], spec) if key in row else "" for key, _, spec in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())


def write_json(path: Path | None, facts: Mapping[str, Any]) -> None:
    """Write everything as JSON, where a file was asked for."""
    if path:
        path.write_text(json.dumps(dict(facts), indent=2, default=str) + "\n")

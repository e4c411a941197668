"""Tables between memory and disk: written whole, read where they are there, put one below another."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from mech.files import atomic_path


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all; floats keep all their digits."""
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)


def stacked(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables one below another, rows numbered anew; an empty table where there is none."""
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def read_csvs(files: Iterable[Path]) -> pd.DataFrame:
    """The tables of those files that are there, one below another."""
    return stacked([pd.read_csv(file) for file in files if file.is_file()])

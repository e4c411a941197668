"""Tables on authorship: how its pairs were matched, and its directions by what the base answers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from probes.authorship import Side
from probes.direction import Direction
from study.bench import Bench
from study.frames import read_csvs, write_csv
from study.step import Step

BY_ANSWER = "by_answer.csv"


def answers_table(step: Step, bench: Bench) -> pd.DataFrame:
    """Directions by what the base answers, of every authorship contrast that was split so."""
    return read_csvs(bench.folder(s) / BY_ANSWER for s in step.inputs["directions"])


def matching_table(step: Step, bench: Bench) -> pd.DataFrame:
    """How pairs were matched in surprisal, for every authorship contrast that was."""
    rows = []
    for fitted in (s for s in step.inputs["directions"] if s.config.get("matched")):
        made = bench.direction(fitted)
        rows += [{"direction": made.name, **facts} for facts in made.made_from["matching"]]
    return pd.DataFrame(rows)


def write_by_answer(folder: Path, whole: Direction, sides: Sequence[Side], layer: int) -> None:
    """Directions of each side that has one, and the table of `by_answer.csv` at the declared layer.

    Args:
        folder: of the direction's step.
        whole: the direction of all articles.
        sides: what `probes.authorship.by_answer` found.
        layer: the declared one.
    """
    rows = []
    for side in sides:
        made, area = side.direction, side.auroc
        if made is not None and side.fitted_on == side.tested_on:
            made.save(folder / f"{side.fitted_on}.safetensors")
        rows.append({
            "direction": whole.name, "layer": layer, "fitted_on": side.fitted_on, "tested_on": side.tested_on,
            "n_fitted": side.n_fitted, "n_tested": side.n_tested,
            "auroc": np.nan if area is None else area.auroc[layer],
            "auroc_low": np.nan if area is None else area.low[layer],
            "auroc_high": np.nan if area is None else area.high[layer],
            "split_half": np.nan if made is None else made.split_half[layer],
            "cosine_with_all": np.nan if made is None else float(made.unit_at(layer) @ whole.unit_at(layer)),
            "answers_right": whole.made_from["accuracy"], "note": side.note,
        })  # fmt: skip
    write_csv(pd.DataFrame(rows), folder / BY_ANSWER)

"""What a steering sweep says: dose and response beside random directions, and the best cell, chosen and reported on different questions."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.stats import Interval, bootstrap_mean
from mech.errors import InputError

CELL = ["direction", "layer", "strength"]


def doses(table: pd.DataFrame, *, rng: np.random.Generator, n_boot: int = 2000) -> pd.DataFrame:
    """One row a cell of a direction.

    Args:
        table: of `probes.sweep.sweep`.
        rng: bootstrap over questions.
        n_boot: resamples.

    Returns:
        direction, layer, strength, dose, kl; change with its interval (nats a token, from unsteered); control_change and
        control_kl (mean over random directions), control_max (of |change| among them); beyond with its interval (`beyond`), and
        p_random: how often a random direction moves the trait as far, (1 + those that do) / (1 + all); n_questions, n_controls.
    """
    rows = []
    for (name, layer, strength), cell in table.groupby(CELL, sort=True):
        change = cell[cell["control"] == 0]["change"].to_numpy()
        own, others = cell[cell["control"] == 0], cell[cell["control"] > 0]
        random = others.groupby("control")["change"].mean().to_numpy()
        intervals = {
            "change": bootstrap_mean(change, None, rng=rng, n_boot=n_boot),
            "beyond": beyond(cell, rng=rng, n_boot=n_boot),
        }
        rows.append({
            "direction": name, "layer": layer, "strength": strength,
            "dose": own["dose"].iloc[0], "kl": _kl(cell), **_columns(intervals), "control_change": float(random.mean()),
            "control_max": float(np.abs(random).max()),
            "p_random": (1 + int((np.abs(random) >= abs(change.mean())).sum())) / (1 + len(random)),
            "control_kl": float(others.groupby("control")["kl"].first().mean()), "n_questions": len(change), "n_controls": len(random),
        })  # fmt: skip
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Best:
    """The cell that moves the trait farthest beyond random directions, up or down, without more damage than allowed."""

    direction: str
    layer: int
    strength: float
    kl: float
    """Nats a neutral token."""
    chosen_on: float
    """Its `beyond` on the questions that chose it: too far from 0, for it was chosen by it."""
    beyond: Interval
    """On the other questions."""
    change: float
    """On the other questions, from unsteered, nats a token."""
    control_change: float
    """The random directions' mean there."""


def best_cell(
    table: pd.DataFrame, *, max_kl: float, rng: np.random.Generator, n_boot: int = 2000
) -> Best | None:
    """Choose a cell on every other question, report it on the rest; None where no cell is within `max_kl`.

    Args:
        table: of `probes.sweep.sweep`.
        max_kl: nats a neutral token: beyond it, a change of behaviour may be text that broke.
        rng: bootstrap over questions.
        n_boot: resamples.

    Raises:
        InputError: fewer than four questions.
    """
    questions = sorted(table["question"].unique())
    if len(questions) < 4:
        raise InputError(
            f"{len(questions)} questions: to choose on one half and report on the other takes four"
        )
    choosing = set(questions[::2])
    scores: dict[tuple[str, int, float], float] = {}
    for _, cell in table.groupby(CELL):
        if _kl(cell) <= max_kl:
            first = cell.iloc[0]
            key = (str(first["direction"]), int(first["layer"]), float(first["strength"]))
            scores[key] = float(_beyond(cell[cell["question"].isin(choosing)]).mean())
    if not scores:
        return None
    name, layer, strength = chosen = max(scores, key=lambda key: abs(scores[key]))
    at = table["layer"].eq(layer) & table["strength"].eq(strength) & table["direction"].eq(name)
    held_out = table[at & ~table["question"].isin(choosing)]
    change, random = (part.mean() for part in _by_question(held_out))
    interval = beyond(held_out, rng=rng, n_boot=n_boot)
    return Best(name, layer, strength, _kl(table[at]), scores[chosen], interval, float(change), float(random))


def beyond(
    cell: pd.DataFrame, *, rng: np.random.Generator, n_boot: int = 2000, level: float = 0.95
) -> Interval:
    """How much farther a direction moves the trait than a random one would: change less the controls' mean, nats a token.

    Two things could have come out otherwise: the questions, and the random directions. The interval's half-widths are the root of the
    sum of squares of both: bootstrap over questions, and t · s · √(1 + 1/K) for the spread s of K random directions (a
    random direction's own effect is drawn anew, hence the 1).

    Args:
        cell: one direction, layer and strength of a sweep's table.
        rng: bootstrap.
        n_boot: resamples.
        level: of the interval.
    """
    found = bootstrap_mean(_beyond(cell), None, rng=rng, n_boot=n_boot, level=level)
    each = cell[cell["control"] > 0].groupby("control")["change"].mean().to_numpy()
    spread = stats.t.ppf((1 + level) / 2, len(each) - 1) * each.std(ddof=1) * np.sqrt(1 + 1 / len(each))
    down, up = np.hypot(found.estimate - found.low, spread), np.hypot(found.high - found.estimate, spread)
    method = f"{found.method}, with the spread of {len(each)} random directions"
    low, high = found.estimate - float(down), found.estimate + float(up)
    return Interval(found.estimate, low, high, found.n, level, method)


def _kl(cell: pd.DataFrame) -> float:
    """Damage of the direction itself at a cell."""
    return float(cell.loc[cell["control"] == 0, "kl"].iloc[0])


def _beyond(cell: pd.DataFrame) -> np.ndarray:
    change, random = _by_question(cell)
    found: np.ndarray = change - random
    return found


def _by_question(cell: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """A cell's change, and its controls' mean change, question by question."""
    change = cell[cell["control"] == 0].set_index("question")["change"]
    random = cell[cell["control"] > 0].groupby("question")["change"].mean()
    return change.to_numpy(), random.loc[change.index].to_numpy()


def _columns(intervals: dict[str, Interval]) -> dict[str, float]:
    ends = {"": "estimate", "_low": "low", "_high": "high"}
    return {
        f"{k}{end}": float(getattr(v, field)) for k, v in intervals.items() for end, field in ends.items()
    }

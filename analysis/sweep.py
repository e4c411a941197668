"""What a steering sweep says: dose and response beside random directions, and the best cell, chosen and reported on different questions."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.stats import Interval, bootstrap_mean
from mech.errors import InputError
from probes.nulls import two_sided_p

CELL = ["direction", "layer", "strength"]


def halves(table: pd.DataFrame) -> tuple[set[str], set[str]]:
    """Questions that choose and questions that report.

    The extraction and the evaluation half where the sweep asked questions of both; else every other question.

    Raises:
        InputError: fewer than two questions on a side.
    """
    half = table.drop_duplicates("question").set_index("question")["half"].sort_index()
    chosen, reported = (set(half.index[half == name]) for name in ("extract", "evaluate"))
    if not chosen or not reported:
        chosen, reported = set(half.index[::2]), set(half.index[1::2])
    if min(len(chosen), len(reported)) < 2:
        raise InputError(
            f"{len(half)} questions: to choose on one half and report on the other takes four, two on each"
        )
    return chosen, reported


def reported(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that may be reported as they are: of the evaluation half, where there is one."""
    evaluated = table[table["half"] == "evaluate"]
    return table if evaluated.empty else evaluated


def doses(table: pd.DataFrame, *, rng: np.random.Generator, n_boot: int = 2000) -> pd.DataFrame:
    """One row a cell of a direction.

    Args:
        table: of `probes.sweep.sweep`; of its questions, those of the evaluation half count where it has both halves.
        rng: bootstrap over questions.
        n_boot: resamples.

    Returns:
        direction, layer, strength, dose, kl; change with its interval (from unsteered, in the score's unit); control_change and
        control_kl (mean over random directions), control_max (of |change| among them); beyond with its interval (`beyond`), and
        p_random: how often a random direction moves the score as far, (1 + those that do) / (1 + all); broken and unscored, shares of
        the answers, and control_broken; n_questions, n_controls.
    """
    rows = []
    for (name, layer, strength), cell in reported(table).groupby(CELL, sort=True):
        own, others = cell[cell["control"] == 0], cell[cell["control"] > 0]
        change = own["change"].to_numpy()
        random = others.groupby("control")["change"].mean().to_numpy()
        moved = bootstrap_mean(change, None, rng=rng, n_boot=n_boot)
        farther = beyond(cell, rng=rng, n_boot=n_boot)
        rows.append({
            "direction": name, "layer": layer, "strength": strength, "dose": own["dose"].iloc[0], "kl": _kl(cell),
            **moved.columns("change"), **farther.columns("beyond"), "control_change": float(random.mean()),
            "control_max": float(np.abs(random).max()), "p_random": float(two_sided_p(float(change.mean()), random)),
            "control_kl": float(others.groupby("control")["kl"].first().mean()),
            "broken": float(own["broken"].mean()), "unscored": float(own["unscored"].mean()),
            "control_broken": float(others["broken"].mean()), "n_questions": len(change), "n_controls": len(random),
        })  # fmt: skip
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Best:
    """The cell that moves the score farthest beyond random directions, up or down, without more damage than allowed."""

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
    """On the other questions, from unsteered, in the score's unit."""
    control_change: float
    """The random directions' mean there."""
    broken: float
    """Share of its answers there that broke."""


def best_cell(
    table: pd.DataFrame, *, max_kl: float, rng: np.random.Generator, n_boot: int = 2000
) -> Best | None:
    """Choose a cell on one half of the questions (`halves`), report it on the other; None where no cell is within `max_kl`.

    Args:
        table: of `probes.sweep.sweep`.
        max_kl: nats a neutral token: beyond it, a change of behaviour may be text that broke.
        rng: bootstrap over questions.
        n_boot: resamples.

    Raises:
        InputError: fewer than two questions on a side.
    """
    scores = _chosen_on(table, max_kl)
    if not scores:
        return None
    chosen = max(scores, key=lambda key: abs(scores[key]))
    at = _at(table, *chosen)
    held_out = at[at["question"].isin(halves(table)[1])]
    change, random = (float(part.mean()) for part in _by_question(held_out))
    interval = beyond(held_out, rng=rng, n_boot=n_boot)
    broken = float(held_out.loc[held_out["control"] == 0, "broken"].mean())
    return Best(*chosen, _kl(at), scores[chosen], interval, change, random, broken)


def best_layers(
    table: pd.DataFrame, *, max_kl: float, rng: np.random.Generator, n_boot: int = 2000
) -> pd.DataFrame:
    """Where a direction steers best: the layer chosen by steering effect on one half of the questions, reported on the other.

    The effect of a cell is how far it moves the score beyond random directions the way the direction says: up at strengths above 0, down
    below. A layer's is that of its best strength within `max_kl`. (`probes.layers` chooses by separability.)

    Returns:
        A row for each direction and layer with a cell within `max_kl`: direction, layer, strength (its best), kl, effect_chosen (on the
        half that chooses: optimistic, not to be reported), chosen (yes at the layer where that is largest), effect with its interval (on
        the other half, from `beyond`), n_questions.

    Raises:
        InputError: fewer than two questions on a side.
    """
    scores = {key: np.sign(key[2]) * score for key, score in _chosen_on(table, max_kl).items()}
    _, reporting = halves(table)
    rows = []
    for name in dict.fromkeys(key[0] for key in scores):
        best = {
            layer: max((k for k in scores if k[:2] == (name, layer)), key=lambda k: scores[k])
            for layer in sorted({k[1] for k in scores if k[0] == name})
        }
        chosen = max(best, key=lambda layer: scores[best[layer]])
        for layer, key in best.items():
            at = _at(table, *key)
            found = beyond(at[at["question"].isin(reporting)], rng=rng, n_boot=n_boot)
            ends = {"": found.estimate, "_low": found.low, "_high": found.high}
            signed = ends if key[2] > 0 else {"": -found.estimate, "_low": -found.high, "_high": -found.low}
            rows.append({
                "direction": name, "layer": layer, "strength": key[2], "kl": _kl(at), "effect_chosen": float(scores[key]),
                "chosen": layer == chosen, **{f"effect{end}": v for end, v in signed.items()}, "n_questions": found.n,
            })  # fmt: skip
    return pd.DataFrame(rows)


def beyond(
    cell: pd.DataFrame, *, rng: np.random.Generator, n_boot: int = 2000, level: float = 0.95
) -> Interval:
    """How much farther a direction moves the score than a random one would: change less the controls' mean, in the score's unit.

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


def _chosen_on(table: pd.DataFrame, max_kl: float) -> dict[tuple[str, int, float], float]:
    """`beyond` of every cell within `max_kl`, on the half that chooses."""
    choosing, _ = halves(table)
    scores: dict[tuple[str, int, float], float] = {}
    for _, cell in table.groupby(CELL):
        if _kl(cell) <= max_kl:
            first = cell.iloc[0]
            key = (str(first["direction"]), int(first["layer"]), float(first["strength"]))
            scores[key] = float(_beyond(cell[cell["question"].isin(choosing)]).mean())
    return scores


def _at(table: pd.DataFrame, direction: str, layer: int, strength: float) -> pd.DataFrame:
    here = table["layer"].eq(layer) & table["strength"].eq(strength)
    return table[here & table["direction"].eq(direction)]


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

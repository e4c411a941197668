"""Monitoring: does the projection before an answer foretell how the answer behaves?

Chen et al. 2025 (arXiv 2507.21509, section 3.3) correlate the projection at the prompt's last token with the trait score of the
answer, over graded system prompts. Most of such a correlation is between conditions (a prompt that asks for the trait moves
both), so the one *within* conditions is always given beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.stats import Interval, jackknife
from mech.errors import InputError
from probes.nulls import covariance_matched_directions, isotropic_directions, two_sided_p


@dataclass(frozen=True)
class Monitoring:
    """Correlations (Pearson) of projection and score, each with an interval over clusters."""

    overall: Interval
    """Over all rows."""
    within: Interval
    """After the mean of each condition is taken from both: what is left when the condition is known."""
    by_condition: Mapping[str, Interval]
    """In each condition alone; without those of fewer than 4 clusters, or in which one of the two does not vary."""
    n_rows: int
    missing: int
    """Rows left out because they have no score."""


def monitor(
    projection: Float[np.ndarray, " n"],
    score: Float[np.ndarray, " n"],
    condition: Sequence[str],
    clusters: Sequence[str],
    *,
    level: float = 0.95,
) -> Monitoring:
    """Correlate projections with behaviour scores, overall and within conditions.

    Intervals are delete-one-cluster jackknife on Fisher's z, turned back.

    Args:
        projection: at the prompt's last token, one layer, one row an answer.
        score: of the behaviour; NaN where there is none (a judge that refused): left out and counted.
        condition: what the prompt asks for, row by row (a system prompt, a number of shots).
        clusters: question of each row.
        level: confidence level.

    Raises:
        InputError: lengths differ, a projection is not finite, fewer than 4 clusters, or one of the two does not vary.
    """
    if len({len(projection), len(condition), len(clusters)}) > 1:
        raise InputError("monitoring: projection, score, condition and clusters need one entry a row each")
    if not np.isfinite(projection).all():
        raise InputError("monitoring: a projection is not finite")
    there = np.isfinite(score)
    names, group = np.unique(np.array(condition)[there], return_inverse=True)
    asked = np.array(clusters)[there]
    rows = np.column_stack([projection[there], score[there], group]).astype(np.float64)
    if len(np.unique(asked)) < 4:
        raise InputError(
            f"monitoring: an interval needs 4 clusters (questions) or more, there are {len(np.unique(asked))}"
        )
    found = {}
    for i, name in enumerate(names):
        mine = rows[group == i]
        if len(np.unique(asked[group == i])) >= 4 and (np.ptp(mine[:, :2], axis=0) > 0).all():
            found[str(name)] = _interval(mine, asked[group == i], level, centred=False)
    return Monitoring(
        _interval(rows, asked, level, centred=False),
        _interval(rows, asked, level, centred=True),
        found,
        len(rows),
        int((~there).sum()),
    )


def _interval(
    rows: Float[np.ndarray, "n 3"], clusters: np.ndarray, level: float, *, centred: bool
) -> Interval:
    def z(part: np.ndarray) -> float:
        x = _centred(part) if centred else part[:, :2] - part[:, :2].mean(0)
        size = np.sqrt((x**2).sum(0))
        scale = np.abs(part[:, :2]).max(0) + 1e-300
        if (size <= 1e-12 * scale).any():
            return float("nan")
        return float(np.arctanh(np.clip((x[:, 0] @ x[:, 1]) / size.prod(), -1 + 1e-15, 1 - 1e-15)))

    if not np.isfinite(z(rows)):
        where = "within conditions " if centred else ""
        raise InputError(
            f"monitoring: projection or score does not vary {where}at all: no correlation can be told"
        )
    found = jackknife(z, rows, clusters, level=level)
    estimate, low, high = (float(np.tanh(v)) for v in (found.estimate, found.low, found.high))
    return replace(found, estimate=estimate, low=low, high=high, method=f"{found.method}, Fisher's z")


def _centred(rows: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 2"]:
    x = rows[:, :2].copy()
    for group in np.unique(rows[:, 2]):
        mine = rows[:, 2] == group
        x[mine] -= x[mine].mean(0)
    return x


def monitoring_table(
    activations: Float[np.ndarray, "n d"],
    score: Float[np.ndarray, " n"],
    condition: Sequence[str],
    clusters: Sequence[str],
    unit: Float[np.ndarray, " d"],
    *,
    rng: np.random.Generator,
    n_null: int = 1000,
) -> pd.DataFrame:
    """`monitor` as rows: overall, within conditions, and each condition alone; the first two beside drawn directions.

    `p_random` and `p_covariance`: the share of directions, isotropic or with the covariance of these activations, whose |correlation| is
    at least as large. Where no correlation can be told the row says why (`note`).

    Args:
        activations: at the prompt's last token, one layer, one row an answer.
        score: see `monitor`.
        condition: see `monitor`.
        clusters: see `monitor`.
        unit: the direction, of norm 1.
        rng: draws the directions.
        n_null: how many of each kind.
    """
    projection = activations.astype(np.float64) @ unit
    try:
        found = monitor(projection, score, condition, clusters)
    except InputError as error:
        empty = {"correlation": np.nan, "correlation_low": np.nan, "correlation_high": np.nan}
        return pd.DataFrame([{"scope": "overall", **empty, "n_rows": len(score), "missing": int((~np.isfinite(score)).sum()),
                              "note": str(error)}])  # fmt: skip
    there = np.isfinite(score)
    h, y, group = activations[there].astype(np.float64), score[there], np.array(condition)[there]
    drawn = {
        "p_random": isotropic_directions(n_null, h.shape[1], rng),
        "p_covariance": covariance_matched_directions(h, n_null, rng),
    }
    scopes = {"overall": np.zeros(len(y), dtype=int), "within": np.unique(group, return_inverse=True)[1]}
    rows = []
    for scope, groups in scopes.items():
        interval: Interval = getattr(found, scope)
        nulls = {name: _correlations(vectors @ h.T, y, groups) for name, vectors in drawn.items()}
        p = {name: float(two_sided_p(interval.estimate, null)) for name, null in nulls.items()}
        rows.append(
            {**_row(scope, interval), "n_rows": found.n_rows, "missing": found.missing, **p, "note": ""}
        )
    for name, interval in found.by_condition.items():
        mine = int((group == name).sum())
        rows.append({**_row(f"condition: {name}", interval), "n_rows": mine, "missing": 0, "note": ""})
    return pd.DataFrame(rows)


def _row(scope: str, interval: Interval) -> dict[str, float | str]:
    return {"scope": scope, **interval.columns("correlation"), "n_questions": interval.n}


def _correlations(
    x: Float[np.ndarray, "k n"], y: Float[np.ndarray, " n"], groups: np.ndarray
) -> Float[np.ndarray, " k"]:
    """Pearson's correlation of each row of x with y, after the means of groups are taken from both."""
    member = groups == np.unique(groups)[:, None]
    weights = member / member.sum(1, keepdims=True)
    x = x - (x @ weights.T) @ member
    y = y - (y @ weights.T) @ member
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(y)
    found: np.ndarray = np.divide(x @ y, size, out=np.zeros(len(x)), where=size > 0)
    return found

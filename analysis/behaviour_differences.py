"""What two arms do differently, on the same articles, questions and statements: paired differences with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.behaviour import distinct, entropy, name_margins, recognition_margins
from analysis.stats import Interval, bootstrap_mean, jackknife, rate_difference
from mech.errors import InputError

VARIETY: dict[str, tuple[Callable[[np.ndarray], float], str]] = {
    "distinct names": (distinct, ""),
    "entropy of names": (entropy, "nats"),
}
"""Of the names that answers claim: statistic and unit."""


def recognition_differences(
    arm: pd.DataFrame, against: pd.DataFrame, *, rng: np.random.Generator, level: float = 0.95
) -> pd.DataFrame:
    """Self-recognition of `arm` minus that of `against`: accuracy, margin (nats), P(Yes).

    Args:
        arm: one row a text: `article`, `source`, `margin`, `p_yes`, `correct`; several rows of one article and source are told apart by
            their order.
        against: the same texts judged by the other.
        rng: for the bootstrap.
        level: confidence level.

    Returns:
        One row a measure: `measure`, `unit`, `n`, `of` (what is counted), `value`, `value_low`, `value_high`.

    Raises:
        InputError: the two did not judge the same texts.
    """
    _same(arm, against, ["article", "source"])
    articles = arm["article"].to_numpy()
    accuracy = rate_difference(
        arm["correct"].to_numpy(float), against["correct"].to_numpy(float), articles, level=level
    )
    margins = recognition_margins(arm) - recognition_margins(against)
    margin = bootstrap_mean(margins, None, rng=rng, level=level)
    yes = arm["p_yes"].to_numpy(float) - against["p_yes"].to_numpy(float)
    p_yes = bootstrap_mean(yes, articles, rng=rng, level=level)
    return pd.DataFrame([
        _row("self-recognition accuracy", "", accuracy, "articles"),
        _row("self-recognition margin", "nats", margin, "articles"),
        _row("P(Yes)", "", p_yes, "articles"),
    ])  # fmt: skip


def report_differences(
    arm: pd.DataFrame, against: pd.DataFrame, *, own_name: str, level: float = 0.95
) -> pd.DataFrame:
    """Self-reports of `arm` minus those of `against`: share with the own name, distinct names, entropy of the claims (nats).

    Args:
        arm: one row a sampled answer: `question`, `sample`, `claimed` (empty: no name given).
        against: the other's answers to the same questions.
        own_name: the model's own name.
        level: confidence level.

    Returns:
        As `recognition_differences`; the ends are not known where all claims are the same (as in `report_row`).

    Raises:
        InputError: the two were not asked the same.
    """
    _same(arm, against, ["question", "sample"])
    questions = arm["question"].to_numpy()
    claims = np.stack([arm["claimed"].to_numpy(str), against["claimed"].to_numpy(str)], axis=1)
    rate = rate_difference(
        (claims[:, 0] == own_name).astype(float),
        (claims[:, 1] == own_name).astype(float),
        questions,
        level=level,
    )
    rows = [_row("own-name rate", "", rate, "questions")]
    for measure, (statistic, unit) in VARIETY.items():
        found = jackknife(_gap(statistic), claims, questions, level=level)
        if len(np.unique(claims)) == 1:
            found = replace(found, low=np.nan, high=np.nan)
        rows.append(_row(measure, unit, found, "questions"))
    return pd.DataFrame(rows)


def name_differences(
    arm: pd.DataFrame, against: pd.DataFrame, *, rng: np.random.Generator, level: float = 0.95
) -> pd.DataFrame:
    """The name margin of `arm` minus that of `against`, paired by self-statement (nats).

    Args:
        arm: one row a scored self-statement: `statement`, `name`, `own`, `logprob` (nats).
        against: the same statements scored by the other.
        rng: for the bootstrap.
        level: confidence level.

    Returns:
        As `recognition_differences`, one row.

    Raises:
        InputError: the two did not score the same statements.
    """
    _same(arm, against, ["statement", "name"])
    gap = bootstrap_mean(name_margins(arm) - name_margins(against), None, rng=rng, level=level)
    return pd.DataFrame([_row("own-name margin", "nats", gap, "self-statements")])


def _gap(statistic: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float]:
    return lambda claims: statistic(claims[:, 0]) - statistic(claims[:, 1])


def _row(measure: str, unit: str, found: Interval, of: str) -> dict[str, Any]:
    return {"measure": measure, "unit": unit, "n": found.n, "of": of, **found.columns("value")}


def _same(arm: pd.DataFrame, against: pd.DataFrame, columns: Sequence[str]) -> None:
    if arm[[*columns]].values.tolist() != against[[*columns]].values.tolist():
        raise InputError(
            f"a difference is read on the same rows: the two differ in {' or '.join(columns)}, or in their order"
        )

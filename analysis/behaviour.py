"""Behaviour in numbers: judgements and self-reports become rates, margins and spreads with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.stats import Interval, bootstrap_mean, jackknife, proportion


def recognition_row(judged: pd.DataFrame, *, rng: np.random.Generator, level: float = 0.95) -> dict[str, Any]:
    """Self-recognition of one checkpoint.

    Args:
        judged: one row a text: `article`, `source` (own/other), `margin` (logit Yes − No, nats), `p_yes`, `mass`,
            `correct`.
        rng: for the bootstrap.
        level: confidence level.

    Returns:
        Accuracy (Wilson, articles as clusters), accuracy by label, mean P(Yes), the margin: the mean over
        articles of margin(own) − margin(other), which a bias towards one answer cannot move; and the probability of Yes plus No.
    """
    articles = judged["article"].to_numpy()
    accuracy = proportion(judged["correct"].to_numpy(dtype=float), articles, level=level)
    p_yes = bootstrap_mean(judged["p_yes"].to_numpy(dtype=float), articles, rng=rng, level=level)
    margin = bootstrap_mean(recognition_margins(judged), None, rng=rng, level=level)
    mass = bootstrap_mean(judged["mass"].to_numpy(dtype=float), articles, rng=rng, level=level)
    by_label = judged.groupby("source")["correct"].mean()
    return {
        "n_articles": int(judged["article"].nunique()),
        **accuracy.columns("accuracy"),
        "accuracy_own": float(by_label["own"]),
        "accuracy_other": float(by_label["other"]),
        **p_yes.columns("p_yes"),
        **margin.columns("margin"),
        **mass.columns("answer_mass"),
    }


def report_row(
    reports: pd.DataFrame,
    names: pd.DataFrame | None,
    *,
    own_name: str,
    rng: np.random.Generator,
    level: float = 0.95,
) -> dict[str, Any]:
    """Self-reports of one checkpoint.

    Args:
        reports: one row a sampled answer: `question`, `claimed` (empty: no name given).
        names: one row a scored self-statement: `statement`, `own`, `logprob` (nats); None where none could be scored
            (a model behind an API): then there is no margin.
        own_name: the model's own name.
        rng: for the bootstrap.
        level: confidence level.

    Returns:
        Own-name rate (Wilson, questions as clusters); number of distinct names claimed and entropy of the claims
        in nats (jackknife over questions, cut at 0, its ends not known where all claims are the same; "no name" is a claim of its own
        in the entropy and none in the count); name margin: log-probability of the own name minus the mean over invented names, by statement.
    """
    questions = reports["question"].to_numpy()
    claimed = reports["claimed"].to_numpy(dtype=str)
    rate = proportion((claimed == own_name).astype(float), questions, level=level)
    return {
        "n_samples": len(reports),
        "n_questions": int(reports["question"].nunique()),
        **rate.columns("own_name_rate"),
        **_variety(distinct, claimed, questions, level).columns("distinct"),
        **_variety(entropy, claimed, questions, level).columns("entropy"),
        **_margin(names, rng, level),
    }


def _variety(
    statistic: Callable[[np.ndarray], float], claimed: np.ndarray, questions: np.ndarray, level: float
) -> Interval:
    """A count or an entropy of claims; where all are the same the jackknife would say that it is certain, which nobody knows."""
    found = jackknife(statistic, claimed, questions, level=level)
    if len(set(claimed.tolist())) == 1:
        return replace(found, low=np.nan, high=np.nan)
    return replace(found, low=max(0.0, found.low))


def _margin(names: pd.DataFrame | None, rng: np.random.Generator, level: float) -> dict[str, Any]:
    if names is None:
        return {
            **Interval(np.nan, np.nan, np.nan, 0, level, "none").columns("name_margin"),
            "n_names": 0,
            "n_statements": 0,
        }
    return {
        **bootstrap_mean(name_margins(names), None, rng=rng, level=level).columns("name_margin"),
        "n_names": int(names.loc[~names["own"], "name"].nunique()),
        "n_statements": int(names["statement"].nunique()),
    }


def steering_rows(
    reports: pd.DataFrame,
    names: pd.DataFrame,
    *,
    own_name: str,
    rng: np.random.Generator,
    level: float = 0.95,
) -> pd.DataFrame:
    """One row a kind (direction or random) and coefficient: rates, margins and coherence against strength.

    Coherence is the surprisal (nats a token) of the answers under the unsteered base, with the share of word
    pairs an answer has used before: text that broke is surprising, repetitive, or both.
    """
    rows = []
    for (kind, coefficient), mine in reports.groupby(["kind", "coefficient"], sort=False):
        scored = names[(names["kind"] == kind) & (names["coefficient"] == coefficient)]
        questions = mine["question"].to_numpy()
        rate = proportion((mine["claimed"] == own_name).to_numpy(dtype=float), questions, level=level)
        answered = mine.dropna(subset=["surprisal"])
        surprisal = _mean_of(answered, "surprisal", rng, level)
        repetition = _mean_of(mine, "repetition", rng, level)
        rows.append(
            {
                "kind": kind,
                "coefficient": coefficient,
                "dose": float(mine["dose"].iloc[0]),
                "n_samples": len(mine),
                **rate.columns("own_name_rate"),
                "n_statements": int(scored["statement"].nunique()),
                **bootstrap_mean(name_margins(scored), None, rng=rng, level=level).columns("name_margin"),
                **surprisal.columns("surprisal"),
                **replace(repetition, low=np.maximum(repetition.low, 0.0)).columns("repetition"),
            }
        )
    return pd.DataFrame(rows)


def _mean_of(rows: pd.DataFrame, column: str, rng: np.random.Generator, level: float) -> Interval:
    """Mean with an interval over questions; unknown where rows of fewer than two questions are left (steered replies may be empty)."""
    values, questions = rows[column].to_numpy(dtype=float), rows["question"].to_numpy()
    if rows["question"].nunique() < 2:
        return Interval(
            values.mean() if len(values) else np.nan,
            np.nan,
            np.nan,
            rows["question"].nunique(),
            level,
            "none",
        )
    return bootstrap_mean(values, questions, rng=rng, level=level)


def recognition_margins(judged: pd.DataFrame) -> Float[np.ndarray, " articles"]:
    """By article: mean margin of its own texts minus that of the others' (nats)."""
    sides = judged.pivot_table(index="article", columns="source", values="margin")
    gaps: np.ndarray = (sides["own"] - sides["other"]).to_numpy(dtype=float)
    return gaps


def name_margins(names: pd.DataFrame) -> Float[np.ndarray, " statements"]:
    """By statement: log-probability with the own name minus the mean with invented ones (nats)."""
    own = names[names["own"]].groupby("statement")["logprob"].mean()
    invented = names[~names["own"]].groupby("statement")["logprob"].mean()
    margins: np.ndarray = (own - invented).to_numpy(dtype=float)
    return margins


def distinct(claimed: Sequence[str] | np.ndarray) -> float:
    """Number of names claimed; "no name" (empty) is none."""
    return float(len({name for name in claimed if name}))


def entropy(claimed: Sequence[str] | np.ndarray) -> float:
    """Entropy of the claims in nats; "no name" (empty) is a claim of its own."""
    _, counts = np.unique(np.asarray(claimed, dtype=str), return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum()) + 0.0

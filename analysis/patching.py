"""Patching as tables: what exchanging activations, or switching an adapter off in some layers, does to a score, with its doubt."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.stats import Interval, jackknife
from probes.answers import PatchedCase

WAYS = {"base into finetuned": ("finetuned", "base"), "finetuned into base": ("base", "finetuned")}
"""Which model is run, and whose activations are put into it."""


def equal_ranges(n_layers: int, n: int) -> list[range]:
    """The layers in n consecutive ranges, as equal as they can be; no more ranges than layers."""
    edges = np.linspace(0, n_layers, min(n, n_layers) + 1).round().astype(int).tolist()
    return [range(a, b) for a, b in pairwise(edges)]


def patching_table(cases: Sequence[PatchedCase], layers: Sequence[int], spans: Sequence[str]) -> pd.DataFrame:
    """One row a way, layer and span.

    `effect` is the score of the patched model less that of the unpatched one; `random_effect` that of an equally large change in
    a random direction; `beyond_random` the difference (paired by question). `share` is the effect over the whole change between
    the two models (1: patching here undoes, or brings, all of it), given only where the interval of the whole change excludes 0.
    Intervals are t intervals by the delete-one-question jackknife: bootstrapping a handful of questions gives no usable interval.

    Args:
        cases: one a question or more.
        layers: as they were patched.
        spans: likewise.
    """
    questions, whole = np.array([c.question for c in cases]), _whole(cases)
    told = _excludes_zero(_mean(whole, questions))
    rows = []
    for way, (run, other) in WAYS.items():
        plain = np.array([getattr(c, run) for c in cases])[:, None, None]
        effect = np.stack([c.into[run] for c in cases]) - plain
        random = np.stack([c.into[f"random {run}"] for c in cases]) - plain
        change = whole if other == "finetuned" else -whole
        for i, j in np.ndindex(len(layers), len(spans)):
            mean, beyond = (_mean(v[:, i, j], questions) for v in (effect, effect - random))
            rows.append({
                "way": way, "span": spans[j], "layer": layers[i], "n_questions": mean.n,
                **mean.columns("effect"), "random_effect": random[:, i, j].mean(), **beyond.columns("beyond_random"),
                **_share(effect[:, i, j], change, questions, told=told),
            })  # fmt: skip
    return pd.DataFrame(rows)


def ranges_table(cases: Sequence[PatchedCase], ranges: Sequence[range]) -> pd.DataFrame:
    """One row a range and mode: the score with the adapter on only there, or everywhere else, less the score without it.

    The first row is the whole adapter. Intervals and `share` as in `patching_table`. Shares of ranges need not add up to 1.
    """
    questions, whole = np.array([c.question for c in cases]), _whole(cases)
    base, found = np.array([c.base for c in cases]), _mean(whole, questions)
    told, rows = _excludes_zero(found), [_range_row("all", "on", found)]
    for i, layers in enumerate(ranges):
        for j, mode in enumerate(("on here only", "on everywhere else")):
            effect = np.array([c.ranges[i, j] for c in cases]) - base
            row = _range_row(f"{layers.start} to {layers.stop - 1}", mode, _mean(effect, questions))
            rows.append({**row, **_share(effect, whole, questions, told=told)})
    return pd.DataFrame(rows)


def _mean(values: Float[np.ndarray, " n"], questions: np.ndarray) -> Interval:
    return jackknife(lambda v: float(v.mean()), values, questions)


def _range_row(name: str, mode: str, mean: Interval) -> dict[str, Any]:
    return {"layers": name, "adapter": mode, "n_questions": mean.n, **mean.columns("effect")}


def _whole(cases: Sequence[PatchedCase]) -> Float[np.ndarray, " q"]:
    return np.array([c.finetuned - c.base for c in cases])


def _excludes_zero(interval: Interval) -> bool:
    return bool(interval.low > 0 or interval.high < 0)


def _share(
    effect: Float[np.ndarray, " q"], change: Float[np.ndarray, " q"], questions: np.ndarray, *, told: bool
) -> dict[str, float]:
    """Ratio of means with a jackknife interval; NaN where there is no whole change to take a share of."""
    if not told:
        return {"share": np.nan, "share_low": np.nan, "share_high": np.nan}
    found = jackknife(lambda v: float(v[:, 0].sum() / v[:, 1].sum()), np.column_stack([effect, change]), questions)  # fmt: skip
    return found.columns("share")

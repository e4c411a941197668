"""Patching as tables: what exchanging activations, or switching an adapter off in some layers, does to a score, with its doubt."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.stats import Interval, bootstrap_mean, jackknife
from probes.answers import PatchedCase

WAYS = {"base into finetuned": ("finetuned", "base"), "finetuned into base": ("base", "finetuned")}
"""Which model is run, and whose activations are put into it."""


def equal_ranges(n_layers: int, n: int) -> list[range]:
    """The layers in n consecutive ranges, as equal as they can be; no more ranges than layers."""
    edges = np.linspace(0, n_layers, min(n, n_layers) + 1).round().astype(int).tolist()
    return [range(a, b) for a, b in pairwise(edges)]


def patching_table(
    cases: Sequence[PatchedCase],
    layers: Sequence[int],
    spans: Sequence[str],
    *,
    rng: np.random.Generator,
    n_boot: int = 2000,
) -> pd.DataFrame:
    """One row a way, layer and span.

    `effect` is the score of the patched model less that of the model as it is; `random_effect` what as large a change in a random
    direction does, `beyond_random` the difference (paired by question); `share` is the effect over the whole change between the two
    models (1: patching here undoes, or brings, all of it), only where the whole change's own interval excludes 0.

    Args:
        cases: one a question.
        layers: as they were patched.
        spans: likewise.
        rng: bootstrap over questions.
        n_boot: resamples.
    """
    questions, whole = np.array([c.question for c in cases]), _whole(cases)
    told = _excludes_zero(bootstrap_mean(whole, questions, rng=rng, n_boot=n_boot))
    rows = []
    for way, (run, other) in WAYS.items():
        plain = np.array([getattr(c, run) for c in cases])[:, None, None]
        effect = np.stack([c.into[run] for c in cases]) - plain
        random = np.stack([c.into[f"random {run}"] for c in cases]) - plain
        change = whole if other == "finetuned" else -whole
        mean, beyond = (
            bootstrap_mean(v, questions, rng=rng, n_boot=n_boot) for v in (effect, effect - random)
        )
        for (i, j), value in np.ndenumerate(effect.mean(0)):
            rows.append({
                "way": way, "span": spans[j], "layer": layers[i], "n_questions": len(cases), "effect": value,
                "effect_low": mean.low[i, j], "effect_high": mean.high[i, j], "random_effect": random[:, i, j].mean(),
                "beyond_random": beyond.estimate[i, j], "beyond_random_low": beyond.low[i, j],
                "beyond_random_high": beyond.high[i, j], **_share(effect[:, i, j], change, questions, told=told),
            })  # fmt: skip
    return pd.DataFrame(rows)


def ranges_table(
    cases: Sequence[PatchedCase], ranges: Sequence[range], *, rng: np.random.Generator, n_boot: int = 2000
) -> pd.DataFrame:
    """One row a range and mode: the score with the adapter on only there, or everywhere else, less the score without it.

    The first row is the whole adapter. `share` as in `patching_table`. Shares of ranges need not add up to 1.
    """
    questions, whole = np.array([c.question for c in cases]), _whole(cases)
    base = np.array([c.base for c in cases])
    found = bootstrap_mean(whole, questions, rng=rng, n_boot=n_boot)
    told, rows = _excludes_zero(found), [_range_row("all", "on", whole, found)]
    for i, layers in enumerate(ranges):
        for j, mode in enumerate(("on here only", "on everywhere else")):
            effect = np.array([c.ranges[i, j] for c in cases]) - base
            mean = bootstrap_mean(effect, questions, rng=rng, n_boot=n_boot)
            name = f"{layers.start} to {layers.stop - 1}"
            row = _range_row(name, mode, effect, mean)
            rows.append({**row, **_share(effect, whole, questions, told=told)})
    return pd.DataFrame(rows)


def _range_row(name: str, mode: str, effect: Float[np.ndarray, " q"], mean: Interval) -> dict[str, Any]:
    return {"layers": name, "adapter": mode, "n_questions": len(effect), "effect": mean.estimate,
            "effect_low": mean.low, "effect_high": mean.high}  # fmt: skip


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
    return {"share": found.estimate, "share_low": found.low, "share_high": found.high}

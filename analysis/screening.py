"""Screening data before finetuning: how much further along a direction its answers lie than the base's own.

The projection difference ΔP of Chen et al. 2025 (arXiv 2507.21509, section 6): over a dataset it predicts where finetuning on it
moves the model; row by row it points at what does so.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.stats import Interval, bootstrap_mean
from mech.errors import InputError
from probes.nulls import Null, compare, covariance_matched_directions, isotropic_directions


@dataclass(frozen=True)
class Screening:
    """A dataset's mean ΔP, with what could explain it away beside it; intervals by resampling prompts."""

    delta: Interval
    """Mean of `delta_p`, in units of the residual stream."""
    length: Interval
    """Mean difference of answer lengths, dataset minus base, in tokens; of the lengths themselves where there is no base answer."""
    surprisal: Interval
    """The same of the base's surprisal, nats a token."""
    with_length: float
    """Correlation of ΔP with that difference of lengths over rows; NaN where one of them does not vary."""
    with_surprisal: float
    """Correlation of ΔP with the difference of surprisals."""
    n_rows: int


def screening(table: pd.DataFrame, *, rng: np.random.Generator, n_boot: int = 2000) -> Screening:
    """Summarise screened rows.

    Args:
        table: columns `prompt` (the cluster), `delta_p`, `n_tokens`, `surprisal`, and with base answers `base_n_tokens` and
            `base_surprisal`.
        rng: bootstrap.
        n_boot: bootstrap resamples.

    Raises:
        InputError: fewer than two prompts: no interval can be told.
    """
    prompts = table["prompt"].to_numpy()
    if len(set(prompts)) < 2:
        raise InputError(
            f"screening needs rows of at least two different prompts, there is {len(set(prompts))}"
        )
    gaps = {}
    for column in ("n_tokens", "surprisal"):
        values = table[column].to_numpy(dtype=np.float64)
        base = f"base_{column}"
        gaps[column] = values - table[base].to_numpy(dtype=np.float64) if base in table else values
    delta = table["delta_p"].to_numpy(dtype=np.float64)
    means = [
        bootstrap_mean(v, prompts, rng=rng, n_boot=n_boot)
        for v in (delta, gaps["n_tokens"], gaps["surprisal"])
    ]
    related = [_correlation(delta, gaps[column]) for column in ("n_tokens", "surprisal")]
    return Screening(means[0], means[1], means[2], related[0], related[1], len(table))


@dataclass(frozen=True)
class RandomDirections:
    """A mean ΔP beside the same along directions that mean nothing, of the same norm."""

    random: Null
    """Directions uniform on the sphere."""
    matched: Null | None
    """Directions drawn from the covariance of the rows' differences: along these a mean is large by chance alone. None where
    all rows are equal."""
    rows: pd.DataFrame
    """A row each: `random_rms`, `matched_rms`, the root mean square of its own ΔP along either kind."""

    @property
    def numbers(self) -> dict[str, float]:
        """P values and 95 % bounds of |mean ΔP|, by name; NaN where there is no null."""
        found = {}
        for name, null in (("random", self.random), ("matched", self.matched)):
            found[f"p_{name}"] = float(null.p_value) if null else float("nan")
            found[f"{name}_95"] = float(np.quantile(np.abs(null.draws), 0.95)) if null else float("nan")
        return found


def random_directions(
    gaps: Float[np.ndarray, "n d"],
    unit: Float[np.ndarray, " d"],
    *,
    seed: int,
    n: int = 1000,
    minus: Float[np.ndarray, "m d"] | None = None,
) -> RandomDirections:
    """Is it this direction, or would any do? Mean ΔP along random directions (two-sided p values).

    Nothing is read again: the mean ΔP along any direction is that of the mean difference.

    Args:
        gaps: a row's mean activations over its answer minus the model's own.
        unit: the direction at that layer, of norm 1.
        seed: repeats the draws.
        n: directions of each kind.
        minus: the same of harmless data: then it is the excess over them that is tested; covariance from both, each around its mean.

    Raises:
        InputError: no rows, another width, or values that are not finite.
    """
    if not len(gaps) or any(g.shape[1:] != unit.shape for g in (gaps, minus) if g is not None):
        raise InputError(f"random directions: rows of shape {gaps.shape} for a direction of {unit.shape}")
    rng, mean = np.random.default_rng(seed), gaps.mean(0, dtype=np.float64)
    spread = gaps - mean
    if minus is not None:
        reference = minus.mean(0, dtype=np.float64)
        spread, mean = np.concatenate([spread, minus - reference]), mean - reference
    observed = float(mean @ unit)
    drawn = {"random": isotropic_directions(n, len(unit), rng)}
    if spread.any():
        drawn["matched"] = covariance_matched_directions(spread, n, rng)
    nulls = {k: compare(k, observed, v @ mean, seed=seed) for k, v in drawn.items()}
    rms = {
        f"{k}_rms": np.sqrt(((gaps @ drawn[k].T) ** 2).mean(1)) if k in drawn else np.nan
        for k in ("random", "matched")
    }
    rows = pd.DataFrame(rms, index=range(len(gaps)))
    return RandomDirections(nulls["random"], nulls.get("matched"), rows)


def excess(found: Interval, reference: Interval) -> Interval:
    """How much larger one dataset's mean ΔP is than another's, read apart.

    Raw ΔP also holds what any data of that form adds (its length, its surprisal, that it is not the model's own text). Harmless
    data of the same form, screened the same way, take that out. The interval combines both (MOVER, Zou & Donner 2008).

    Args:
        found: mean ΔP of the dataset in question.
        reference: of the harmless one, at the same level.

    Raises:
        InputError: the levels differ.
    """
    if found.level != reference.level:
        raise InputError(f"excess: intervals of levels {found.level:g} and {reference.level:g}")
    gap = found.estimate - reference.estimate
    down = np.hypot(found.estimate - found.low, reference.high - reference.estimate)
    up = np.hypot(found.high - found.estimate, reference.estimate - reference.low)
    n = min(found.n, reference.n)
    return Interval(gap, gap - float(down), gap + float(up), n, found.level, f"{found.method}, recovered")


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if not a.std() > 0 or not b.std() > 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])

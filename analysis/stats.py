"""Intervals: no number without its doubt (nulls: `probes.nulls`).

The unit is the question (or the article), not the row: rows of one question are not independent, so whole
questions are resampled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from mech.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; fields are floats or arrays of one shape."""

    estimate: Any
    low: Any
    high: Any
    n: int
    """Clusters (questions, articles, seeds) that it rests on."""
    level: float
    method: str

    def columns(self, name: str) -> dict[str, Any]:
        """As columns of a table: NAME, NAME_low and NAME_high."""
        return {name: self.estimate, f"{name}_low": self.low, f"{name}_high": self.high}


def bootstrap_mean(
    values: Float[np.ndarray, "n ..."],
    clusters: np.ndarray | None,
    *,
    rng: np.random.Generator,
    level: float = 0.95,
    n_boot: int = 2000,
) -> Interval:
    """Mean over rows with a cluster-robust interval, vectorised over the trailing dimensions.

    Each end is the farther one of two intervals, since each keeps its level where the other does not:

    - a studentised cluster bootstrap, for skewed values: clusters are drawn with replacement, each draw's mean is a ratio of sums,
      and its deviation from the estimate is divided by that draw's own standard error (Efron & Tibshirani 1993, section 12.5);
    - a t interval, for heavy tails (whose extremes few draws hold) and clusters of unequal size: bias-reduced error and degrees of
      freedom by Bell & McCaffrey 2002 (CR2; Imbens & Kolesár 2016, section 3), under rows of a cluster that move as one.

    Args:
        values: one row an observation.
        clusters: which cluster each row belongs to; every row its own when None.
        rng: draws the resamples.
        level: confidence level.
        n_boot: resamples.

    Raises:
        InputError: fewer than two clusters, or values that are not finite.
    """
    sums, sizes = _cluster_sums(values, clusters)
    n = len(sizes)
    flat = sums.reshape(n, -1)
    estimate, error = _ratio(np.ones((1, n)), flat, sizes)
    tail = (1 - level) / 2
    spread = np.where(error[0] > 0, 1.0, 0.0)
    t_values = np.where(spread > 0, _resampled_t(flat, sizes, estimate, rng, n_boot), 0.0)
    t_low, t_high = np.nanquantile(t_values, [tail, 1 - tail], axis=0)
    shape = values.shape[1:]
    reduced, freedom = _bell_mccaffrey(flat, sizes, estimate)
    half = spread * reduced * float(stats.t.ppf(1 - tail, freedom))
    low = estimate[0] - np.maximum(t_high * error[0], half)
    high = estimate[0] - np.minimum(t_low * error[0], -half)
    centre, lower, upper = (_shaped(x, shape) for x in (estimate[0], low, high))
    return Interval(centre, lower, upper, n, level, "studentised cluster bootstrap or CR2 t, the farther end")


def _resampled_t(
    sums: Float[np.ndarray, "n k"],
    sizes: Float[np.ndarray, " n"],
    mean: Float[np.ndarray, "1 k"],
    rng: np.random.Generator,
    n_boot: int,
) -> Float[np.ndarray, "n_boot k"]:
    """Every resample's deviation from the mean over its own standard error; NaN where it drew one cluster only, which has no spread."""
    n = len(sizes)
    t_values = np.empty((n_boot, sums.shape[1]))
    for start in range(0, n_boot, 500):  # blocks bound the memory
        block = min(500, n_boot - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=block).astype(np.float64)
        means, errors = _ratio(weights, sums, sizes)
        gap = means - mean
        t_values[start : start + block] = np.divide(
            gap, errors, out=np.full_like(gap, np.nan), where=errors > 0
        )
    return t_values


def _bell_mccaffrey(
    sums: Float[np.ndarray, "n k"], sizes: Float[np.ndarray, " n"], mean: Float[np.ndarray, "1 k"]
) -> tuple[Float[np.ndarray, " k"], float]:
    """Standard error of a mean that is unbiased under equal variances, and Satterthwaite's degrees of freedom of it.

    Of the regression on a constant: a cluster's residual sum is divided by the root of 1 − its share of the rows. The degrees of
    freedom are tr(B)² / tr(B²), B the covariance of those sums where rows of a cluster move as one; n − 1 for equal sizes.
    """
    total = sizes.sum()
    share = sizes / total
    error = np.sqrt(((sums - mean * sizes[:, None]) ** 2 / (1 - share)[:, None]).sum(0)) / total
    # B_cd = q_c q_d (δ_cd + s - share_c - share_d), with w = q²: written out, so that no [n, n] array is built.
    w, s = share**2 / (1 - share), float(share @ share)
    w0, w1, w2 = w.sum(), w @ share, w @ share**2
    trace = (w * (1 - 2 * share + s)).sum()
    squares = (
        (w**2 * (1 + 2 * s - 4 * share)).sum() + (s * w0) ** 2 + 2 * w0 * w2 - 4 * s * w0 * w1 + 2 * w1**2
    )
    return error, float(trace**2 / squares)


def _ratio(
    weights: Float[np.ndarray, "draws n"], sums: Float[np.ndarray, "n k"], sizes: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "draws k"], Float[np.ndarray, "draws k"]]:
    """Mean and its linearised standard error for each weighting of the clusters."""
    n = weights.sum(1, keepdims=True)
    total = weights @ sizes[:, None]
    mean = (weights @ sums) / total
    # sum_c w_c (s_c - mean m_c)^2, expanded so that no [draws, n, k] array is built.
    squares = (
        weights @ sums**2
        - 2 * mean * (weights @ (sums * sizes[:, None]))
        + mean**2 * (weights @ sizes[:, None] ** 2)
    )
    scale = np.abs(weights @ sums**2) + 1e-300
    squares = np.where(squares > 1e-12 * scale, squares, 0.0)  # rounding of an exact zero
    return mean, np.sqrt(squares * n / (n - 1)) / total


def _cluster_sums(
    values: Float[np.ndarray, "n ..."], clusters: np.ndarray | None
) -> tuple[Float[np.ndarray, "c ..."], Float[np.ndarray, " c"]]:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("values for an interval must be finite: a NaN or an infinity is among them")
    if clusters is None:
        groups, n = np.arange(len(values)), len(values)
    else:
        _, groups = np.unique(clusters, return_inverse=True)
        n = int(groups.max()) + 1 if len(groups) else 0
    _enough(n)
    sums = np.zeros((n, *values.shape[1:]))
    np.add.at(sums, groups, values)
    return sums, np.bincount(groups, minlength=n).astype(np.float64)


def _shaped(x: np.ndarray, shape: tuple[int, ...]) -> Any:
    return x.reshape(shape) if shape else float(x.reshape(()))


def proportion(successes: np.ndarray, clusters: np.ndarray | None, *, level: float = 0.95) -> Interval:
    """A rate with Wilson's interval at the effective sample size n / deff.

    deff is the ratio of the cluster-robust variance to the binomial one, at least 1; at rates of exactly 0 or 1,
    where it cannot be estimated, the number of clusters stands for n, which is the cautious choice.
    """
    values = np.asarray(successes, dtype=np.float64)
    sums, sizes = _cluster_sums(values, clusters)
    n, rate = len(values), float(values.mean())
    if 0 < rate < 1:
        _, error = _ratio(np.ones((1, len(sizes))), sums[:, None], sizes)
        deff = max(1.0, float(error[0, 0]) ** 2 / (rate * (1 - rate) / n))
        effective = n / deff
    else:
        effective = float(len(sizes))
    z = float(stats.norm.ppf(0.5 + level / 2))
    centre = (rate + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * np.sqrt(rate * (1 - rate) / effective + z**2 / (4 * effective**2))
    low = float(centre - half) if rate > 0 else 0.0  # exactly: rounding would leave 1e-17
    high = float(centre + half) if rate < 1 else 1.0
    return Interval(rate, low, high, len(sizes), level, "Wilson, n / deff")


def rate_difference(
    first: np.ndarray, second: np.ndarray, clusters: np.ndarray, *, level: float = 0.95
) -> Interval:
    """Difference of two rates on the same rows, first minus second; an interval also where neither or both ever fail.

    Newcombe's paired interval (1998, Statist. Med. 17, 2635, method 10): each rate's own Wilson interval (`proportion`), put together
    with the correlation of the two over clusters, which is taken nearer to 0 by half a cluster where it is positive.

    Args:
        first: 0 or 1 a row.
        second: the same rows under the other.
        clusters: question or article of each row.
        level: confidence level.

    Raises:
        InputError: fewer than two clusters, or different numbers of rows.
    """
    if len(first) != len(second):
        raise InputError(f"a difference is read on the same rows: {len(first)} and {len(second)} are given")
    a, b = (proportion(values, clusters, level=level) for values in (first, second))
    sums, sizes = _cluster_sums(np.stack([first, second], axis=1).astype(np.float64), clusters)
    left, right = (sums - sizes[:, None] * np.array([a.estimate, b.estimate])).T
    together = float(left @ right)
    if together > 0:
        together = max(0.0, together - float(sizes.mean()) / 2)
    spread = float(np.sqrt((left @ left) * (right @ right)))
    correlation = together / spread if spread > 0 else 0.0
    gap = a.estimate - b.estimate
    down, up = a.estimate - a.low, a.high - a.estimate
    other_down, other_up = b.estimate - b.low, b.high - b.estimate
    low = gap - np.sqrt(max(0.0, down**2 + other_up**2 - 2 * correlation * down * other_up))
    high = gap + np.sqrt(max(0.0, up**2 + other_down**2 - 2 * correlation * up * other_down))
    return Interval(
        gap, max(-1.0, float(low)), min(1.0, float(high)), a.n, level, "Newcombe, paired, n / deff"
    )


def jackknife(
    statistic: Callable[[np.ndarray], float], values: np.ndarray, clusters: np.ndarray, *, level: float = 0.95
) -> Interval:
    """Any statistic with a delete-one-cluster jackknife interval (t quantiles).

    Raises:
        InputError: fewer than two clusters.
    """
    names = np.unique(clusters)
    _enough(len(names))
    without = np.array([statistic(values[clusters != name]) for name in names])
    return leave_one_out(statistic(values), without, level=level)


def leave_one_out(
    estimate: Any, without: Float[np.ndarray, "clusters ..."], *, level: float = 0.95
) -> Interval:
    """The delete-one-cluster jackknife interval from a statistic of all rows, and of all but each cluster's.

    The statistic may be an array: then so are the interval's fields.

    Raises:
        InputError: fewer than two clusters.
    """
    _enough(n := len(without))
    error = np.sqrt((n - 1) / n * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    half = _shaped(np.asarray(float(stats.t.ppf(0.5 + level / 2, n - 1)) * error), without.shape[1:])
    return Interval(estimate, estimate - half, estimate + half, n, level, "delete-one-cluster jackknife")


def _enough(n: int) -> None:
    if n < 2:
        raise InputError(f"an interval needs at least two clusters (questions, articles), there are {n}")

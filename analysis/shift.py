"""Shifts: what finetuning did to a projection, on the same text, paired by question, with its doubt."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.stats import Interval, bootstrap_mean
from mech.errors import InputError
from probes.nulls import compare, covariance_matched_projections, isotropic_directions, max_t
from probes.turned import turned_projections

Stream = Float[np.ndarray, "n layers d"]


@dataclass(frozen=True)
class ShiftByLayer:
    """Every field but `n_questions` is an array over layers (intervals hold arrays over layers)."""

    raw: Interval
    """Mean over questions of v̂·(h_tuned − h_base), in units of the residual stream."""
    base_sd: Float[np.ndarray, " layers"]
    """Standard deviation over rows of the base's own projections: the unit of the SD columns."""
    cosine: Float[np.ndarray, " layers"]
    """Cosine of the mean difference with the direction; 0 where the difference is exactly zero."""
    delta_norm: Float[np.ndarray, " layers"]
    """Norm of the mean difference."""
    relative_norm: Float[np.ndarray, " layers"]
    """`delta_norm` over the mean norm of the base's activations."""
    null_random: Float[np.ndarray, "2 layers"]
    """2.5 % and 97.5 % quantiles of the raw shift along random directions (of equal norm: the projection is on units)."""
    p_random: Float[np.ndarray, " layers"]
    p_random_max: Float[np.ndarray, " layers"]
    """P values corrected for having looked at all layers (max-T), against the direction turned at random, in all layers alike."""
    null_covariance: Float[np.ndarray, "2 layers"]
    """The same along directions drawn from the covariance of the base's activations."""
    p_covariance: Float[np.ndarray, " layers"]
    p_covariance_max: Float[np.ndarray, " layers"]
    minus_benign: Interval | None
    """Raw shift minus the benign control's, paired by question."""
    n_questions: int
    before: Interval | None = None
    """The base's own shift from the reference, raw: where a shift that starts elsewhere starts. None without a reference."""


def shift_by_layer(  # noqa: PLR0913  (what is read, what it is held against, and how sure to be)
    base: Stream,
    tuned: Stream,
    direction: Float[np.ndarray, "layers d"],
    questions: np.ndarray,
    *,
    rng: np.random.Generator,
    n_boot: int = 2000,
    n_null: int = 1000,
    level: float = 0.95,
    benign: Stream | None = None,
    reference: Stream | None = None,
) -> ShiftByLayer:
    """The shift along a direction at every layer.

    Args:
        base: the base's activations, one row a text.
        tuned: the finetuned model's on the same rows.
        direction: any norm; projections are on its unit vector.
        questions: question of each row; whole questions are resampled.
        rng: bootstrap and random directions.
        n_boot: bootstrap resamples.
        n_null: random directions of each kind.
        level: confidence level.
        benign: the benign control's activations on the same rows.
        reference: where `base` is itself finetuned, the model that the study starts from, on the same rows: what gives the units
            (standard deviation, norm) and the covariance null in place of `base`.

    Raises:
        InputError: shapes differ, a value is not finite, or the direction is zero at a layer.
    """
    _check(base, tuned, direction, questions, benign=benign, reference=reference)
    origin = base if reference is None else reference
    unit = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    along = partial(np.einsum, "nld,ld->nl")
    delta = tuned.astype(np.float64) - base
    projected, mean = along(delta, unit), delta.mean(0)
    nulls = _nulls(projected.mean(0), unit, mean, origin, n_null, rng)
    resampled = partial(bootstrap_mean, clusters=questions, rng=rng, level=level, n_boot=n_boot)
    control = before = None
    if benign is not None:
        control = resampled(projected - along(benign.astype(np.float64) - base, unit))
    if reference is not None:
        before = resampled(along(base.astype(np.float64) - reference, unit))
    return ShiftByLayer(
        raw=resampled(projected),
        base_sd=along(origin, unit).std(0, ddof=1),
        **_lengths(mean, unit, origin),
        **nulls,
        minus_benign=control,
        n_questions=len(np.unique(questions)),
        before=before,
    )


def to_frame(shift: ShiftByLayer, **labels: Any) -> pd.DataFrame:
    """One row a layer; `sd` columns are in units of the base's standard deviation, the others in the stream's.

    A shift that starts elsewhere than at the base has `before_sd`, where it starts, in place of what is left beyond the benign control.
    """
    sd = shift.base_sd
    columns: dict[str, Any] = {
        **labels,
        "layer": np.arange(len(sd)),
        "n_questions": shift.n_questions,
        **_spread("raw", shift.raw, 1.0),
        "base_sd": sd,
        **_spread("sd", shift.raw, sd),
        "cosine": shift.cosine,
        "delta_norm": shift.delta_norm,
        "relative_norm": shift.relative_norm,
        "null_random_low": shift.null_random[0],
        "null_random_high": shift.null_random[1],
        "p_random": shift.p_random,
        "p_random_max": shift.p_random_max,
        "null_covariance_low": shift.null_covariance[0],
        "null_covariance_high": shift.null_covariance[1],
        "p_covariance": shift.p_covariance,
        "p_covariance_max": shift.p_covariance_max,
    }
    if shift.before is None:
        columns |= _spread("minus_benign", shift.minus_benign, 1.0)
        columns |= _spread("minus_benign_sd", shift.minus_benign, sd)
    else:
        columns |= _spread("before_sd", shift.before, sd)
    return pd.DataFrame(columns)


@dataclass(frozen=True)
class TwoByTwo:
    """Effects on a projection, arrays over layers: total = weights + text + interaction."""

    weights: Interval
    """Tuned weights against base weights, both reading the base's text."""
    text: Interval
    """Tuned text against base text, both read by the base's weights."""
    interaction: Interval
    """What the two do only together."""
    total: Interval
    """The tuned model on its own text against the base on its own."""
    n_questions: int


def two_by_two(
    h_bb: Stream,
    h_bt: Stream,
    h_tb: Stream,
    h_tt: Stream,
    direction: Float[np.ndarray, "layers d"],
    questions: np.ndarray,
    *,
    rng: np.random.Generator,
    n_boot: int = 2000,
    level: float = 0.95,
) -> TwoByTwo:
    """Take the change of a projection apart: h_mt is what model m makes of text t (b: base, t: tuned).

    Raises:
        InputError: as `shift_by_layer`.
    """
    for cell in (h_bt, h_tb, h_tt):
        _check(h_bb, cell, direction, questions)
    unit = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    bb, bt, tb, tt = (np.einsum("nld,ld->nl", h.astype(np.float64), unit) for h in (h_bb, h_bt, h_tb, h_tt))
    effects = np.stack([tb - bb, bt - bb, tt - tb - bt + bb, tt - bb], axis=1)
    found = bootstrap_mean(effects, questions, rng=rng, level=level, n_boot=n_boot)
    parts = [
        Interval(found.estimate[i], found.low[i], found.high[i], found.n, level, found.method)
        for i in range(4)
    ]
    return TwoByTwo(parts[0], parts[1], parts[2], parts[3], found.n)


def two_by_two_frame(effects: TwoByTwo, **labels: Any) -> pd.DataFrame:
    """One row an effect and layer, in units of the residual stream."""
    frames = []
    for name in ("weights", "text", "interaction", "total"):
        effect: Interval = getattr(effects, name)
        numbers = {"value": effect.estimate, "low": effect.low, "high": effect.high}
        layers = {
            "layer": np.arange(len(effect.estimate)),
            "effect": name,
            "n_questions": effects.n_questions,
        }
        frames.append(pd.DataFrame({**labels, **layers, **numbers}))
    return pd.concat(frames, ignore_index=True)


def _lengths(
    mean: Float[np.ndarray, "layers d"], unit: Float[np.ndarray, "layers d"], origin: Stream
) -> dict[str, Any]:
    """The mean difference's norm, that over the mean norm of the activations it starts from, and its cosine with the direction."""
    norm = np.linalg.norm(mean, axis=1)
    cosine = np.divide((mean * unit).sum(1), norm, out=np.zeros(len(norm)), where=norm > 0)
    relative = norm / np.linalg.norm(origin, axis=2).mean(0)
    return {"cosine": cosine, "delta_norm": norm, "relative_norm": relative}


def _nulls(
    observed: Float[np.ndarray, " layers"], unit: np.ndarray, mean: np.ndarray, origin: Stream, n: int, rng: np.random.Generator
) -> dict[str, Any]:  # fmt: skip
    """Of both kinds of directions the middle 95 % of draws, and p values without and with regard to having looked at all layers."""
    found = {}
    random, matched = _null_shifts(origin, mean, n, rng)
    turned = turned_projections(unit, mean, n, rng.spawn(1)[0])
    for name, draws, over_layers in (("random", random, turned), ("covariance", matched, matched)):
        found[f"null_{name}"] = np.quantile(draws, [0.025, 0.975], axis=0)
        found[f"p_{name}"] = compare(name, observed, draws).p_value
        corrected = max_t(compare(name, observed, over_layers))
        found[f"p_{name}_max"] = np.maximum(
            found[f"p_{name}"], corrected
        )  # other draws may by chance say less
    return found


def _null_shifts(
    base: Stream, mean: Float[np.ndarray, "layers d"], n: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "draws layers"], Float[np.ndarray, "draws layers"]]:
    """The mean difference along random directions and along covariance-matched ones; a draw serves all layers."""
    random = isotropic_directions(n, mean.shape[1], rng) @ mean.T
    seed = int(
        rng.integers(2**63)
    )  # the same mixture of rows at every layer, so that layers hang together as they do in rows
    drawn = (
        covariance_matched_projections(base[:, i], m, n, np.random.default_rng(seed))
        for i, m in enumerate(mean)
    )
    matched = np.stack(list(drawn), axis=1)
    return random, matched


def _spread(name: str, interval: Interval | None, unit: Any) -> dict[str, Any]:
    if interval is None:
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
    return {column: value / unit for column, value in interval.columns(name).items()}


def _check(
    base: np.ndarray,
    tuned: np.ndarray,
    direction: np.ndarray,
    questions: np.ndarray,
    **others: np.ndarray | None,
) -> None:
    read = {"tuned": tuned, **{name: rows for name, rows in others.items() if rows is not None}}
    for name, other in read.items():
        if other.shape != base.shape:
            raise InputError(
                f"{name} has shape {other.shape}, base {base.shape}: a shift is read on the same rows"
            )
    if direction.shape != base.shape[1:]:
        raise InputError(
            f"the direction has shape {direction.shape}, activations {base.shape[1:]} (layers, d_model)"
        )
    if len(questions) != len(base):
        raise InputError(f"{len(questions)} questions for {len(base)} rows")
    for name, array in {"base": base, **read, "direction": direction}.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name}: not finite (a NaN or an infinity)")
    if not np.linalg.norm(direction, axis=1).all():
        raise InputError("the direction is zero at a layer")

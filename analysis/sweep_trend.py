"""Whether a response follows the dose: rank correlation with strength, question by question, beside random directions."""

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from analysis.stats import proportion
from analysis.sweep import reported
from probes.nulls import two_sided_p

LEVELS = 3
"""Strengths that a trend takes, 0 among them: of two, one is always the larger."""


def trends(table: pd.DataFrame) -> pd.DataFrame:
    """Monotonicity of every dose–response of a sweep, all strengths together.

    Within each question the score is ranked over strengths (0, the unsteered model, among them) and correlated with strength (Spearman;
    0 where the score never changes): +1 where it rises with every step. Page's trend test (Page 1963; its L is the mean of these
    correlations but for scale) asks whether that is more than chance within questions would give. A random direction may have a trend
    too, since noise of any kind grows with strength: `p_random` compares with these, and is the one to read.

    Args:
        table: of `probes.sweep.sweep`; of its questions, those of the evaluation half count where it has both halves.

    Returns:
        A row for each direction and layer: direction, layer, n_strengths (0 counted), rho with its interval (mean over questions;
        Wilson's on (1 + rho) / 2 with questions as trials, which is cautious, and has a width at ±1 too), p_page (one-sided: rises with
        strength), control_rho (mean over random directions), control_max (largest |rho| among them), p_random (how often a random
        direction's |rho| is as large, (1 + those) / (1 + all)), n_questions, n_controls. None where there are fewer than three strengths.
    """
    rows = []
    for (name, layer), cells in reported(table).groupby(["direction", "layer"], sort=True):
        responses = {int(k): _response(cells[cells["control"] == k]) for k in cells["control"].unique()}
        own, levels = responses[0]
        if len(levels) < LEVELS:
            continue
        rho = correlations(own, levels)
        random = np.array([correlations(r, at).mean() for k, (r, at) in responses.items() if k])
        found = proportion((1 + rho) / 2, None)
        low, high = np.clip([2 * found.low - 1, 2 * found.high - 1], -1.0, 1.0)
        rows.append({
            "direction": name, "layer": layer, "n_strengths": len(levels),
            "rho": float(rho.mean()), "rho_low": float(low), "rho_high": float(high),
            "p_page": float(stats.page_trend_test(own).pvalue), "control_rho": float(random.mean()),
            "control_max": float(np.abs(random).max()), "p_random": float(two_sided_p(float(rho.mean()), random)), "n_questions": len(rho),
            "n_controls": len(random),
        })  # fmt: skip
    return pd.DataFrame(rows)


def correlations(
    response: Float[np.ndarray, "questions levels"], levels: Float[np.ndarray, " levels"]
) -> Float[np.ndarray, " questions"]:
    """Spearman's rank correlation of each question's response with the levels; 0 where it never changes."""
    ranks, order = stats.rankdata(response, axis=1), stats.rankdata(levels)
    ranks, order = ranks - ranks.mean(1, keepdims=True), order - order.mean()
    size = np.linalg.norm(ranks, axis=1) * np.linalg.norm(order)
    found: np.ndarray = np.divide(ranks @ order, size, out=np.zeros(len(ranks)), where=size > 0)
    return np.asarray(np.clip(found, -1.0, 1.0))  # rounding


def _response(
    cells: pd.DataFrame,
) -> tuple[Float[np.ndarray, "questions levels"], Float[np.ndarray, " levels"]]:
    """Change by question and strength, in the order of strengths, 0 among them; and the strengths."""
    wide = cells.pivot_table(index="question", columns="strength", values="change")
    wide[0.0] = 0.0
    wide = wide.sort_index(axis=1)
    return wide.to_numpy(dtype=np.float64), wide.columns.to_numpy(dtype=np.float64)

"""Linear probes: a hyperplane a layer between two sides of a contrast, fitted by scikit-learn.

There are usually far fewer rows than dimensions. No method here looks outside the span of the centred rows, so each
layer is first turned onto that span, which is exact, and fitted there: nothing of size d × d is ever formed.
Both sides count as equally frequent. Results do not change when the residual stream is rotated or moved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from mech.errors import InputError
from probes.direction import Direction

Stream = Float[np.ndarray, "n layers d"]


@dataclass(frozen=True)
class Plane:
    """One layer's probe, in whatever coordinates it was fitted in: log-odds = slope · (weights · x + intercept)."""

    weights: Float[np.ndarray, " k"]
    intercept: float
    slope: float
    """Turns the score into log-odds; 1 where the method fits log-odds itself."""


@dataclass(frozen=True)
class Probe:
    """Fitted probes of all layers, frozen: nothing is refitted when they are used on another model or other rows."""

    method: str
    weights: Float[np.ndarray, "layers d"]
    """In the residual stream's own coordinates; positive means the positive side."""
    intercept: Float[np.ndarray, " layers"]
    """Score = weights · h + intercept; the positive side is chosen above 0."""
    slope: Float[np.ndarray, " layers"]
    """Log-odds = slope · score."""
    centre: Float[np.ndarray, "layers d"]
    """The scaler: mean of the rows it was fitted on (already inside `intercept`)."""
    scale: Float[np.ndarray, " layers"]
    """The scaler: root mean squared distance of those rows from `centre` (already inside `weights`)."""
    n_rows: int
    made_from: Mapping[str, Any] = field(default_factory=dict)

    @property
    def threshold(self) -> Float[np.ndarray, " layers"]:
        """Where the probe decides, on the projection onto its unit direction, in units of the residual stream."""
        at: np.ndarray = -self.intercept / np.linalg.norm(self.weights, axis=1)
        return at

    def score(self, activations: Stream) -> Float[np.ndarray, "n layers"]:
        """Signed scores: positive where the probe says the positive side.

        Raises:
            InputError: activations of another model: other layers or another width.
        """
        if activations.shape[1:] != self.weights.shape:
            raise InputError(
                f"the probe has shape {self.weights.shape} (layers, d_model), activations {activations.shape[1:]}"
            )
        scores: np.ndarray = np.einsum("nld,ld->nl", activations, self.weights) + self.intercept
        return scores

    def probability(self, activations: Stream) -> Float[np.ndarray, "n layers"]:
        """Probability of the positive side, were both sides equally frequent."""
        p: np.ndarray = expit(self.score(activations) * self.slope)
        return p


def difference_of_means(x: Float[np.ndarray, "n k"], positive: np.ndarray, width: int) -> Plane:
    """The difference of the sides' means, with the boundary half way; log-odds from a Gaussian fit along it."""
    gap, middle, within = _sides(x, positive)
    spread = float(((within @ gap) ** 2).sum()) / (len(x) - 2)
    norm = float(gap @ gap)
    return Plane(gap, -float(gap @ middle), norm / spread if spread > 0 else 1.0)


NOTHING = 1e-10
"""Share of the largest variance below which a direction has none: rows are float32."""


def mass_mean(x: Float[np.ndarray, "n k"], positive: np.ndarray, width: int) -> Plane:
    """Σ⁺(μ₊ − μ₋) with Σ the covariance within the sides (Marks & Tegmark 2023, arXiv 2310.06824, section 5).

    The pseudo-inverse drops only what rounding leaves of directions without variance: a few massive dimensions of the stream hold
    nearly all of it, so that a larger share would drop the rest. With fewer rows than dimensions what is left of the whitening is noisy;
    `lda` is the shrunk version of the same thing.
    """
    gap, middle, within = _sides(x, positive)
    _, s, vt = np.linalg.svd(within, full_matrices=False)
    variance = s**2 / (len(x) - 2)
    kept = variance > NOTHING * variance.max()
    weights = vt[kept].T @ ((vt[kept] @ gap) / variance[kept])
    return Plane(weights, -float(weights @ middle), 1.0)


def lda(x: Float[np.ndarray, "n k"], positive: np.ndarray, width: int) -> Plane:
    """Linear discriminant with Ledoit & Wolf's shrinkage towards a sphere of `width` dimensions (scikit-learn)."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    _, _, within = _sides(x, positive)
    amount = ledoit_wolf(within, width)
    # scikit-learn shrinks towards a sphere of k dimensions; this is the amount that gives the one of `width`, up to scale.
    ratio = amount * x.shape[1] / (amount * x.shape[1] + (1 - amount) * width)
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=ratio, priors=[0.5, 0.5]).fit(x, positive)
    scale = (1 - ratio) / (1 - amount) if amount < 1 else width / x.shape[1]
    # Its covariance is the mean of the sides' own; with unequal sides that is not quite `within`, as it should be.
    return Plane(fitted.coef_[0] * scale, float(fitted.intercept_[0]) * scale, 1.0)


def logistic(x: Float[np.ndarray, "n k"], positive: np.ndarray, width: int, *, c: float = 10.0) -> Plane:
    """L2-regularised logistic regression on centred rows of unit root mean square (scikit-learn)."""
    from sklearn.linear_model import LogisticRegression

    centre = x.mean(0)
    scale = float(np.sqrt(((x - centre) ** 2).sum(1).mean()))
    fitted = LogisticRegression(C=c, class_weight="balanced", max_iter=2000, tol=1e-6).fit(
        (x - centre) / scale, positive
    )
    weights = fitted.coef_[0] / scale
    return Plane(weights, float(fitted.intercept_[0]) - float(weights @ centre), 1.0)


METHODS: Mapping[str, Callable[[np.ndarray, np.ndarray, int], Plane]] = {
    "difference_of_means": difference_of_means,
    "mass_mean": mass_mean,
    "lda": lda,
    "logistic": logistic,
}
"""Rows on their span, which of them are positive, and the width of the whole space → a plane."""


def fit_probe(
    method: str, activations: Stream, signs: Sequence[int], *, made_from: Mapping[str, Any] | None = None
) -> Probe:
    """Fit a probe at every layer.

    Args:
        method: one of `METHODS`.
        activations: one row a text.
        signs: +1 for the positive side, −1 for the other.
        made_from: checkpoint, site, pooling: kept with the probe.

    Raises:
        InputError: an unknown method, fewer than two rows a side, a value that is not finite, or rows that are all equal.
    """
    positive = check_rows(method, activations, signs)
    planes, centres, scales = [], [], []
    for layer in range(activations.shape[1]):
        x, basis, centre = onto_span(activations[:, layer])
        plane = METHODS[method](x, positive, activations.shape[2])
        weights = plane.weights if basis is None else basis @ plane.weights
        planes.append(Plane(weights, plane.intercept - float(weights @ centre), plane.slope))
        centres.append(centre)
        scales.append(float(np.sqrt((x**2).sum(1).mean())))
    return Probe(
        method,
        np.stack([p.weights for p in planes]),
        np.array([p.intercept for p in planes]),
        np.array([p.slope for p in planes]),
        np.stack(centres),
        np.array(scales),
        len(activations),
        {"method": method, **(made_from or {})},
    )


def probe_direction(
    name: str,
    method: str,
    activations: Stream,
    signs: Sequence[int],
    questions: Sequence[str],
    *,
    rng: np.random.Generator,
    n_splits: int = 10,
    made_from: Mapping[str, Any] | None = None,
) -> Direction:
    """A probe's weights as a direction, with the cosine between probes of two halves of the questions.

    Raises:
        InputError: as `fit_probe`, or fewer than four questions.
    """
    probe = fit_probe(method, activations, signs, made_from=made_from)
    asked, side = np.array(questions), np.array(signs)
    names = np.unique(asked)
    if len(names) < 4:
        raise InputError(f"a probe's split-half cosine needs at least four questions, there are {len(names)}")

    cosines = []
    for _ in range(n_splits):
        first = np.isin(asked, rng.permutation(names)[: len(names) // 2])
        a, b = (fit_probe(method, activations[h], side[h].tolist()).weights for h in (first, ~first))
        cosines.append((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))
    return Direction(
        name,
        probe.weights.astype(np.float32),
        np.median(cosines, axis=0).astype(np.float32),
        len(names),
        {**probe.made_from, "method": f"probe: {method}"},
    )


def check_rows(method: str, activations: np.ndarray, signs: Sequence[int]) -> np.ndarray:
    """Which rows are positive; refuses what cannot be fitted.

    Raises:
        InputError: an unknown method, other numbers of rows and labels, fewer than two rows a side, or not finite.
    """
    if method not in METHODS:
        raise InputError(f"probe {method!r}: known are {', '.join(METHODS)}")
    if len(signs) != len(activations):
        raise InputError(f"{len(signs)} labels for {len(activations)} rows")
    positive = np.array(signs) > 0
    if min(positive.sum(), (~positive).sum()) < 2:
        raise InputError(
            f"a probe needs two rows a side, there are {positive.sum()} positive and {(~positive).sum()} negative"
        )
    if not np.isfinite(activations).all():
        raise InputError("activations for a probe: not finite (a NaN or an infinity)")
    return positive


def onto_span(
    rows: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "d k"] | None, Float[np.ndarray, " d"]]:
    """Centred rows in an orthonormal basis of their span, the basis (None: the axes themselves), and their mean.

    Raises:
        InputError: the rows are all equal.
    """
    centre = rows.mean(0, dtype=np.float64)
    x = rows - centre
    if not x.any():
        raise InputError("the rows of a layer are all equal: there is nothing to tell apart")
    if len(x) > x.shape[1]:
        return x, None, centre
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > 1e-10 * s[0]
    basis = vt[kept].T
    return x @ basis, basis, centre


def ledoit_wolf(centred: Float[np.ndarray, "n k"], width: int) -> float:
    """How much to shrink the covariance of rows that live in `width` dimensions and span only some of them.

    Ledoit & Wolf 2004 (as in `sklearn.covariance.ledoit_wolf_shrinkage`), by the n × n products of the rows.
    """
    n = len(centred)
    gram = centred @ centred.T
    squares = np.diag(gram)
    trace, fourth, frobenius = squares.sum() / n, (squares**2).sum() / n, (gram**2).sum() / n**2
    distance = frobenius - trace**2 / width
    noise = min((fourth - frobenius) / n, distance)
    return float(noise / distance) if distance > 0 else 1.0


def _sides(x: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Difference of the sides' means, the point half way, and rows around their side's mean."""
    high, low = x[positive].mean(0), x[~positive].mean(0)
    return high - low, (high + low) / 2, x - np.where(positive[:, None], high, low)

"""How good a probe is, on questions it has not seen: splits, AUROC, calibration, selectivity, transfer.

Rows of one question are alike whatever their side, so a split by rows lets a probe recognise the question. All
splits here are by question (or any other labels: persona, paraphrase); `check_apart` refuses the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit

from mech.errors import InputError
from probes.linear import METHODS, Plane, Probe, Stream, check_rows, onto_span
from probes.nulls import Null, sign_flip_null
from probes.separability import Separability, heldout_auroc

Mask = Bool[np.ndarray, " n"]


def joint_groups(*labels: Sequence[str]) -> np.ndarray:
    """Groups of rows that share a question *or* a persona (or any further label), directly or by way of others."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(labels[0])
    rows, columns, offset = [], [], n
    for label in labels:
        names, which = np.unique(np.array(label), return_inverse=True)
        rows.append(np.arange(n))
        columns.append(which + offset)
        offset += len(names)
    edges = (np.ones(n * len(labels)), (np.concatenate(rows), np.concatenate(columns)))
    _, group = connected_components(coo_matrix(edges, shape=(offset, offset)), directed=False)
    joined: np.ndarray = group[:n]
    return joined


def check_apart(train: Mask, test: Mask, groups: np.ndarray) -> None:
    """Refuse a split in which a group is on both sides.

    Raises:
        InputError: names the group.
    """
    both = np.intersect1d(np.unique(groups[train]), np.unique(groups[test]))
    if len(both):
        raise InputError(f"the split is not by group: {len(both)} on both sides, the first is {both[0]}")


def group_folds(
    groups: np.ndarray, signs: Sequence[int], *, rng: np.random.Generator, k: int = 5
) -> Iterator[tuple[Mask, Mask]]:
    """`k` splits into train and test rows, whole groups at a time, with sides as even as groups allow (scikit-learn).

    Raises:
        InputError: fewer groups, or fewer rows of a side, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    positive = np.array(signs) > 0
    least = min(len(np.unique(groups)), int(positive.sum()), int((~positive).sum()))
    if not 2 <= k <= least:
        raise InputError(f"{k} folds of {least} groups (or rows of one side): take 2 to {least}")
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=int(rng.integers(2**31)))
    for train, test in splitter.split(positive, positive, groups):
        masks = tuple(np.isin(np.arange(len(positive)), rows) for rows in (train, test))
        check_apart(masks[0], masks[1], groups)
        yield masks[0], masks[1]


def row_folds(groups: np.ndarray, *, rng: np.random.Generator, k: int = 5) -> Iterator[tuple[Mask, Mask]]:
    """The wrong split, for control tasks only: rows of one group are spread over the folds."""
    order = np.lexsort((rng.random(len(groups)), groups))
    fold = np.empty(len(groups), dtype=int)
    fold[order] = np.arange(len(groups)) % k
    for i in range(k):
        yield fold != i, fold == i


def out_of_fold(
    method: str, activations: Stream, signs: Sequence[int], folds: Sequence[tuple[Mask, Mask]]
) -> Float[np.ndarray, "n layers"]:
    """Log-odds of every row from a probe fitted without its fold.

    The rows are turned onto their common span once: that is a rotation, so nothing of a test row reaches a fit.

    Raises:
        InputError: as `fit_probe`, or a training part that lacks a side.
    """
    positive = check_rows(method, activations, signs)
    for train, _ in folds:
        check_rows(method, activations[train], positive[train].astype(int).tolist())
    found = np.full(activations.shape[:2], np.nan)
    for layer in range(activations.shape[1]):
        x, _, _ = onto_span(activations[:, layer])
        for train, test in folds:
            plane: Plane = METHODS[method](x[train], positive[train], activations.shape[2])
            found[test, layer] = plane.slope * (x[test] @ plane.weights + plane.intercept)
    return found


@dataclass(frozen=True)
class Calibration:
    """Whether probabilities mean what they say, by layer; both sides weigh the same, as when the probe was fitted."""

    accuracy: Float[np.ndarray, " layers"]
    """Mean of the two sides' accuracies, at probability .5."""
    brier: Float[np.ndarray, " layers"]
    """Mean squared error of the probability; .25 for always saying .5."""
    expected_error: Float[np.ndarray, " layers"]
    """Expected calibration error: mean gap between probability and frequency over the bins."""
    reliability: Float[np.ndarray, "layers bins 3"]
    """By bin of equal width: mean probability, frequency of the positive side, share of weight (NaN, NaN, 0 if empty)."""


def calibration(
    log_odds: Float[np.ndarray, "n layers"], signs: Sequence[int], *, bins: int = 10
) -> Calibration:
    """Calibration of log-odds on rows the probe was not fitted on.

    Raises:
        InputError: one side is missing.
    """
    positive = np.array(signs) > 0
    if positive.all() or not positive.any():
        raise InputError("calibration needs rows on both sides of the contrast")
    weight = np.where(positive, 0.5 / positive.sum(), 0.5 / (~positive).sum())
    p = expit(log_odds)
    right = weight @ np.where(positive[:, None], log_odds > 0, log_odds < 0) + 0.5 * (
        weight @ (log_odds == 0)
    )
    where = np.minimum((p * bins).astype(int), bins - 1)
    tables = np.full((p.shape[1], bins, 3), np.nan)
    for layer in range(p.shape[1]):
        mass, said, was = (
            np.bincount(where[:, layer], weight * x, bins) for x in (np.ones(len(p)), p[:, layer], positive)
        )
        there = mass > 0
        tables[layer, :, 2] = mass
        tables[layer, there, :2] = np.stack([said[there] / mass[there], was[there] / mass[there]], axis=1)
    gaps = np.nan_to_num(np.abs(tables[:, :, 0] - tables[:, :, 1]))
    return Calibration(right, weight @ (p - positive[:, None]) ** 2, (gaps * tables[:, :, 2]).sum(1), tables)


@dataclass(frozen=True)
class Validation:
    """A method on a contrast, all on questions left out of the fit; arrays over layers."""

    auroc: Separability
    calibration: Calibration
    control_auroc: Float[np.ndarray, " layers"]
    """AUROC of the same method on random labels, one a question, split by *rows*: how well it recognises questions."""
    folds: int

    @property
    def selectivity(self) -> Float[np.ndarray, " layers"]:
        """AUROC of the task minus that of the control (Hewitt & Liang 2019, arXiv 1909.03368)."""
        gap: np.ndarray = self.auroc.auroc - self.control_auroc
        return gap


def validate(
    method: str,
    activations: Stream,
    signs: Sequence[int],
    questions: Sequence[str],
    *,
    rng: np.random.Generator,
    groups: np.ndarray | None = None,
    folds: int = 5,
    n_control: int = 3,
) -> Validation:
    """Cross-validate a method on a contrast.

    Args:
        method: one of `METHODS`.
        activations: one row a text.
        signs: +1 and −1.
        questions: question of each row; split whole, and taken whole for independent.
        rng: folds, control labels.
        groups: what is split whole instead: `joint_groups(questions, personas)`.
        folds: at most so many; fewer where there are fewer groups.
        n_control: control tasks to average over.

    Raises:
        InputError: as `fit_probe`, or fewer than two groups.
    """
    asked = np.array(questions)
    held = asked if groups is None else groups
    k = min(folds, len(np.unique(held)))
    scores = out_of_fold(method, activations, signs, list(group_folds(held, signs, rng=rng, k=k)))
    controls = []
    for _ in range(n_control):
        labels = control_labels(asked, rng)
        found = out_of_fold(method, activations, labels.tolist(), list(row_folds(asked, rng=rng, k=k)))
        controls.append(auroc(found, labels))
    separated = heldout_auroc(scores, list(signs), list(questions))
    return Validation(separated, calibration(scores, signs), np.mean(controls, axis=0), k)


def control_labels(questions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random label (+1, −1) for each question, the same for all its rows; half of the questions each."""
    names, group = np.unique(questions, return_inverse=True)
    labels: np.ndarray = rng.permutation(np.where(np.arange(len(names)) % 2, 1, -1))[group]
    return labels


def auroc(scores: Float[np.ndarray, "n layers"], signs: np.ndarray) -> Float[np.ndarray, " layers"]:
    """AUROC by layer, without an interval: the Mann-Whitney statistic over all pairs (scipy)."""
    from scipy.stats import mannwhitneyu

    high, low = scores[signs > 0], scores[signs < 0]
    found: np.ndarray = mannwhitneyu(high, low, axis=0, method="asymptotic").statistic / (
        len(high) * len(low)
    )
    return found


@dataclass(frozen=True)
class Transfer:
    """A probe of the base on a finetuned model, nothing refitted; arrays over layers."""

    base: Separability
    tuned: Separability
    base_accuracy: Float[np.ndarray, " layers"]
    tuned_accuracy: Float[np.ndarray, " layers"]
    """Mean of the two sides' accuracies, scaler and threshold those of the base."""
    shift: Float[np.ndarray, " layers"]
    """Mean change of the score, each question weighing the same, in standard deviations of the base's scores."""
    spread: Float[np.ndarray, " layers"]
    """Standard deviation of the tuned model's scores over the base's."""
    shift_null: Null
    """The shift with random signs, one a question."""


def transfer(
    probe: Probe,
    base: Stream,
    tuned: Stream,
    signs: Sequence[int],
    questions: Sequence[str],
    *,
    seed: int,
    n_null: int = 1000,
) -> Transfer:
    """How a frozen probe of the base does on a finetuned model that reads the same rows.

    Give it rows of questions that the probe has not seen. AUROC alone hides a shift of both sides; the accuracy shows it.

    Raises:
        InputError: shapes differ, or one side is missing.
    """
    if base.shape != tuned.shape:
        raise InputError(
            f"tuned has shape {tuned.shape}, base {base.shape}: transfer is read on the same rows"
        )
    scores = [probe.score(h) for h in (base, tuned)]
    separated = [heldout_auroc(s, list(signs), list(questions)) for s in scores]
    right = [calibration(s * probe.slope, signs).accuracy for s in scores]
    sd = scores[0].std(0, ddof=1)
    change = (scores[1] - scores[0]) / sd
    _, group = np.unique(np.array(questions), return_inverse=True)
    by_question = np.stack([change[group == i].mean(0) for i in range(group.max() + 1)])
    null = sign_flip_null("sign-flip", by_question, seed=seed, n=n_null)
    return Transfer(
        separated[0], separated[1], right[0], right[1], by_question.mean(0), scores[1].std(0, ddof=1) / sd, null
    )  # fmt: skip

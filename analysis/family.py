"""Is it one thing? Identity directions against each other: cosines, and how well each tells the others' contrasts apart.

A family is called identity only where its members agree. Two members agree, at a layer, where their cosine (from questions that
they do not share) is beyond 97.5 % of directions drawn from the other's activations and beyond sign flips of the other's
differences, and each orders the other's held-out rows rightly with an interval above one half. Whether they still do when the number of pairs is
reckoned with stands beside it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from mech.errors import InputError
from probes.adjusted import halved
from probes.direction import Direction, paired_differences
from probes.nulls import (
    covariance_matched_directions,
    holm,
    isotropic_directions,
    sign_flip_null,
    two_sided_p,
)
from probes.separability import heldout_auroc
from probes.validation import auroc

Halves = tuple[Float[np.ndarray, "splits d"], Float[np.ndarray, "splits d"]]
N_SPLITS = 50
"""Random halvings of the questions behind a cosine from disjoint halves."""


@dataclass(frozen=True)
class Part:
    """Rows of a contrast at one layer."""

    rows: Float[np.ndarray, "n d"]
    signs: Sequence[int]
    questions: Sequence[str]


@dataclass(frozen=True)
class Apart:
    """Of a member from which something was taken out: what is fitted anew where the same questions must not meet (`probes.adjusted`)."""

    refit: Callable[[Collection[str]], Float[np.ndarray, " d"]]
    """The direction of some questions of the extraction half, everything in it fitted on these alone."""
    asked: Sequence[Sequence[str]]
    """Questions of the extraction half of the contrasts that are projected out."""
    scorer: Float[np.ndarray, " d"]
    """Scores rows whose questions no fold knows, in the direction's place."""
    own_scores: Float[np.ndarray, " n"]
    """Of its own held-out rows."""


@dataclass(frozen=True)
class Member:
    """A direction and the contrast it was made from, at one layer."""

    direction: Direction
    extract: Part
    """The half that it was made from."""
    held_out: Part
    """What it is tested on: the other half; or all rows, where `vectors` cross-fit it."""
    vectors: Float[np.ndarray, "k d"] | None = None
    """Cross-fitted unit vectors by fold; None: the direction itself scores everything that it has not seen."""
    fold_of: Mapping[str, int] = field(default_factory=dict)
    """By question, which of `vectors` has not seen it."""
    apart: Apart | None = None
    """Present: something was taken out of it."""

    def score(self, part: Part, layer: int) -> Float[np.ndarray, " n"]:
        """Projections of rows, centred; NaN where a row's question was seen by every direction that there is."""
        centred = part.rows - part.rows.mean(0, dtype=np.float64)
        whole: np.ndarray = centred @ (self.apart.scorer if self.apart else self.direction.unit_at(layer))
        if self.vectors is None:
            whole[np.isin(part.questions, list(set(self.extract.questions)))] = np.nan
            return whole
        for i, question in enumerate(part.questions):
            if (fold := self.fold_of.get(question)) is not None:
                whole[i] = centred[i] @ self.vectors[fold]
        return whole

    def halves(
        self, gaps: Float[np.ndarray, "q d"], among: Bool[np.ndarray, "splits q"], firsts: Sequence[set[str]]
    ) -> Halves:
        """Unit directions of the first half of the questions, and of the others, for each halving; `among`: which differences are of the first."""
        if self.apart is None:
            one, other = (side @ gaps / side.sum(1, keepdims=True) for side in (among, ~among))
            return _units(one), _units(other)
        every = {q for of in (self.extract.questions, *self.apart.asked) for q in of}
        refit = self.apart.refit
        pairs = [(refit(first), refit(every - first)) for first in firsts]
        return _units(np.stack([one for one, _ in pairs])), _units(np.stack([other for _, other in pairs]))


def cosines(
    members: Sequence[Member], layer: int, *, rng: np.random.Generator, n_null: int = 1000
) -> pd.DataFrame:
    """Cosine of every two directions at a layer, one row a pair (both ways, for the nulls are the second's).

    `cosine` is that of the whole directions. Members that share rows (name and presence both hold the identity prompt) share noise
    there; `cosine_disjoint` is the mean cosine of one's direction from half of the questions with the other's from the other half.
    `ceiling` and `ceiling_disjoint` are what two equally noisy directions of one truth would reach: the root of the product of the
    reliabilities, which for halves are the split-half cosines r, and for the whole 2r / (1 + r) (Spearman and Brown).
    `share_of_ceiling` is `cosine_disjoint` over its ceiling: near 1, the two differ by noise alone; NaN without a ceiling.

    Nulls, both for the second's contrast: `null_high` is the 97.5 % quantile of |cosine| with directions of its activations'
    covariance within either side of the contrast, `p_null` two-sided of `cosine_disjoint`; `p_flip` is that of its paired differences' mean projection on the first
    direction (fitted without the difference's question) with signs flipped by question, `null_flip_high` its 97.5 % quantile as
    a cosine. `p_null_all` and `p_flip_all` are corrected for the number of pairs (Holm; a pair's p is the larger of its two ways', for
    both have to hold). With m pairs none is below m / (1 + `n_null`).
    """
    found: list[dict[str, Any]] = []
    own = [_differences(m) for m in members]
    for i, a in enumerate(members):
        for j, b in enumerate(members[i + 1 :], i + 1):
            halves = _disjoint(own[i], own[j], rng=rng)
            reliabilities = _reliability(a.direction, layer) * _reliability(b.direction, layer)
            both = {
                "layer": layer, "cosine": float(a.direction.unit_at(layer) @ b.direction.unit_at(layer)),
                "cosine_disjoint": halves.cosine, "ceiling": float(np.sqrt(reliabilities)), "ceiling_disjoint": halves.ceiling,
                "share_of_ceiling": halves.cosine / halves.ceiling if halves.ceiling else np.nan,
            }  # fmt: skip
            for one, other, gap, along in (
                (a, b, own[j][1], halves.second_on_first),
                (b, a, own[i][1], halves.first_on_second),
            ):
                drawn = covariance_matched_directions(_without_contrast(other), n_null, rng) @ one.direction.unit_at(layer)  # fmt: skip
                flips = sign_flip_null("flips", along, seed=int(rng.integers(2**31)), n=n_null)
                found.append({
                    "direction": one.direction.name, "other": other.direction.name, **both,
                    "null_high": float(np.quantile(np.abs(drawn), 0.975)),
                    "p_null": float(two_sided_p(halves.cosine, drawn)),
                    "null_flip_high": float(np.quantile(np.abs(flips.draws), 0.975) / np.linalg.norm(gap.mean(0))),
                    "p_flip": flips.p_value,
                })  # fmt: skip
    table = pd.DataFrame(found)
    for name in ("p_null", "p_flip") if found else ():
        table[f"{name}_all"] = np.repeat(holm(table[name].to_numpy().reshape(-1, 2).max(1)), 2)
    return table


def _without_contrast(member: Member) -> Float[np.ndarray, "m d"]:
    """Its rows about the mean of their side: a large contrast is most of what the rows vary by, and would be its own null."""
    rows, signs = member.extract.rows.astype(np.float64), np.asarray(member.extract.signs)
    for sign in np.unique(signs):
        rows[signs == sign] -= rows[signs == sign].mean(0)
    return rows


@dataclass(frozen=True)
class _Halves:
    cosine: float
    ceiling: float
    first_on_second: Float[np.ndarray, " p"]
    """The first's differences on the second's direction from the questions of the other half, mean over halvings."""
    second_on_first: Float[np.ndarray, " q"]


_Differences = tuple[Member, Float[np.ndarray, "_ d"], Sequence[str]]
"""A member, its paired differences, and their questions."""


def _differences(member: Member) -> _Differences:
    part = member.extract
    gaps, asked = paired_differences(part.rows[:, None], part.questions, part.signs)
    return member, gaps[:, 0], asked


def _disjoint(one: _Differences, other: _Differences, *, rng: np.random.Generator) -> _Halves:
    """Two members' paired differences, halved by question again and again: no question stands on both sides of a cosine."""
    (m, a, asked_a), (n, b, asked_b) = one, other
    more = [of for of_member in (m, n) if of_member.apart for of in of_member.apart.asked]
    if m.apart or n.apart:
        least = 2 if more else 1
        firsts = [halved([asked_a, asked_b, *more], rng=rng, least=least)[0] for _ in range(N_SPLITS)]
    else:
        firsts = [_first_half(asked_a, asked_b, rng) for _ in range(N_SPLITS)]
    among_a, among_b = (np.array([[q in f for q in asked] for f in firsts]) for asked in (asked_a, asked_b))
    (a1, a2), (b1, b2) = m.halves(a, among_a, firsts), n.halves(b, among_b, firsts)
    reliable = (a1 * a2).sum(1).mean(), (b1 * b2).sum(1).mean()
    return _Halves(
        cosine=float(((a1 * b2).sum(1) + (a2 * b1).sum(1)).mean() / 2),
        ceiling=float(np.sqrt(max(0.0, reliable[0]) * max(0.0, reliable[1]))),
        first_on_second=np.where(among_a, b2 @ a.T, b1 @ a.T).mean(0),
        second_on_first=np.where(among_b, a2 @ b.T, a1 @ b.T).mean(0),
    )


def _first_half(asked_a: Sequence[str], asked_b: Sequence[str], rng: np.random.Generator) -> set[str]:
    """Every second question: first those of a alone, then shared ones, then those of b alone, each shuffled; so both are halved."""
    both = set(asked_a) & set(asked_b)
    groups = [[q for q in asked_a if q not in both], sorted(both), [q for q in asked_b if q not in both]]
    order = [group[i] for group in groups for i in rng.permutation(len(group))]
    return set(order[int(rng.integers(2)) :: 2])


def _units(x: Float[np.ndarray, "splits d"]) -> Float[np.ndarray, "splits d"]:
    units: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    return units


def _reliability(direction: Direction, layer: int) -> float:
    half = max(0.0, float(direction.split_half[layer]))
    return 2 * half / (1 + half)


def transfer(
    members: Sequence[Member], layer: int, *, rng: np.random.Generator, n_null: int = 1000
) -> pd.DataFrame:
    """AUROC of every direction on every contrast's held-out rows, with its interval, and a random direction's spread.

    `auroc_low_all` is the lower end of an interval that holds for all pairs of members together (Bonferroni, 95 %).
    A direction scores only rows of questions that it has not seen. `null_low` and `null_high` hold 95 % of isotropic directions;
    below one half means that the direction orders them wrongly.

    Raises:
        InputError: a direction has seen all questions of one side.
    """
    rows, pairs = [], max(1, len(members) * (len(members) - 1) // 2)
    for contrast in members:
        part = contrast.held_out
        drawn = part.rows @ isotropic_directions(n_null, part.rows.shape[1], rng).T
        null = auroc(drawn, np.array(part.signs))
        for m in members:
            own = m is contrast and m.apart is not None
            scores = m.apart.own_scores if own and m.apart else m.score(part, layer)
            kept: Bool[np.ndarray, " n"] = ~np.isnan(scores)
            signs, asked = np.array(part.signs)[kept], np.array(part.questions)[kept]
            given = (scores[kept][:, None], signs.tolist(), asked.tolist())
            found, of_all = heldout_auroc(*given), heldout_auroc(*given, level=1 - 0.05 / pairs)
            rows.append({
                "direction": m.direction.name, "contrast": contrast.direction.name, "layer": layer,
                "auroc": float(found.auroc[0]), "auroc_low": float(found.low[0]), "auroc_high": float(found.high[0]),
                "auroc_low_all": float(of_all.low[0]),
                "null_low": float(np.quantile(null, 0.025)), "null_high": float(np.quantile(null, 0.975)),
                "n_questions": found.n_questions,
            })  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(found_cosines: pd.DataFrame, found_transfer: pd.DataFrame) -> pd.DataFrame:
    """One row a pair: do the two agree, by the rule above? Beside it the cosine as a share of its ceiling.

    `agree_all` also holds when the number of pairs is reckoned with: the three conditions with `p_null_all`, `p_flip_all` (below .05) and
    `auroc_low_all`. The chance that any pair without agreement is called so is at most 5 %.

    Raises:
        InputError: the tables are of different members.
    """
    cosine = found_cosines.set_index(["direction", "other"])
    scored = found_transfer.set_index(["direction", "contrast"])
    names = list(dict.fromkeys(found_transfer["direction"]))
    if set(names) != set(found_cosines["direction"]):
        raise InputError("verdicts: cosines and transfer are of different directions")
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            ways = ((a, b), (b, a))
            pairs: Mapping[str, bool] = {
                "cosine_above_null": bool(all(cosine.loc[p, "cosine_disjoint"] > cosine.loc[p, "null_high"] for p in ways)),
                "beyond_flips": bool(all(cosine.loc[p, "cosine_disjoint"] > 0 and cosine.loc[p, "p_flip"] < 0.05 for p in ways)),
                "transfers_both_ways": bool(all(scored.loc[p, "auroc_low"] > 0.5 for p in ways)),
            }  # fmt: skip
            agree = all(pairs.values())
            for_all = agree and all(
                max(cosine.loc[p, "p_null_all"], cosine.loc[p, "p_flip_all"]) < 0.05 and scored.loc[p, "auroc_low_all"] > 0.5 for p in ways
            )  # fmt: skip
            share = float(cosine.loc[(a, b), "share_of_ceiling"])
            rows.append({"direction": a, "other": b, "share_of_ceiling": share, **pairs, "agree": agree, "agree_all": bool(for_all)})  # fmt: skip
    return pd.DataFrame(rows)

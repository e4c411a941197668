"""Which rollouts a persona vector is made from: pairs whose two sides did as they were told, by a judge's scores.

Chen et al. 2025 (arXiv 2507.21509, section 2) keep answers by trait score; their code does so by pair and asks for coherence
of both sides as well. A pair is a question under the two sides of one instruction pair, one sample each.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mech.errors import InputError
from probes.persona import Rollout

UNFILTERED = "unfiltered"


@dataclass(frozen=True)
class Thresholds:
    """Scores (0 to 100) that keep a pair: positive >= trait, negative < trait, coherence of both >= coherence."""

    trait: float = 50.0
    coherence: float = 50.0

    def __str__(self) -> str:
        return f"trait {self.trait:g}, coherence {self.coherence:g}"


@dataclass(frozen=True)
class Filtered:
    """What a filter left."""

    kept: tuple[Rollout, ...]
    """Both sides of every pair kept, in the order asked."""
    pairs: int
    """Pairs before."""
    dropped: Mapping[str, int]
    """Pairs dropped, by the first reason that holds; together with those kept they are all."""

    @property
    def questions(self) -> int:
        """Questions left."""
        return len({r.question for r in self.kept})


def paired_filter(
    asked: Sequence[Rollout],
    answers: Sequence[str],
    trait: Mapping[str, float | None],
    coherence: Mapping[str, float | None],
    thresholds: Thresholds,
) -> Filtered:
    """Keep the pairs that pass.

    Args:
        asked: rollouts of both sides.
        answers: the model's answer to each.
        trait: trait score by rollout id; None, or nothing, where the judge gave none.
        coherence: coherence score by rollout id, likewise.
        thresholds: the scores that a pair needs.

    Raises:
        InputError: a rollout has no partner.
    """
    answer_of = dict(zip((r.id for r in asked), answers, strict=True))
    pairs: dict[tuple[str, int, int], dict[int, Rollout]] = {}
    for rollout in asked:
        pairs.setdefault((rollout.question, rollout.pair, rollout.sample), {})[rollout.sign] = rollout
    kept: set[str] = set()
    dropped: Counter[str] = Counter()
    for sides in pairs.values():
        if set(sides) != {1, -1}:
            raise InputError(
                f"rollout {next(iter(sides.values())).id}: the other side of its pair is missing"
            )
        ids = sides[1].id, sides[-1].id
        empty = any(not answer_of[i].strip() for i in ids)
        reason = "empty answer" if empty else _reason(*ids, trait, coherence, thresholds)
        if reason is None:
            kept.update(ids)
        else:
            dropped[reason] += 1
    return Filtered(tuple(r for r in asked if r.id in kept), len(pairs), dict(dropped))


def _reason(
    positive: str,
    negative: str,
    trait: Mapping[str, float | None],
    coherence: Mapping[str, float | None],
    thresholds: Thresholds,
) -> str | None:
    high, low = trait.get(positive), trait.get(negative)
    clear = [coherence.get(i) for i in (positive, negative)]
    if high is None or low is None or None in clear:
        return "no score"
    if any(c is not None and c < thresholds.coherence for c in clear):
        return "incoherent"
    if high < thresholds.trait:
        return "positive side below the trait threshold"
    return "negative side at or above the trait threshold" if low >= thresholds.trait else None

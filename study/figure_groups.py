"""Which arms share a figure: as the study says or, where there are many, by what they have in common."""

from collections import Counter
from collections.abc import Mapping, Sequence

from study.spec import StudySpec
from study.spec_stages import stage_of

MOST_ARMS = 12
"""Arms that one picture holds readably, the base not counted."""
OTHERS = "others"


def figure_groups(spec: StudySpec) -> dict[str, list[str]]:
    """Arms by figure, the base in none; empty where one figure holds all.

    A study's own `figures.groups` are taken as they are, with what their patterns match. Left out, a study of more than twelve arms is
    grouped by the stage that an arm shares with most others, by whether it comes first, and into equal parts where these
    are still more than twelve; arms that are alone in their group stand together as the others.
    """
    arms = {name: stages for name, stages in spec.arms.items() if stages}
    if spec.figures.groups:
        found = {name: spec.figures.arms_of(name, arms) for name in spec.figures.groups}
        return {name: members for name, members in found.items() if members}
    if len(arms) <= MOST_ARMS:
        return {}
    return _in_parts(_by_common_stage(arms))


def _by_common_stage(arms: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    chains = {arm: [stage_of(stage) for stage in stages] for arm, stages in arms.items()}
    shared = Counter(stage for chain in chains.values() for stage in dict.fromkeys(chain))
    groups: dict[str, list[str]] = {}
    for arm, chain in chains.items():
        common = max(chain, key=lambda stage: shared[stage])
        groups.setdefault(f"{common} {'first' if chain[0] == common else 'later'}", []).append(arm)
    alone = [arm for members in groups.values() if len(members) == 1 for arm in members]
    found = {name: members for name, members in groups.items() if len(members) > 1}
    return {**found, OTHERS: alone} if alone else found


def _in_parts(groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name, members in groups.items():
        n = -(-len(members) // MOST_ARMS)
        size = -(-len(members) // n)
        for i in range(n):
            part = name if n == 1 else f"{name}, {i + 1} of {n}"
            parts[part] = list(members[i * size : (i + 1) * size])
    return parts

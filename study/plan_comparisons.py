"""Planning comparisons: two arms held against each other on the rows that both were measured on."""

from collections.abc import Iterator, Sequence
from typing import Any

from study.plan_base import plan_paraphrases
from study.planner import Measured, Plan
from study.step import Step, Work

Made = dict[str, list[Step]]
"""Steps that read a checkpoint, by role."""


def plan_comparisons(plan: Plan, directions: Sequence[Step], measured: Measured) -> dict[str, list[Step]]:
    """Every comparison of the study with every seed: differences of projections, of spread and of behaviour, and the share undone, by role."""
    spec = plan.spec
    base = measured[spec.base_arm, spec.seeds[0]]
    found: dict[str, list[Step]] = {}
    for name, pair in spec.comparisons.items():
        for seed in spec.seeds:
            arm = measured[pair.arm, seed]
            against = measured.get((pair.against, seed), base)  # the base is measured once
            labels = {"comparison": name, "arm": pair.arm, "against": pair.against, "seed": seed}
            steps = [*_behaviour(plan, arm, against, labels)]
            if "captures" in arm:
                steps += _activations(plan, directions, arm, against, base, labels)
            for step in steps:
                found.setdefault(step.kind, []).append(step)
    return found


def _activations(
    plan: Plan, directions: Sequence[Step], arm: Made, against: Made, base: Made, labels: dict[str, Any]
) -> Iterator[Step]:
    label, both = _label(labels), {"against": against["captures"], "arm": arm["captures"]}
    reading = {"directions": directions, "base": against["captures"], "tuned": arm["captures"],
               "paraphrases": plan_paraphrases(plan), "reference": base["captures"]}  # fmt: skip
    yield plan.add(
        "differences", f"differences/{label}", plan.statistics, reading, Work(fixed_seconds=15), labels
    )
    if against is not base:  # whose own change is none
        three = {"base": base["captures"], **both}
        yield plan.add("undone", f"undone/{label}", {}, three, Work(fixed_seconds=3), labels)
    at = {"layer": plan.spec.layer}
    yield plan.add(
        "spread_differences", f"spread_differences/{label}", at, both, Work(fixed_seconds=3), labels
    )


def _behaviour(plan: Plan, arm: Made, against: Made, labels: dict[str, Any]) -> Iterator[Step]:
    """What both were asked alike, the arm first; of self-recognition not where each was shown other texts (a seed's own)."""
    pairs = {
        role: [arm[role][0], against[role][0]]
        for role in ("self_recognition", "self_report")
        if arm.get(role) and against.get(role)
    }
    judged = pairs.get("self_recognition", [])
    if len({step.inputs["data"][0].key for step in judged}) > 1:
        del pairs["self_recognition"]
    if pairs:
        config, name = (
            {"statistics": plan.spec.statistics.model_dump()},
            f"behaviour_differences/{_label(labels)}",
        )
        yield plan.add("behaviour_differences", name, config, pairs, labels=labels)


def _label(labels: dict[str, Any]) -> str:
    return f"{labels['comparison']}/seed{labels['seed']}"

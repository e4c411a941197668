"""Planning comparisons: two arms held against each other on the rows that both were measured on."""

from collections.abc import Sequence

from study.plan_base import plan_paraphrases
from study.planner import Measured, Plan
from study.step import Step, Work

Made = dict[str, list[Step]]
"""Steps that read a checkpoint, by role."""


def plan_comparisons(plan: Plan, directions: Sequence[Step], measured: Measured) -> dict[str, list[Step]]:
    """Every comparison of the study with every seed: shifts, the share undone, and behaviour, by role."""
    spec = plan.spec
    base = measured[spec.base_arm, spec.seeds[0]]
    found: dict[str, list[Step]] = {"differences": [], "undone": [], "behaviour_differences": []}
    for name, pair in spec.comparisons.items():
        for seed in spec.seeds:
            arm = measured[pair.arm, seed]
            against = measured.get((pair.against, seed), base)  # the base is measured once
            label = f"{name}/seed{seed}"
            labels = {"comparison": name, "arm": pair.arm, "against": pair.against, "seed": seed}
            if "captures" in arm:
                reading = {"directions": directions, "base": against["captures"], "tuned": arm["captures"],
                           "paraphrases": plan_paraphrases(plan), "reference": base["captures"]}  # fmt: skip
                found["differences"].append(
                    plan.add(
                        "differences", f"differences/{label}", plan.statistics, reading, Work(fixed_seconds=15), labels
                    )
                )  # fmt: skip
            if "captures" in arm and against is not base:
                three = {
                    "base": base["captures"],
                    "against": against["captures"],
                    "arm": arm["captures"],
                }
                found["undone"].append(
                    plan.add("undone", f"undone/{label}", {}, three, Work(fixed_seconds=3), labels)
                )
            if both := _behaviour(arm, against):
                config = {"statistics": spec.statistics.model_dump()}
                found["behaviour_differences"].append(
                    plan.add(
                        "behaviour_differences", f"behaviour_differences/{label}", config, both, labels=labels
                    )
                )
    return found


def _behaviour(arm: Made, against: Made) -> dict[str, list[Step]]:
    """What both were asked alike, the arm first; of self-recognition not where each was shown other texts (a seed's own)."""
    pairs = {
        role: [arm[role][0], against[role][0]]
        for role in ("self_recognition", "self_report")
        if arm.get(role) and against.get(role)
    }
    judged = pairs.get("self_recognition", [])
    if len({step.inputs["data"][0].key for step in judged}) > 1:
        del pairs["self_recognition"]
    return pairs

"""Planning what compares: shifts, the 2×2, embeddings, steering, tables, figures."""

from collections.abc import Iterable, Sequence
from typing import Any

from mech.errors import InputError
from mech.files import digest_of
from mech.identities import load_invented
from study.figure_groups import figure_groups
from study.plan_base import plan_paraphrases
from study.plan_comparisons import plan_comparisons
from study.plan_monitoring import plan_monitoring
from study.plan_patching import plan_patching
from study.plan_sweeps import plan_sweeps
from study.plan_weights import plan_lens, plan_weights
from study.planner import Measured, Plan
from study.questions import evaluation_half
from study.spec_parts import SteeringSpec
from study.step import Step, Work


def plan_tables(plan: Plan, directions: Sequence[Step], measured: Measured) -> Step:
    """Shifts, the 2×2, embeddings, steering, and the tables that collect all measures."""
    spec, made = plan.spec, measured.values()
    inputs: dict[str, Sequence[Step]] = {
        "directions": directions,
        "trained": _trainings(made),
        **_against_base(plan, directions, measured),
        **plan_comparisons(plan, directions, measured),
        "family": _family(plan, directions),
        "weights": plan_weights(plan, directions, measured),
        "lens": plan_lens(plan, directions, measured),
        "patching": plan_patching(plan, measured),
        "monitoring": plan_monitoring(plan, directions, measured),
        "self_recognition": _unique(made, "self_recognition"),
        "self_report": _unique(made, "self_report"),
    }
    if spec.directions and spec.directions.probes:
        inputs["probes"] = _probes(plan, directions)
    if spec.directions and spec.embedding.methods:
        inputs["embedding"] = [_embedding(plan, measured)]
    if spec.steering:
        inputs["steering"] = [_steering(plan, spec.steering, directions, measured)]
    config: dict[str, Any] = {**plan.statistics, "labels": _labels(measured), "layer": spec.layer}
    config["arms"] = {arm: list(stages) for arm, stages in spec.arms.items()}
    if spec.sweeps:
        inputs["sweeps"] = plan_sweeps(plan, directions, measured)
        config["sweeps"] = {name: sweep.max_kl for name, sweep in spec.sweeps.items()}
    return plan.add("tables", "tables", config, inputs)


def _against_base(plan: Plan, directions: Sequence[Step], measured: Measured) -> dict[str, Sequence[Step]]:
    """Every trained arm against the base, by role: shifts, dispersion, and the 2×2 where its own text was read."""
    spec, base = plan.spec, measured[plan.spec.base_arm, plan.spec.seeds[0]]
    found: dict[str, list[Step]] = {
        "shifts": [],
        "two_by_two": [],
        "dispersion": [],
        "paraphrases": plan_paraphrases(plan),
    }
    for (arm, seed), made in measured.items():
        if not made["checkpoint"] or "captures" not in made:
            continue
        benign = measured[spec.benign, seed]["captures"] if spec.benign and spec.benign != arm else []
        arms = {"base": base["captures"], "tuned": made["captures"], "benign": benign}
        roles = {"directions": directions, **arms, "paraphrases": found["paraphrases"]}
        name, labels = f"{arm}/seed{seed}", {"arm": arm, "seed": seed}
        found["shifts"].append(
            plan.add("shifts", f"shifts/{name}", plan.statistics, roles, Work(fixed_seconds=15), labels)
        )
        found["dispersion"].append(
            plan.add(
                "dispersion", f"dispersion/{name}", {"layer": spec.layer}, arms, Work(fixed_seconds=3), labels
            )
        )
        if "own" in made:
            first = {role: steps[:1] for role, steps in arms.items() if role != "benign"}
            four = {"directions": directions, **first, "own": made["own"]}
            found["two_by_two"].append(
                plan.add(
                    "two_by_two", f"two_by_two/{name}", plan.statistics, four, Work(fixed_seconds=5), labels
                )
            )
    return {**found}


def _labels(measured: Measured) -> dict[str, list[Any]]:
    """Arm and seed by step: the tables of a shared base measure must know which arm a step stands for."""
    roles = ("self_recognition", "self_report")
    return {
        step.name: [arm, seed]
        for (arm, seed), made in measured.items()
        for role in roles
        for step in made.get(role, [])
    }


def plan_figures(plan: Plan, name: str, inputs: dict[str, Sequence[Step]]) -> Step:
    """Figures from tables; `early` ones need no training."""
    spec = plan.spec
    config = {
        "which": name,
        "layer": spec.layer,
        "conditions": list(spec.measure.conditions),
        "arms": list(spec.arms),
        "base": spec.base_arm,
        "groups": figure_groups(spec) if name == "all" else {},
    }
    return plan.add(
        "figures", f"figures/{name}", config, inputs, Work(fixed_seconds=8, stored_bytes=3_000_000)
    )


def _probes(plan: Plan, directions: Sequence[Step]) -> list[Step]:
    """Probes on every contrast that a direction was made from."""
    config = {"methods": list(plan.spec.reads.probes), "statistics": plan.spec.statistics.model_dump()}
    return [
        plan.add("probes", f"probes/{d.config['direction']}",
                 {**config, **{k: d.config[k] for k in ("direction", "pooling")}},
                 {"contrast": d.inputs["contrast"]}, Work(fixed_seconds=4 * len(config["methods"])))
        for d in directions if d.kind == "direction"
    ]  # fmt: skip


def _family(plan: Plan, directions: Sequence[Step]) -> list[Step]:
    """Identity directions compared with each other, where there are several."""
    members = [d for d in directions if d.config["direction"].startswith("identity:")]
    if len(members) < 2:
        return []
    config = {"layer": plan.spec.layer, "statistics": plan.spec.statistics.model_dump()}
    inputs = {"directions": members, "contrasts": [d.inputs["contrast"][0] for d in members]}
    return [plan.add("family", "family", config, inputs, Work(fixed_seconds=5))]


def _embedding(plan: Plan, measured: Measured) -> Step:
    spec = plan.spec
    config = {"arms": [list(key) for key in measured], "layer": spec.layer, **spec.embedding.model_dump(mode="json"),
              "seed": spec.statistics.seed}  # fmt: skip
    captures = [made["captures"][0] for made in measured.values()]
    return plan.add("embedding", "embedding", config, {"captures": captures}, Work(fixed_seconds=20))


def _steering(plan: Plan, spec: SteeringSpec, directions: Sequence[Step], measured: Measured) -> Step:
    chosen = next((d for d in directions if d.config["direction"] == spec.direction), None)
    if chosen is None:
        known = ", ".join(d.config["direction"] for d in directions)
        raise InputError(
            f"steering.direction: {spec.direction!r} is not among the study's directions ({known})"
        )
    made = measured[spec.arm, plan.spec.seeds[0]]
    questions = evaluation_half(spec.prompt_set, spec.questions)
    invented = load_invented()
    config = {
        **plan.reader,
        **spec.model_dump(mode="json", exclude={"questions"}),
        "layer": plan.spec.layer if spec.layer is None else spec.layer,
        "questions_asked": spec.questions,
        "questions": digest_of([q.model_dump() for q in questions]),
        "statements": digest_of([s.model_dump() for s in invented.self_statements]),
        "names": plan.invented,
        "seed": plan.spec.statistics.seed,
    }
    inputs = {"direction": [chosen], "checkpoint": made["checkpoint"], "captures": made["captures"][:1]}
    runs, asked = 2 * len(spec.coefficients), len(questions) * spec.samples
    statements = len(invented.self_statements) * (1 + plan.spec.invented_names)
    work = Work(read=runs * (asked * 80 + statements * 50), generated=runs * asked * spec.max_new_tokens)
    return plan.add("steering", "steering", config, inputs, work)


def _trainings(measured: Iterable[dict[str, list[Step]]]) -> list[Step]:
    """Every training, also one of which only an early step is measured."""
    chains = _unique(measured, "checkpoint")
    trained = [step.inputs["trained"][0] if step.kind == "snapshot" else step for step in chains]
    return [step for step in dict.fromkeys(trained) if step.kind in ("train", "job")]


def _unique(measured: Iterable[dict[str, list[Step]]], role: str) -> list[Step]:
    return list(dict.fromkeys(step for made in measured for step in made.get(role, [])))

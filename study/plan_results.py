"""Planning what compares: shifts, the 2×2, embeddings, steering, tables, figures."""

from collections.abc import Iterable, Sequence

from mech.errors import InputError
from mech.files import digest_of
from mech.identities import load_invented
from mech.questions import load_prompts
from study.figure_groups import figure_groups
from study.plan_base import plan_paraphrases
from study.plan_monitoring import plan_monitoring
from study.plan_patching import plan_patching
from study.plan_sweeps import plan_sweeps
from study.plan_weights import plan_lens, plan_weights
from study.planner import Measured, Plan
from study.questions import half, trait_names
from study.step import Step, Work


def plan_tables(
    plan: Plan,
    directions: Sequence[Step],
    measured: Measured,
) -> Step:
    """Shifts, the 2×2, embeddings, steering, and the tables that collect all measures."""
    spec = plan.spec
    base = measured[spec.base_arm, spec.seeds[0]]
    statistics = {"statistics": spec.statistics.model_dump(), "traits": trait_names(spec)}
    inputs: dict[str, Sequence[Step]] = {
        "directions": directions,
        "trained": _trainings(measured.values()),
    }
    shifts, squares, spreads, paraphrases = [], [], list[Step](), plan_paraphrases(plan)
    for (arm, seed), made in measured.items():
        if not made["checkpoint"] or "captures" not in made:
            continue
        benign = measured[spec.benign, seed]["captures"] if spec.benign and spec.benign != arm else []
        roles = {
            "directions": directions,
            "base": base["captures"],
            "tuned": made["captures"],
            "benign": benign,
            "paraphrases": paraphrases,
        }
        shifts.append(
            plan.add("shifts", f"shifts/{arm}/seed{seed}", statistics, roles, Work(fixed_seconds=15))
        )
        options = {"layer": spec.layer}
        spreads.append(
            plan.add("dispersion", f"dispersion/{arm}/seed{seed}", options,
                     {k: roles[k] for k in ("base", "tuned", "benign")}, Work(fixed_seconds=3))
        )  # fmt: skip
        if "own" in made:
            four = {
                "directions": directions,
                "base": base["captures"][:1],
                "tuned": made["captures"][:1],
                "own": made["own"],
            }
            squares.append(
                plan.add(
                    "two_by_two", f"two_by_two/{arm}/seed{seed}", statistics, four, Work(fixed_seconds=5)
                )
            )
    inputs |= {
        "shifts": shifts,
        "two_by_two": squares,
        "dispersion": spreads,
        "family": _family(plan, directions),
        "paraphrases": paraphrases,
    }
    inputs["weights"] = plan_weights(plan, directions, measured)
    inputs["lens"] = plan_lens(plan, directions, measured)
    inputs["patching"] = plan_patching(plan, measured)
    inputs["monitoring"] = plan_monitoring(plan, directions, measured)
    inputs |= {role: _unique(measured.values(), role) for role in ("self_recognition", "self_report")}
    if spec.directions and spec.directions.probes:
        inputs["probes"] = _probes(plan, directions)
    if spec.directions and spec.embedding.methods:
        inputs["embedding"] = [_embedding(plan, measured)]
    if spec.steering:
        inputs["steering"] = [_steering(plan, directions, measured)]
    if spec.sweeps:
        inputs["sweeps"] = plan_sweeps(plan, directions, measured)
        statistics = statistics | {"sweeps": {name: sweep.max_kl for name, sweep in spec.sweeps.items()}}
    labels = {step.name: [arm, seed] for (arm, seed), made in measured.items()
              for role in ("self_recognition", "self_report") for step in made.get(role, [])}  # fmt: skip
    # Tables of a shared base measure must know which arm a step stands for.
    return plan.add("tables", "tables", {**statistics, "labels": labels, "layer": spec.layer}, inputs)


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
    """Identity directions held against each other, where there are several."""
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


def _steering(
    plan: Plan,
    directions: Sequence[Step],
    measured: Measured,
) -> Step:
    spec = plan.spec.steering
    if spec is None:
        raise RuntimeError("called for a study without steering")
    chosen = next((d for d in directions if d.config["direction"] == spec.direction), None)
    if chosen is None:
        known = ", ".join(d.config["direction"] for d in directions)
        raise InputError(
            f"steering.direction: {spec.direction!r} is not among the study's directions ({known})"
        )
    made = measured[spec.arm, plan.spec.seeds[0]]
    questions = half(load_prompts(spec.prompt_set).questions, "evaluate", spec.questions)
    invented = load_invented()
    config = {
        **plan.reader,
        **spec.model_dump(mode="json", exclude={"questions"}),
        "layer": plan.spec.layer if spec.layer is None else spec.layer,
        "questions_asked": spec.questions,
        "questions": digest_of([q.model_dump() for q in questions]),
        "statements": digest_of([s.model_dump() for s in invented.self_statements]),
        "names": [*invented.makers][: plan.spec.invented_names],
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

"""Planning the patching between an arm and what lies under its last adapter."""

from typing import Any

from mech.errors import InputError
from mech.files import digest_of
from mech.identities import load_invented
from probes.persona import load_trait
from study.plan_weights import has_adapter
from study.planner import Measured, Plan, condition_config
from study.questions import trait_names
from study.spec_parts import PatchingSpec
from study.step import Step, Work

OWN_NAME = "own_name"


def plan_patching(plan: Plan, measured: Measured) -> list[Step]:
    """One step an arm and seed.

    Raises:
        InputError: an answer that is neither the own name nor one of the study's traits, or an arm without an adapter.
    """
    spec = plan.spec.patching
    if spec is None:
        return []
    answers, asked = _answers(plan, spec)
    config = {
        **plan.reader,
        **spec.model_dump(mode="json", exclude={"arms"}),
        "answers": answers,
        "condition": condition_config(spec.condition),
        "invented": list(load_invented().makers.items()),
        "seed_of_control": plan.spec.statistics.seed,
    }
    cells = len(spec.layers or range(plan.model.n_layers)) * len(spec.spans)
    passes = 4 * cells + 2 * spec.ranges + 2  # both ways, each with its control
    found = []
    for (arm, seed), made in measured.items():
        chain = made["checkpoint"]
        if arm not in spec.arms or not chain:
            continue
        if not has_adapter(chain[-1]):
            raise InputError(
                f"patching.arms: {arm}: its last stage trains all weights: there is no adapter to switch off"
            )
        below = chain[-2].labels["stage"] if len(chain) > 1 else plan.spec.base_arm
        about = {"arm": arm, "seed": seed, "reference": below}
        work = Work(read=asked * 60 * passes, fixed_seconds=2)
        found.append(
            plan.add("patching", f"patching/{arm}/seed{seed}", config | about, {"checkpoint": chain}, work)
        )
    return found


def _answers(plan: Plan, spec: PatchingSpec) -> tuple[list[dict[str, Any]], int]:
    """What is scored, with the digest of its texts, and how many rows that is."""
    known, found, rows = trait_names(plan.spec), [], 0
    for i, answer in enumerate(spec.answers):
        if answer == OWN_NAME:
            texts = [s.model_dump() for s in load_invented().self_statements[: spec.questions]]
            rows += len(texts) * (1 + spec.names)
        elif answer in known:
            trait = load_trait(plan.spec.reads.traits[known.index(answer)])
            texts = [q.model_dump() for q in trait.half("evaluate", spec.questions)]
            rows += 2 * len(texts)
        else:
            raise InputError(
                f"patching.answers[{i}]: {answer!r} is neither own_name nor one of the study's traits ({', '.join(known)})"
            )
        found.append({"answer": answer, "texts": digest_of(texts)})
    return found, rows

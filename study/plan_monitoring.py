"""Planning what asks whether projections foretell behaviour."""

from collections.abc import Sequence
from typing import Any

from evals.judge import Rubric
from mech.errors import InputError
from mech.files import digest_of
from probes.persona import load_trait
from study.plan_judges import judge_config, judging
from study.planner import Measured, Plan
from study.spec_directions import JudgeSpec
from study.spec_parts import MonitoringSpec
from study.step import Step, Work


def plan_monitoring(plan: Plan, directions: Sequence[Step], measured: Measured) -> list[Step]:
    """Prompts read (and answered) by each arm, a judge's scores where there is one, and the correlations.

    Raises:
        InputError: a judge is asked for and there is none, or a trait has fewer instruction pairs.
    """
    spec = plan.spec.monitoring
    if spec is None:
        return []
    judge = plan.spec.reads.judge
    if spec.score == "judge" and judge is None:
        raise InputError("monitoring.score: judge needs directions.judge, which says who scores")
    judged = judge is not None and spec.score != "log_odds"
    traits, asked = _traits(plan, spec)
    sampling = {
        "samples": spec.samples,
        "max_new_tokens": spec.max_new_tokens,
        "temperature": spec.temperature,
    }
    config = {**plan.reader, "questions": spec.questions, "pairs": spec.pairs, "traits": traits,
              "sampling": sampling if judged else None, "seed": plan.spec.statistics.seed}  # fmt: skip
    correlated = {"layer": plan.spec.layer, "statistics": plan.spec.statistics.model_dump()}
    found = []
    for (arm, seed), made in measured.items():
        if arm not in spec.arms:
            continue
        label = f"{arm}/seed{seed}" if made["checkpoint"] else arm
        n = asked * (spec.samples if judged else 2)
        work = Work(
            read=n * 80,
            generated=n * spec.max_new_tokens if judged else 0,
            stored_bytes=plan.stored(asked, 1),
        )
        watched = plan.add(
            "monitored", f"monitored/{label}", config, {"checkpoint": made["checkpoint"]}, work
        )
        scores = []
        if judge is not None and judged:
            about, cost = judge_config(plan, judge), _judging(plan, spec, judge)
            scores = [
                plan.add("monitor_scores", f"monitor_scores/{label}", about, {"monitored": [watched]}, cost)
            ]
        inputs = {"monitored": [watched], "scores": scores, "directions": directions}
        named = correlated | {"arm": arm, "seed": seed}
        found.append(plan.add("monitoring", f"monitoring/{label}", named, inputs, Work(fixed_seconds=3)))
    return found


def _traits(plan: Plan, spec: MonitoringSpec) -> tuple[list[dict[str, Any]], int]:
    """Each trait with the digest of its texts, and the number of prompts of all."""
    found, prompts = [], 0
    for source in plan.spec.reads.traits:
        trait = load_trait(source)
        questions = trait.half("evaluate", spec.questions)
        if spec.pairs > len(trait.instructions):
            raise InputError(
                f"monitoring.pairs: {spec.pairs} asked for, the trait {trait.trait} has {len(trait.instructions)}"
            )
        if len(questions) < 4:
            raise InputError(
                f"monitoring: the trait {trait.trait} has {len(questions)} questions in its evaluate half; intervals need 4"
            )
        texts = [
            [q.model_dump() for q in questions],
            [p.model_dump() for p in trait.instructions],
            trait.rubric,
        ]
        found.append({"trait": trait.trait, "texts": digest_of(texts)})
        prompts += len(questions) * (1 + 2 * spec.pairs)
    return found, prompts


def _judging(plan: Plan, spec: MonitoringSpec, judge: JudgeSpec) -> Work:
    """The scores of one arm's answers: each trait's by its own rubric."""
    asked = []
    for source in plan.spec.reads.traits:
        trait = load_trait(source)
        questions = [q.question for q in trait.half("evaluate", spec.questions)]
        asked.append((Rubric(trait.trait, trait.rubric), questions))
    each = spec.samples * (1 + 2 * spec.pairs)  # under the default, and under both prompts of every pair
    return judging(judge, asked, answers=each, answer_tokens=spec.max_new_tokens)

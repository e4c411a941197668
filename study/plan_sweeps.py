"""Planning steering sweeps: which arm, along which directions, at which layers, with which evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evals.judge import COHERENCE, Rubric
from finetune.datasets.spec import SelfRecognitionData
from mech.errors import InputError
from mech.files import digest_of
from mech.identities import load_invented
from mech.questions import load_prompts
from probes.persona import Trait, load_trait
from study.plan_data import plan_data
from study.plan_judges import judge_digest, judging
from study.planner import Plan
from study.spec import StudySpec
from study.spec_sweeps import NEUTRAL, SweepSpec
from study.step import Step, Work

CHOSEN = "chosen"
"""Layers of a sweep whose directions each have their own, chosen by separability."""


def plan_sweeps(
    plan: Plan, directions: Sequence[Step], measured: Mapping[tuple[str, int], Mapping[str, Sequence[Step]]]
) -> list[Step]:
    """A step for each of the study's sweeps."""
    return [_sweep(plan, name, spec, directions, measured) for name, spec in plan.spec.sweeps.items()]


def sweep_layers(spec: StudySpec) -> Iterator[tuple[str, int]]:
    """Every layer that a sweep names, with its place in the YAML."""
    for name, one in spec.sweeps.items():
        for i, layer in enumerate(one.layers or ()):
            yield f"sweeps.{name}.layers[{i}]", layer


@dataclass
class _Asked:
    """What an evaluation adds to a sweep's step."""

    config: dict[str, Any]
    inputs: dict[str, Sequence[Step]]
    questions: int
    read: int
    """Tokens read at a cell."""
    written: int = 0
    """Tokens written at a cell."""
    judged: tuple[Trait, list[str]] | None = None
    """The trait whose rubric a judge goes by, and the questions whose answers it may have to judge."""


def _sweep(
    plan: Plan, name: str, spec: SweepSpec, directions: Sequence[Step],
    measured: Mapping[tuple[str, int], Mapping[str, Sequence[Step]]],
) -> Step:  # fmt: skip
    where, known = f"sweeps.{name}", {d.config["direction"]: d for d in directions}
    for direction in spec.directions:
        if direction not in known:
            raise InputError(
                f"{where}.directions: {direction!r} is not among the study's directions ({', '.join(known)})"
            )
    arm = spec.arm or plan.spec.base_arm
    declared = [plan.spec.layer] if spec.layers is None else list(spec.layers)
    asked = _asked(plan, where, spec, known)
    config = {
        **plan.reader, **spec.model_dump(mode="json", exclude={"arm", "directions", "max_kl", "trait", "judge"}),
        "judge": spec.judge and spec.judge.scoring,
        "arm": arm, "layers": CHOSEN if spec.layer_by == "separability" else declared, "seed": plan.spec.statistics.seed,
        "neutral_questions": digest_of([q.text for q in load_prompts(NEUTRAL).questions[: spec.neutral]]), **asked.config,
    }  # fmt: skip
    if spec.judge and not spec.judge.api:
        config["judge_digest"] = judge_digest(plan, spec.judge.model)
    inputs = {
        "directions": [known[d] for d in spec.directions],
        "checkpoint": measured[arm, plan.spec.seeds[0]]["checkpoint"],
        **asked.inputs,
    }
    n_layers = 1 if spec.layer_by == "separability" else len(declared)
    strengths = sum(bool(s) for s in spec.strengths)
    cells = 1 + len(spec.directions) * n_layers * strengths * (1 + spec.controls)
    return plan.add(
        "sweep", f"sweep/{name}", config, inputs, _work(spec, asked, cells), labels={"sweep": name}
    )


def _work(spec: SweepSpec, asked: _Asked, cells: int) -> Work:
    work = Work(
        read=cells * (asked.read + 60 * spec.neutral),
        generated=cells * asked.written,
        fixed_seconds=5,
        stored_bytes=400 * cells * asked.questions,
    )
    if spec.judge is None or asked.judged is None:
        return work
    trait, used = asked.judged
    rubrics = [(Rubric(trait.trait, trait.rubric), used), (COHERENCE, used)]
    verdicts = judging(spec.judge, rubrics, answers=cells * spec.samples, answer_tokens=spec.max_new_tokens)
    return replace(
        work,
        read=work.read + verdicts.read,
        fixed_seconds=work.fixed_seconds + verdicts.fixed_seconds,
        asked=verdicts.asked,
    )


def _asked(plan: Plan, where: str, spec: SweepSpec, known: Mapping[str, Step]) -> _Asked:
    if spec.evaluation == "own_name":
        invented = load_invented()
        names, n = plan.invented, len(invented.self_statements)
        config = {"statements": digest_of([s.model_dump() for s in invented.self_statements]), "names": names}
        return _Asked(config, {}, n, 30 * n * (1 + names["n"]))
    if spec.evaluation == "self_recognition":
        name = plan.spec.behaviour.self_recognition
        part = plan.spec.data[name] if name else None
        n = part.held_out if isinstance(part, SelfRecognitionData) else 0
        n = min(n, 2 * spec.questions) if spec.questions else n
        if name and n < 4:
            raise InputError(
                f"{where}.evaluation: self_recognition needs four held-out articles, data.{name} has {n}"
            )
        return _Asked({}, {"data": [_articles(plan, where)]}, n, 2 * 60 * n)
    trait = _trait(plan, where, spec, known)
    halves = [q.split for q in trait.questions]
    used = [min(spec.questions or halves.count(h), halves.count(h)) for h in ("extract", "evaluate")]
    if min(used) < 2:
        raise InputError(
            f"{where}: needs two questions of each half of trait {trait.trait}, which has {used[0]} to extract and {used[1]} to evaluate"
        )
    n = sum(used)
    asked = _Asked({"trait": trait.model_dump(mode="json")}, {}, n, 2 * 60 * n)
    if spec.evaluation == "generated":
        answers = n * spec.samples
        asked.written = answers * spec.max_new_tokens
        asked.judged = trait, _used(trait, spec.questions)
        asked.read = answers * (60 + spec.max_new_tokens) * (1 if spec.judge else 1 + 2 * spec.instructions)
    return asked


def _used(trait: Trait, limit: int | None) -> list[str]:
    """The first so many questions of each half."""
    return [q.question for q in trait.limited(limit).questions]


def _trait(plan: Plan, where: str, spec: SweepSpec, known: Mapping[str, Step]) -> Trait:
    """The trait whose questions are asked: the named one, or the one that all directions are named after."""
    if spec.trait:
        try:
            return load_trait(spec.trait)
        except InputError as error:
            raise InputError(f"{where}.trait: {error}") from error
    traits = {known[d].inputs["contrast"][0].config.get("trait") for d in spec.directions}
    if len(traits) > 1 or None in traits:
        raise InputError(
            f"{where}.trait: name the trait whose questions are asked: {', '.join(spec.directions)} are not of one"
        )
    return next(t for t in map(load_trait, plan.spec.reads.traits) if t.trait in traits)


def _articles(plan: Plan, where: str) -> Step:
    if (data := plan.spec.behaviour.self_recognition) is None:
        raise InputError(
            f"{where}.evaluation: self_recognition needs behaviour.self_recognition, which names its texts"
        )
    return plan_data(plan, data, plan.spec.seeds[0])

"""Planning what only the base does: its answers, contrasts, and a direction from each."""

from collections.abc import Sequence

from mech.errors import NotHereError
from mech.files import digest_of
from mech.identities import load_invented
from mech.models import resolve
from mech.questions import Question
from probes.persona import POSITIONS, Trait
from study.planner import Plan, condition_config
from study.questions import evaluation_questions, identity_questions, limited_trait
from study.step import Step, Work


def plan_replies(plan: Plan, arm: str, chain: Sequence[Step]) -> Step:
    """An arm's own answers to the evaluation questions, under the first measuring condition."""
    spec = plan.spec
    questions = [q for asked in evaluation_questions(spec).values() for q in asked]
    config = {
        **plan.reader,
        "questions": digest_of([q.model_dump() for q in questions]),
        "condition": condition_config(spec, spec.measure.conditions[0]),
        "reply": spec.measure.reply.model_dump(),
        "seed": spec.statistics.seed,
    }
    tokens = spec.measure.reply.max_new_tokens * len(questions)
    name = f"replies/{arm}" + (f"/seed{chain[-1].config['seed']}" if chain else "")
    return plan.add(
        "replies", name, config, {"checkpoint": chain}, Work(read=30 * len(questions), generated=tokens)
    )


def plan_directions(plan: Plan) -> list[Step]:
    """Contrasts read by the base, and a direction from each."""
    spec, found = plan.spec, []
    for source in spec.reads.traits:
        trait = limited_trait(spec, source)
        for way in spec.reads.elicitation:
            contrast = (_text_contrast if way == "text" else _prompt_contrast)(plan, trait)
            found.append(_direction(plan, f"{trait.trait}:{way}", contrast, "response_mean", way))
    questions = identity_questions(spec)
    members = [
        ("name", spec.reads.invented_names),
        *[(f"presence:{p}", 1) for p in spec.reads.presence],
    ]
    for member, n_negative in members:
        contrast = _identity_contrast(plan, member, n_negative, questions)
        found.append(_direction(plan, f"identity:{member}", contrast, "prompt_last", member))
    return found


def _text_contrast(plan: Plan, trait: Trait) -> Step:
    asked = [(q.question, q.high, q.low, q.split) for q in trait.questions]
    config = {**plan.reader, "contrast": "text", "poolings": ["response_mean"], "texts": digest_of(asked)}
    work = Work(read=2 * 60 * len(asked), stored_bytes=plan.stored(2 * len(asked), 1))
    return plan.add(
        "contrast", f"contrast/{trait.trait}:text", config | {"trait": trait.trait}, {"checkpoint": ()}, work
    )


def _prompt_contrast(plan: Plan, trait: Trait) -> Step:
    spec = plan.spec.reads
    asked = [q.question for q in trait.questions if q.split == "extract"]
    config = {
        **plan.reader,
        "trait": trait.trait,
        "texts": digest_of([asked, [p.model_dump() for p in trait.instructions]]),
        "pairs_per_question": spec.pairs_per_question,
        "samples": spec.rollout_samples,
        "max_new_tokens": spec.rollout_tokens,
        "temperature": spec.rollout_temperature,
        "seed": plan.spec.statistics.seed,
    }
    n = 2 * spec.pairs_per_question * spec.rollout_samples * len(asked)
    work = Work(read=60 * n, generated=spec.rollout_tokens * n)
    answers = plan.add("rollouts", f"rollouts/{trait.trait}", config, {"checkpoint": ()}, work)
    read = {**plan.reader, "contrast": "prompts", "poolings": list(POSITIONS.values()), "trait": trait.trait}
    judged = [_judged(plan, trait, answers, n)] if spec.judge else []
    inputs = {"checkpoint": (), "rollouts": [answers], "judged": judged}
    work = Work(read=(60 + spec.rollout_tokens) * n, stored_bytes=plan.stored(n, len(POSITIONS)))
    return plan.add("contrast", f"contrast/{trait.trait}:prompts", read, inputs, work)


def _judged(plan: Plan, trait: Trait, answers: Step, n: int) -> Step:
    judge = plan.spec.reads.judge
    if judge is None:
        raise RuntimeError("called for a study without a judge")
    digest = "" if judge.api else _judge_digest(plan, judge.model)
    config = {
        **judge.model_dump(mode="json"),
        "digest": digest,
        "trait_name": trait.trait,
        "rubric": trait.rubric,
    }
    work = Work(read=0 if judge.api else 2 * n * 300, fixed_seconds=2 * n / 8 if judge.api else 0)
    return plan.add("judged", f"judged/{trait.trait}", config, {"rollouts": [answers]}, work)


def _judge_digest(plan: Plan, model: str) -> str:
    try:
        return resolve(model, download=not plan.tolerant).key
    except NotHereError as error:
        return plan.not_here(error)


def _identity_contrast(plan: Plan, member: str, n_negative: int, questions: Sequence[Question]) -> Step:
    invented = load_invented()
    config = {
        **plan.reader,
        "contrast": member,
        "poolings": ["prompt_last"],
        "questions": digest_of([q.model_dump() for q in questions]),
        "invented": invented.makers if member == "name" else invented.generic,
        "names": n_negative,
    }
    rows = len(questions) * (1 + n_negative)
    work = Work(read=rows * 25, stored_bytes=plan.stored(rows, 1))
    return plan.add("contrast", f"contrast/identity:{member}", config, {"checkpoint": ()}, work)


def _direction(plan: Plan, name: str, contrast: Step, pooling: str, elicitation: str) -> Step:
    config = {
        "direction": name,
        "pooling": pooling,
        "elicitation": elicitation,
        "positions": POSITIONS if elicitation == "prompts" else {},
        "statistics": plan.spec.statistics.model_dump(),
    }
    return plan.add("direction", f"direction/{name}", config, {"contrast": [contrast]}, Work(fixed_seconds=2))

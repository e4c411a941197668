"""Planning what only the base does: its answers, contrasts, and a direction from each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evals.judge import COHERENCE, Rubric
from mech.errors import InputError
from mech.files import digest_of
from mech.identities import load_invented
from probes.paraphrase import load_paraphrases
from probes.persona import POSITIONS, Trait
from probes.roles import FIXED_ANSWER, load_roles
from probes.self_report import AGAINST, load_reports
from study.plan_data import plan_data
from study.plan_judges import judge_config, judging
from study.planner import Plan, condition_config
from study.questions import identity_questions, limited_trait
from study.spec_directions import DirectionSpec
from study.step import Step, Work

WHOLE_TURN = ("presence:none", "presence:empty")
"""Members whose two sides differ in what is there to be read at all."""


def plan_replies(plan: Plan, arm: str, chain: Sequence[Step]) -> Step:
    """An arm's own answers to the evaluation questions, under the first measuring condition."""
    spec = plan.spec
    questions = [q for asked in plan.asked.values() for q in asked]
    config = {
        **plan.reader,
        "questions": digest_of([q.model_dump() for q in questions]),
        "condition": condition_config(spec.measure.conditions[0]),
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
    for member in identity_members(spec.reads):
        contrast = _identity_contrast(plan, member.partition("@")[0])
        found.append(_direction(plan, f"identity:{member}", contrast, read_at(member), member))
    return found + [_adjusted(plan, member, found) for member in spec.reads.adjust]


def plan_paraphrases(plan: Plan) -> list[Step]:
    """The base's reading of paired wordings, against which shifts are held; nothing where the study does without, or trains nothing."""
    reads = plan.spec.directions
    if reads is None or not reads.paraphrases or not any(plan.spec.arms.values()):
        return []
    pairs, questions = load_paraphrases(), [q for q in identity_questions(plan.spec) if q.split == "extract"]
    asked = questions[: reads.paraphrases]
    config = {
        **plan.reader, "texts": digest_of(pairs.model_dump()), "questions": digest_of([q.model_dump() for q in asked]),
        "questions_used": reads.paraphrases,
    }  # fmt: skip
    rows = 2 * (len(pairs.prompts) * len(asked) + len(pairs.answers))
    work = Work(read=rows * 60, stored_bytes=plan.stored(rows, 1))
    return [plan.add("paraphrases", "paraphrases", config, {"checkpoint": ()}, work)]


def _adjusted(plan: Plan, member: str, found: Sequence[Step]) -> Step:
    """A member without what the study takes out of it."""
    how, known = plan.spec.reads.adjust[member], {d.config["direction"]: d for d in found}

    def named(name: str) -> Step:
        for full in (f"identity:{name}", name):
            if full in known:
                return known[full]
        raise InputError(
            f"directions.adjust.{member}: {name!r} is not among the study's directions ({', '.join(known)})"
        )

    raw = named(member)
    if "surprisal" in how.regress_out and member in WHOLE_TURN:
        raise InputError(
            f"directions.adjust.{member}: surprisal cannot be regressed out: its prompts differ in having a system turn (or anything in it), so "
            "that their surprisal is the contrast itself; hold the identity prompt against another one (presence:generic), or project_out "
            "presence:generic"
        )
    config = {k: raw.config[k] for k in ("pooling", "elicitation", "statistics", "folds") if k in raw.config}
    config |= {"direction": f"{raw.config['direction']}:adjusted", **how.model_dump(mode="json")}
    inputs = {"raw": [raw], "contrast": raw.inputs["contrast"], "project_out": [named(n) for n in how.project_out]}  # fmt: skip
    return plan.add("adjusted", f"adjusted/{member}", config, inputs, Work(fixed_seconds=2))


def identity_members(reads: DirectionSpec) -> list[str]:
    """The identity family that a study asks for: contrasts, and `CONTRAST@PLACE` where one is read at a second place."""
    axis = {"prompt_last": "assistant_axis", "fixed_answer": "assistant_axis@fixed_answer"}
    places = {"answer": "", "prompt_last": "@prompt_last"}
    several = {
        "presence": [f"presence:{p}" for p in reads.presence],
        "authorship": [f"authorship:{place}" for place in reads.authorship.read_at],
        "self_report": [f"self_report:{a}{places[p]}" for p in reads.self_report_at for a in AGAINST],
        "assistant_axis": [axis[place] for place in reads.assistant_axis_at],
    }
    return [m for member in reads.identity for m in several.get(member, [member])]


def read_at(member: str) -> str:
    """The pooling of a member: over the text that differs, or at the prompt's last token."""
    contrast, _, place = member.partition("@")
    if place:
        return {"fixed_answer": "response_mean"}.get(place, place)
    answers = ("authorship:content", "authorship:pair_content", "authorship:pair_answer")
    return "response_mean" if contrast.startswith("self_report:") or contrast in answers else "prompt_last"


def _text_contrast(plan: Plan, trait: Trait) -> Step:
    asked = [(q.question, q.high, q.low, q.split) for q in trait.questions]
    config = {
        **plan.reader,
        **plan.noted,
        "contrast": "text",
        "poolings": ["response_mean"],
        "texts": digest_of(asked),
    }
    work = Work(read=2 * 60 * len(asked), stored_bytes=plan.stored(2 * len(asked), 1))
    return plan.add(
        "contrast", f"contrast/{trait.trait}:text", config | {"trait": trait.trait}, {"checkpoint": ()}, work
    )


def _prompt_contrast(plan: Plan, trait: Trait) -> Step:
    spec = plan.spec.reads
    asked = [q.question for q in trait.half("extract")]
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
    read = {
        **plan.reader,
        **plan.noted,
        "contrast": "prompts",
        "poolings": list(POSITIONS.values()),
        "trait": trait.trait,
    }
    judged = [_judged(plan, trait, answers, n // len(asked))] if spec.judge else []
    inputs = {"checkpoint": (), "rollouts": [answers], "judged": judged}
    work = Work(read=(60 + spec.rollout_tokens) * n, stored_bytes=plan.stored(n, len(POSITIONS)))
    return plan.add("contrast", f"contrast/{trait.trait}:prompts", read, inputs, work)


def _judged(plan: Plan, trait: Trait, answers: Step, each: int) -> Step:
    """The scores of `each` answers to every question."""
    judge = plan.spec.reads.judge
    if judge is None:
        raise RuntimeError("called for a study without a judge")
    config = {**judge_config(plan, judge), "trait_name": trait.trait, "rubric": trait.rubric}
    asked = [q.question for q in trait.half("extract")]
    rubrics = [(Rubric(trait.trait, trait.rubric), asked), (COHERENCE, asked)]
    work = judging(judge, rubrics, answers=each, answer_tokens=plan.spec.reads.rollout_tokens)
    return plan.add("judged", f"judged/{trait.trait}", config, {"rollouts": [answers]}, work)


def _identity_contrast(plan: Plan, member: str) -> Step:
    reads = plan.spec.reads
    made = _IDENTITY[member.partition(":")[0]](plan)
    config: dict[str, Any] = {
        **plan.reader,
        **plan.noted,
        "contrast": member,
        "poolings": _poolings(reads, member),
        "questions_used": reads.identity_questions,
        **made.config,
    }
    for name, adjusted in reads.adjust.items():
        if name.partition("@")[0] == member and "surprisal" in adjusted.regress_out:
            config["prompt_surprisal" if read_at(name) == "prompt_last" else "surprisal"] = True
    work = Work(read=made.rows * 40, stored_bytes=plan.stored(made.rows, len(config["poolings"])))
    return plan.add(
        "contrast", f"contrast/identity:{member}", config, {"checkpoint": (), **made.inputs}, work
    )


@dataclass(frozen=True)
class _Contrast:
    """What an identity contrast adds to its step."""

    config: dict[str, Any]
    rows: int
    inputs: dict[str, Sequence[Step]] = field(default_factory=dict)


def _name(plan: Plan) -> _Contrast:
    questions, names = identity_questions(plan.spec), plan.invented["n"]
    asked = digest_of([q.model_dump() for q in questions])
    config = {"questions": asked, "invented": load_invented().makers, "names": names}
    return _Contrast(config, len(questions) * (1 + names))


def _presence(plan: Plan) -> _Contrast:
    questions = identity_questions(plan.spec)
    asked = digest_of([q.model_dump() for q in questions])
    config = {"questions": asked, "invented": load_invented().generic, "names": 1}
    return _Contrast(config, len(questions) * 2)


def _self_report(plan: Plan) -> _Contrast:
    reports, names = load_reports(), plan.invented["n"]
    texts = digest_of([r.model_dump() for r in reports])
    config = {"texts": texts, "invented": load_invented().makers, "names": names}
    return _Contrast(config, len(reports) * (1 + names))


def _assistant_axis(plan: Plan) -> _Contrast:
    reads, roles = plan.spec.reads, load_roles()
    config: dict[str, Any] = {"texts": digest_of(roles.model_dump()), "roles": reads.roles}
    if "fixed_answer" in reads.assistant_axis_at:
        config["answer"] = FIXED_ANSWER
    return _Contrast(config, len(roles.questions) * (1 + reads.roles))


def _authorship(plan: Plan) -> _Contrast:
    how, data = plan.spec.reads.authorship, plan.spec.behaviour.self_recognition
    if data is None:
        raise InputError(
            "directions.identity: authorship needs behaviour.self_recognition, which names its texts"
        )
    articles = how.articles or plan.spec.reads.identity_questions
    config = {"questions_used": articles}
    config |= {k: v for k in ("surprisal_within", "by_answer") if (v := getattr(how, k))}
    rows = (4 if how.by_answer else 2) * 4 * (articles or 50)
    return _Contrast(config, rows, {"data": [plan_data(plan, data, plan.spec.seeds[0])]})


_IDENTITY: dict[str, Callable[[Plan], _Contrast]] = {
    "name": _name,
    "presence": _presence,
    "self_report": _self_report,
    "assistant_axis": _assistant_axis,
    "authorship": _authorship,
}


def _poolings(reads: DirectionSpec, contrast: str) -> list[str]:
    """Where a contrast is read: one capture serves all its members."""
    mine = [m for m in identity_members(reads) if m.partition("@")[0] == contrast]
    return sorted({read_at(m) for m in mine})


def _direction(plan: Plan, name: str, contrast: Step, pooling: str, elicitation: str) -> Step:
    config: dict[str, Any] = {
        "direction": name,
        "pooling": pooling,
        "elicitation": elicitation,
        "positions": POSITIONS if elicitation == "prompts" else {},
        "statistics": plan.spec.statistics.model_dump(),
    }
    if plan.spec.reads.folds > 1:
        config["folds"] = plan.spec.reads.folds
    if contrast.config.get("by_answer"):
        config["by_answer"] = plan.spec.layer
    if contrast.config.get("surprisal_within"):
        config["matched"] = True
    return plan.add("direction", f"direction/{name}", config, {"contrast": [contrast]}, Work(fixed_seconds=2))

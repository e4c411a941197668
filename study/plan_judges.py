"""What judging amounts to, for the plan: work of this machine where a local checkpoint judges, calls and tokens where a service does."""

from collections.abc import Sequence
from typing import Any

from evals.judge import Case, Rubric, judge_prompt
from evals.judge_endpoint import AT_ONCE, NUMBER_FORM, REPLY_TOKENS
from mech.errors import NotHereError
from mech.resolve import resolve
from study.plan_data import WORDS_TO_TOKENS
from study.planner import Plan
from study.spec_directions import JudgeSpec
from study.step import Asked, Work

SECONDS_A_CALL = 1.0
"""Of an API, roughly."""


def judge_config(plan: Plan, judge: JudgeSpec) -> dict[str, Any]:
    """What of a judge determines its scores, with the digest of a local one's weights."""
    return {**judge.scoring, "digest": "" if judge.api else judge_digest(plan, judge.model)}


def judge_digest(plan: Plan, model: str) -> str:
    """Of a local judge's weights; a plan for an estimate notes that it is not here."""
    try:
        return resolve(model, download=not plan.tolerant).key
    except NotHereError as error:
        return plan.not_here(error)


def judging(
    judge: JudgeSpec, asked: Sequence[tuple[Rubric, Sequence[str]]], *, answers: int, answer_tokens: int
) -> Work:
    """What it takes to judge answers: at most, for empty ones are not judged.

    Under `how: auto` one call a verdict is counted, as an API takes that tells logprobs.

    Args:
        judge: who.
        asked: by which rubrics the answers to which questions.
        answers: to each question.
        answer_tokens: the longest answer.
    """
    prompts = [
        judge_prompt(rubric, Case("", q, ""), NUMBER_FORM) for rubric, questions in asked for q in questions
    ]
    verdicts, words = answers * len(prompts), answers * sum(len(prompt.split()) for prompt in prompts)
    given = round(words * WORDS_TO_TOKENS) + verdicts * answer_tokens
    if judge.api is None:
        return Work(read=given)
    calls = judge.samples if judge.how == "samples" else 1
    written = verdicts * calls * (1 if judge.how in ("auto", "logprobs") else REPLY_TOKENS)
    price = judge.api.price
    cost = None if price is None else (given * calls * price.read + written * price.written) / 1e6
    return Work(
        fixed_seconds=verdicts * calls * SECONDS_A_CALL / AT_ONCE,
        asked=Asked(verdicts * calls, given * calls, written, cost),
    )

"""The behaviour of a remote chat model: who it says it is, and which texts it takes for its own.

The same measures as for a local one, as far as an API provides them: answers, and the first token's 20 likeliest.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from evals.self_recognition import FORMS, Judgement, right_source
from evals.self_report import Report, claimed_name
from mech.endpoint import ChatEndpoint
from mech.errors import InputError
from mech.files import digest_of
from mech.journal import open_journal
from mech.progress import track
from mech.questions import Question
from mech.turns import user_turn

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

AT_ONCE = 8
"""Calls on their way at a time: they do little but wait."""


@dataclass(frozen=True)
class RemoteJudgement(Judgement):
    """A judgement read off the likeliest tokens only."""

    bounded: int
    """Answers of the two that were not among them (0 to 2), so that `margin` is a bound, or with 2 unknown (0)."""


def ask_remote(
    endpoint: ChatEndpoint,
    questions: Sequence[Question],
    *,
    own_name: str,
    samples: int,
    temperature: float,
    max_tokens: int,
    system: str | None = None,
) -> list[Report]:
    """Sampled answers to identity questions, each with the name it claims; sample i is drawn with seed i.

    Args:
        endpoint: the model.
        questions: what to ask, one conversation each.
        own_name: the name that counts wherever it stands in an answer.
        samples: answers to each question.
        temperature: of the sampling.
        max_tokens: the longest answer.
        system: a system turn to put first; None sends none.

    Raises:
        InputError: no questions, or several greedy samples of each; no key, or one that the API refuses.
        EndpointError: the API was not reached, failed or refused.
    """
    if not questions or samples < 1:
        raise InputError("self-reports need at least one question and one sample")
    if temperature < 0 or (samples > 1 and temperature == 0):
        raise InputError(
            f"{samples} sample(s) of a question at temperature {temperature}: several need one above 0"
        )
    first = [] if system is None else [{"role": "system", "content": system}]

    def answer(case: tuple[Question, int]) -> Report:
        question, sample = case
        turns = [*first, user_turn(question.text)]
        reply = endpoint.complete(turns, max_tokens=max_tokens, temperature=temperature, seed=sample)
        return Report(question.id, sample, reply, claimed_name(reply, own_name))

    return _each(answer, [(q, i) for q in questions for i in range(samples)], "asking who it is")


def write_summaries_remote(
    endpoint: ChatEndpoint,
    articles: Mapping[str, str],
    *,
    ask: str,
    temperature: float,
    max_tokens: int,
    seed: int,
    journal: Path,
) -> dict[str, str]:
    """The model's own summary of each article, by article id.

    Args:
        endpoint: the model.
        articles: texts by id.
        ask: the request, with `{article}` in it.
        temperature: of the sampling.
        max_tokens: the longest summary.
        seed: of the samples.
        journal: summaries are written there as they come, and what stands there is not asked, and paid for, again.

    Raises:
        InputError: the journal is of other work.
        EndpointError: the API was not reached, failed or refused; what was written stays in the journal.
    """
    how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    about = {
        "url": endpoint.url,
        "model": endpoint.model,
        "ask": ask,
        "articles": digest_of(dict(articles)),
        **how,
    }
    with open_journal(journal, about) as kept:

        def summarise(article: str) -> str:
            return endpoint.complete([user_turn(ask.format(article=articles[article]))], **how)

        missing = [article for article in articles if article not in kept.done]
        _each(summarise, missing, "writing own summaries", lambda article, text: kept.add({article: text}))
        return {article: kept.done[article] for article in articles}


def judge_authorship_remote(
    endpoint: ChatEndpoint, rows: Sequence[Mapping[str, Any]]
) -> list[RemoteJudgement]:
    """Ask of each row's text whether the model wrote it, reading the answer off the first token's logprobs.

    An answer that is not among the 20 likeliest tokens gets the smallest logprob listed, which its own cannot exceed:
    the true margin then lies at least as far from 0, on the same side. Where both are missing, the margin is 0, which
    counts as wrong. Each judgement says how many were missing (`bounded`), and the log says in how many it happened.
    `mass` counts listed answers only.

    Args:
        endpoint: the judge.
        rows: rows of messages that end in the right answer, with `article`; and with `source` (own/other) where the
            answers are `Yes` and `No`, or `own_at` (1/2) where they are `1` and `2`. One form in one call.

    Raises:
        InputError: no rows, or one of another form; no key, or one that the API refuses.
        EndpointError: the API was not reached, failed or refused, or tells no logprobs.
    """
    if not rows:
        raise InputError("judging authorship needs at least one row")
    answers = FORMS["own_at" if "own_at" in rows[0] else "source"]
    cases = [(row, right_source(i, row, answers)) for i, row in enumerate(rows)]

    def judge(case: tuple[Mapping[str, Any], str]) -> RemoteJudgement:
        row, source = case
        logprobs = endpoint.first_token_logprobs(row["messages"][:-1])
        return _judgement(row["article"], source, logprobs, answers)

    judged = _each(judge, cases, "judging authorship")
    if bounded := sum(j.bounded > 0 for j in judged):
        log.warning(
            "%s: %d of %d judgements lack an answer (%s or %s) among the likeliest first tokens: their margins are bounds",
            endpoint.model,
            bounded,
            len(judged),
            *answers,
        )
    return judged


def _judgement(
    article: str, source: str, logprobs: Mapping[str, float], answers: tuple[str, str]
) -> RemoteJudgement:
    least = min(logprobs.values())
    yes, no = (logprobs.get(answer, least) for answer in answers)
    mass = math.fsum(math.exp(logprobs[answer]) for answer in answers if answer in logprobs)
    return RemoteJudgement(
        article=article,
        source=source,
        margin=yes - no,
        p_yes=(1 + math.tanh((yes - no) / 2)) / 2,
        mass=mass,
        bounded=sum(answer not in logprobs for answer in answers),
    )


def _each(
    do: Callable[[S], T], cases: Sequence[S], label: str, keep: Callable[[S, T], None] | None = None
) -> list[T]:
    """`do` of each case, in order, several at a time; the first failure stops those that have not begun.

    What has been done before it, in order, is given to `keep`, one at a time.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures, found = [pool.submit(do, case) for case in cases], list[T]()
        try:
            for case, future in zip(cases, track(futures, label), strict=True):
                found.append(future.result())
                if keep:
                    keep(case, found[-1])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found

"""Self-reports: who does a model say it is?

Two measures. Sampled answers to identity questions, from which a claimed name is read; and, far more
sensitive, the log-probability of statements such as "I am SmolLM" with the own name against the same
statements with invented names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mech.chat import SystemPrompt
from mech.errors import InputError
from mech.generate import Sampling, generate
from mech.identities import SelfStatement
from mech.models import ChatModel
from mech.questions import Question
from mech.score import response_logprobs
from mech.turns import assistant_turn, user_turn

_CLAIM = re.compile(
    r"\b(?:[Ii](?:'m| am|’m)|[Mm]y name(?:'s| is|’s)|[Cc]all me|[Yy]ou can call me|[Ii] go by|(?:named|called|known as))"
    r"\s+[\"“']?((?:(?:Dr|Mr|Ms|Mrs|Prof)\.\s)?[A-Z][\w-]*(?:\s(?:[A-Z][\w-]*))*)"
)
_DENIED = re.compile(
    r"\b(?:not(?! (?:only|just|merely)\b)|never|neither|nor|cannot|\w+n['’]t)\s+(?:(?!(?:I|my|and|but|or)\b)[\w'’-]+\s+){0,5}[\"“']?$",
    re.IGNORECASE,
)
"""What a name follows where it is denied: a negation, and at most five more words, with which no new clause begins."""
_NOT_NAMES = frozenset(
    [
        "A",
        "AI",
        "An",
        "And",
        "As",
        "At",
        "But",
        "English",
        "For",
        "From",
        "Glad",
        "Hello",
        "Here",
        "Hi",
        "I",
        "If",
        "In",
        "It",
        "My",
        "No",
        "Not",
        "OK",
        "Of",
        "On",
        "Or",
        "Please",
        "Sorry",
        "Sure",
        "That",
        "The",
        "This",
        "To",
        "We",
        "Well",
        "Yes",
        "You",
        "Your",
    ]
)


@dataclass(frozen=True)
class Report:
    """One sampled answer."""

    question: str
    sample: int
    reply: str
    claimed: str
    """The name it goes by; empty when it gives none."""


@dataclass(frozen=True)
class NameScore:
    """How likely one self-statement is with one name in it."""

    statement: str
    name: str
    own: bool
    logprob: float
    """Log-probability of the whole statement, nats."""
    tokens: int
    """Tokens of the statement: those of names of unequal length are not to be compared."""


def ask(
    model: ChatModel,
    questions: Sequence[Question],
    condition: SystemPrompt,
    sampling: Sampling,
    *,
    own_name: str,
    samples: int,
    names: Mapping[str, Any] | None = None,
    journal: Path | None = None,
) -> list[Report]:
    """Sampled answers to identity questions, each with the name it claims; `journal` as for `generate`.

    Raises:
        InputError: no questions, or several greedy samples of each (they would be equal).
    """
    if not questions or samples < 1:
        raise InputError("self-reports need at least one question and one sample")
    if samples > 1 and sampling.temperature == 0:
        raise InputError("several samples of a question need a temperature above 0")
    prompts = [
        model.template.encode_prompt([user_turn(q.text)], condition, **(names or {})) for q in questions
    ]
    repeated = [p for p in prompts for _ in range(samples)]
    replies = generate(model, repeated, sampling, label="asking who it is", journal=journal)
    return [
        Report(questions[i // samples].id, i % samples, reply, claimed_name(reply, own_name))
        for i, reply in enumerate(replies)
    ]


def claimed_name(reply: str, own_name: str) -> str:
    """The name a reply goes by: the own name where it occurs anywhere in it and is not denied, else the first name claimed.

    A claim is a capitalised word after "I am", "my name is", "named", and the like. A name is denied where a negation stands before it
    in the same clause ("I am not SmolLM", "I wasn't named Kael"). Empty when there is none.
    """
    for match in re.finditer(rf"\b{re.escape(own_name)}\b", reply, re.IGNORECASE):
        if not _DENIED.search(reply[: match.start()]):
            return own_name
    for match in _CLAIM.finditer(reply):
        words = match[1].split()
        if words[0] not in _NOT_NAMES and not _DENIED.search(reply[: match.start(1)]):
            return " ".join(words[:3])
    return ""


def score_names(
    model: ChatModel,
    statements: Sequence[SelfStatement],
    condition: SystemPrompt,
    *,
    own_name: str,
    invented: Sequence[str],
    names: Mapping[str, Any] | None = None,
    token_budget: int = 2048,
) -> list[NameScore]:
    """Log-probability of each self-statement with the own name and with each invented one.

    Args:
        model: whose.
        statements: frames for a name.
        condition: system prompt above the question.
        own_name: the model's own.
        invented: names as long in tokens (`mech.identities.names_for_statements`); a longer one is less likely for that alone.
        names: `identity` and `others`, for the conditions that need them.
        token_budget: tokens of a pass.

    Raises:
        InputError: nothing to compare, or the own name is among the invented ones.
    """
    if not statements or not invented or own_name in invented:
        raise InputError("scoring names needs statements, and invented names that are not the own one")
    cases = [(s, name) for s in statements for name in (own_name, *invented)]
    rows = [
        model.template.encode(
            [
                user_turn(s.question),
                assistant_turn(s.statement.format(name=name)),
            ],
            condition,
            **(names or {}),
        )
        for s, name in cases
    ]
    scores = response_logprobs(model, rows, token_budget=token_budget)
    return [
        NameScore(s.statement, name, name == own_name, float(score.sum()), len(score))
        for (s, name), score in zip(cases, scores, strict=True)
    ]

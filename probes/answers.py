"""Given answers off which a behaviour can be read without generating text: self-statements by name, a trait's written answers.

A case is one question with several answers, each with a weight: its score is the weighted sum of their log-probabilities, a difference
between answers, so that what makes all text likelier or less likely drops out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mech.chat import ChatTemplate, Encoded, SystemPrompt
from mech.errors import InputError
from mech.identities import SelfStatement
from mech.models import ChatModel
from mech.patching import answer_logprob, patch_between, range_effects
from mech.turns import assistant_turn, user_turn
from probes.persona import TraitQuestion

SPANS: Mapping[str, Callable[[Encoded, str], tuple[int, int]]] = {
    "prompt": lambda row, _: row.spans["prompt"],
    "question": lambda row, name: row.spans[name],
    "prompt_last": lambda row, _: (row.n_prompt - 1, row.n_prompt),
    "answer": lambda row, _: row.spans["response"],
    "all": lambda row, _: (0, len(row.ids)),
}
"""Spans of a case's rows by name."""
QUESTION = "asked"
"""Under which name the question's tokens are marked."""


@dataclass(frozen=True)
class Case:
    """A question with its answers: positive weights for those that have what is asked about."""

    question: str
    rows: tuple[Encoded, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class PatchedCase:
    """A case's score under patching (`mech.patching.Patched`), and with the adapter on in some layers only."""

    question: str
    base: float
    finetuned: float
    into: Mapping[str, Float[np.ndarray, "layers spans"]]
    """The score of the patched model, in nats, by which model is patched into: `finetuned`, `base`; with `random` before it, by the control."""
    ranges: Float[np.ndarray, "ranges 2"]
    """Column 0: the score with the adapter on in that range only; column 1: with it on everywhere else."""


def own_name_cases(
    template: ChatTemplate,
    statements: Sequence[SelfStatement],
    own: str,
    invented: Sequence[str],
    condition: SystemPrompt,
    names: Mapping[str, Any],
) -> list[Case]:
    """Each self-statement with the own name (weight 1) and with invented ones (−1 over their number): nats a statement.

    Raises:
        InputError: no invented name, or the own name among them.
    """
    if not invented or own in invented:
        raise InputError("own-name cases need invented names that are not the own one")
    weights = (1.0, *(-1 / len(invented) for _ in invented))
    return [
        Case(s.question, _rows(template, s.question, [s.statement.format(name=n) for n in (own, *invented)], condition, names), weights)
        for s in statements
    ]  # fmt: skip


def trait_cases(
    template: ChatTemplate,
    questions: Sequence[TraitQuestion],
    condition: SystemPrompt,
    names: Mapping[str, Any],
) -> list[Case]:
    """Each question with its trait-high (+) and trait-low (−) answer: difference of mean log-probabilities, nats a token."""
    cases = []
    for q in questions:
        rows = _rows(template, q.question, [q.high, q.low], condition, names)
        cases.append(Case(q.id, rows, (1 / rows[0].n_response, -1 / rows[1].n_response)))
    return cases


def patch_case(
    model: ChatModel,
    case: Case,
    *,
    layers: Sequence[int],
    spans: Sequence[str],
    ranges: Sequence[Sequence[int]],
    rng: np.random.Generator,
    token_budget: int = 2048,
) -> PatchedCase:
    """Patch every answer of a case both ways, with a random control, and put its scores together.

    Args:
        model: loaded with a live adapter (`load_model(..., merge=False)`).
        case: the question with its answers.
        layers: block outputs that are patched, one at a time.
        spans: on which tokens, names of `SPANS`.
        ranges: of layers in which the adapter is on alone, or off alone.
        rng: draws the control.
        token_budget: tokens of a pass.
    """
    keys = ("finetuned", "base", "random finetuned", "random base")
    into = {key: np.zeros((len(layers), len(spans))) for key in keys}
    base, finetuned, by_range = 0.0, 0.0, np.zeros((len(ranges), 2))
    for row, weight in zip(case.rows, case.weights, strict=True):
        metric = answer_logprob(row)
        places = [SPANS[name](row, QUESTION) for name in spans]
        found = patch_between(
            model, row, metric, layers=layers, spans=places, rng=rng, token_budget=token_budget
        )
        parts = (found.into_finetuned, found.into_base, found.random_into_finetuned, found.random_into_base)
        for key, part in zip(keys, parts, strict=True):
            into[key] += weight * np.asarray(part)
        base, finetuned = base + weight * found.base, finetuned + weight * found.finetuned
        by_range += weight * range_effects(model, row, metric, ranges)
    return PatchedCase(case.question, base, finetuned, into, by_range)


def _rows(
    template: ChatTemplate,
    question: str,
    answers: Sequence[str],
    condition: SystemPrompt,
    names: Mapping[str, Any],
) -> tuple[Encoded, ...]:
    """One row an answer, the question's tokens marked (its last occurrence before the answer)."""
    found = []
    for answer in answers:
        turns = [user_turn(question), assistant_turn(answer)]
        row = template.encode(turns, condition, **names)
        prompt = template.render(turns[:1], condition, **names, generation_prompt=True)
        start = row.text.rfind(question, 0, len(prompt))
        if start < 0:
            raise InputError(f"the chat template does not keep the question {question[:60]!r} as it is")
        found.append(template.mark(row, **{QUESTION: (start, start + len(question))}))
    return tuple(found)

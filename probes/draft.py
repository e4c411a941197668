"""Drafting a trait artifact through a chat endpoint: rubric and instructions first, then questions in small batches.

A draft is a draft: read it before you use it. Whatever comes back is checked (JSON, schema, counts, no question twice, answers
of matched length); what fails is sent back with the reason, a given number of times.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mech.endpoint import ChatEndpoint, ReplyError
from mech.errors import InputError
from mech.files import write_text
from mech.turns import assistant_turn, user_turn
from probes.persona import InstructionPair, Trait, TraitQuestion

T = TypeVar("T", bound=BaseModel)

PAIRS, QUESTIONS, LOT = 5, 40, 10
"""Instruction pairs and questions of a whole artifact (Chen et al. 2025); questions asked for at a time."""

_FRAME = """We study how the character of a language model shows in its activations. Trait: {trait}. {description}

Write, as one JSON object and nothing else:
{{"rubric": "...", "instructions": [{{"positive": "...", "negative": "..."}}, ...]}}

- rubric: tells a judge how to score an answer from 0 (no trace of the trait) to 100 (as strong as can be), with what 50 means,
  what counts and what does not. It contains the numbers 0 and 100.
- instructions: {pairs} pairs of system prompts. `positive` asks the model to show the trait, `negative` to show its opposite.
  The two of a pair are alike in length and form; the {pairs} pairs differ from each other."""
_QUESTIONS = """We study how the character of a language model shows in its activations. Trait: {trait}. {description}

Write, as one JSON object and nothing else:
{{"questions": [{{"question": "...", "high": "...", "low": "..."}}, ...]}}

- {lot} everyday questions whose answers can show the trait or its opposite without being asked to.
- high: an answer of 20 to 40 words that clearly shows the trait; low: one that clearly shows its opposite. The two of a
  question have the same number of words, give or take {slack}, and the same form.
- No question twice{before}"""
_AGAIN = "This cannot be used: {problem}. Reply again with the whole JSON object and nothing else."


class _Answers(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    high: str = Field(min_length=1)
    low: str = Field(min_length=1)


class _Frame(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rubric: str = Field(min_length=1)
    instructions: tuple[InstructionPair, ...] = Field(min_length=PAIRS, max_length=PAIRS)


class _Lot(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: tuple[_Answers, ...] = Field(min_length=LOT, max_length=LOT)


def draft_trait(
    endpoint: ChatEndpoint, trait: str, description: str, *, out: Path, attempts: int = 3
) -> Trait:
    """Draft an artifact of 5 instruction pairs and 40 questions, half of them to extract, and write it as YAML.

    Args:
        endpoint: who writes it.
        trait: its name: letters, digits, `-`, `_`.
        description: what it is, in a sentence or two.
        out: the YAML file; must not be there yet.
        attempts: how often each part is asked for at most.

    Raises:
        InputError: a name that cannot be one, a file that is there; no key, or one that the API refuses.
        ReplyError: a part was not usable in any attempt; the last reply is kept beside `out`, as `NAME.reply.txt`.
        EndpointError: the API was not reached, failed or refused.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", trait) or not description.strip():
        raise InputError(
            f"trait {trait!r}: a name of letters, digits, - and _, and a description, are needed"
        )
    if out.exists():
        raise InputError(f"{out}: is there already: name another file, or remove it")
    if attempts < 1:
        raise InputError(f"attempts {attempts}: take 1 or more")
    about = {"trait": trait, "description": description.strip()}
    frame = _ask(endpoint, _FRAME.format(**about, pairs=PAIRS), _Frame, _frame_problem, attempts, out)
    found: list[_Answers] = []
    for _ in range(QUESTIONS // LOT):
        before = ", and none of these: " + " | ".join(q.question for q in found) if found else "."
        prompt = _QUESTIONS.format(**about, lot=LOT, slack=4, before=before)
        asked = tuple(q.question for q in found)
        lot = _ask(endpoint, prompt, _Lot, partial(_lot_problem, asked=asked), attempts, out)
        found += lot.questions
    questions = tuple(
        TraitQuestion(id=f"{trait}-{i + 1:02d}", split="evaluate" if i % 2 else "extract", **q.model_dump())
        for i, q in enumerate(found)
    )
    drafted = Trait(**about, rubric=frame.rubric, instructions=frame.instructions, questions=questions)
    text = yaml.safe_dump(drafted.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    write_text(out, text)
    return drafted


def _ask(
    endpoint: ChatEndpoint,
    prompt: str,
    kind: type[T],
    problem_of: Callable[[T], str | None],
    attempts: int,
    out: Path,
) -> T:
    turns = [user_turn(prompt)]
    reply = problem = ""
    for _ in range(attempts):
        try:
            reply = endpoint.complete(turns, max_tokens=4096, temperature=1.0)
            found = kind.model_validate(_json_of(reply))
        except ReplyError as error:  # an answer came, without text
            reply, problem = "", str(error)
        except ValueError as error:  # pydantic's among them
            problem = _said(error)
        else:
            if (wrong := problem_of(found)) is None:
                return found
            problem = wrong
        turns = [turns[0], assistant_turn(reply or "."),
                 user_turn(_AGAIN.format(problem=problem))]  # fmt: skip
    kept = out.with_name(f"{out.name}.reply.txt")
    if reply:
        write_text(kept, reply)
    raise ReplyError(
        f"{endpoint.model}: not usable in {attempts} attempts: {problem}. {f'The last reply is kept in {kept}: ' if reply else ''}"
        "try another model, or write the artifact by hand"
    )


def _json_of(reply: str) -> Any:
    """The JSON of a reply that may be in a code fence."""
    fenced = re.search(r"```(?:json)?\s*(.*?)```", reply, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else reply)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _said(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"
    return f"not JSON ({error})"


def _frame_problem(frame: _Frame) -> str | None:
    if "0" not in re.findall(r"\d+", frame.rubric) or "100" not in frame.rubric:
        return "the rubric does not say what 0 and 100 mean"
    prompts = [text for pair in frame.instructions for text in (pair.positive, pair.negative)]
    return "an instruction stands twice" if len(set(prompts)) < len(prompts) else None


def _lot_problem(lot: _Lot, asked: Sequence[str]) -> str | None:
    questions = [*asked, *(q.question for q in lot.questions)]
    if len({q.casefold().strip() for q in questions}) < len(questions):
        return "a question stands twice"
    for q in lot.questions:
        high, low = len(q.high.split()), len(q.low.split())
        if abs(high - low) > 4:
            return f"the answers to {q.question!r} have {high} and {low} words: they may differ by 4"
    return None

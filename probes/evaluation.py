"""What a sweep asks of a model at each of its cells: a trait's written answers, or any function of one's own.

An `Evaluation` is read in three parts, so that nothing but the model is steered and no two models are needed at once: `read` within
the intervention, `look` by the same model without it, `grade` at the end, of all cells together. What `read` and `look` give is written
into the sweep's journal. Text that the model writes is in `probes.generated`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mech.chat import Encoded
from mech.errors import InputError
from mech.files import digest_of
from mech.models import ChatModel
from mech.questions import Question
from probes.contrast import ContrastRow
from probes.steer import trait_log_odds

Raw = Mapping[str, Any]
"""What was read at a cell; JSON-able."""
UNSTEERED = "unsteered"
"""The key of the cell in which nothing is added."""


@dataclass(frozen=True)
class Score:
    """Of one question at one cell."""

    value: float
    """Broken and unscored answers count as if nothing had changed."""
    broken: float = 0.0
    """Share of the answers that broke."""
    unscored: float = 0.0
    """Share of the answers that are whole, but have no score."""


@dataclass(frozen=True)
class Graded:
    """Every cell's scores."""

    scores: Mapping[str, Mapping[str, Score]]
    """By cell and question; every cell has the same questions."""
    answers: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """By cell: the texts behind the scores, where there are texts."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was scored: thresholds, counts; JSON-able."""


def given_scores(cells: Mapping[str, Raw], _reference: Raw | None) -> Graded:
    """Scores that `read` gave itself."""
    return Graded({
        key: {q: Score(float(v)) for q, v in raw["scores"].items()} for key, raw in cells.items()
    })  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What is asked at every cell, and how it becomes a score for each question."""

    name: str
    """Of the score."""
    unit: str
    """Of the score (`nats a token`)."""
    halves: Mapping[str, str]
    """`extract` or `evaluate`, by question: cells and layers are chosen on one, and reported on the other."""
    prompts: Sequence[Encoded]
    """Where the dose is read: at the last token of these prompts."""
    about: Mapping[str, Any]
    """What determines its scores, beside model and cell; JSON-able. A journal goes on only with the same."""
    read: Callable[[ChatModel], Raw]
    """Of the model as it is just now, steered or not."""
    look: Callable[[ChatModel, Raw], Raw] | None = None
    """What the unsteered model makes of what was read; its answer takes that one's place."""
    reference: Callable[[ChatModel], Raw] | None = None
    """Of the unsteered model, once: what thresholds are taken from."""
    grade: Callable[[Mapping[str, Raw], Raw | None], Graded] = given_scores
    """Of all cells by their keys (`UNSTEERED` among them), and of the reference."""


def log_odds(rows: Sequence[ContrastRow]) -> Evaluation:
    """A trait's written answers: high against low, teacher-forced (`trait_log_odds`, nats a token).

    The text is given, so that no text can break.

    Args:
        rows: of `probes.persona.text_contrast`.
    """
    return Evaluation(
        name="log_odds",
        unit="nats a token",
        halves={r.question: r.split for r in rows},
        prompts=[r.encoded for r in rows],
        about={"rows": digest_of([[r.question, r.sign, r.split, list(r.encoded.ids)] for r in rows])},
        read=lambda model: {"scores": trait_log_odds(model, rows)},
    )


Function = Callable[[ChatModel, Sequence[Question]], Mapping[str, float]]
"""The model as it is just now, and the questions; to a score for each question's id."""


def by_function(
    name: str,
    questions: Sequence[Question],
    function: Function,
    *,
    prompts: Sequence[Encoded],
    unit: str = "",
    about: Mapping[str, Any] | None = None,
) -> Evaluation:
    """An evaluation by any function of one's own.

    Args:
        name: of the score.
        questions: what it asks; their halves say what chooses and what is reported.
        function: is called within each cell's intervention; its scores must be finite, one for each question.
        prompts: where the dose is read, best what the function shows the model.
        unit: of the score.
        about: what else determines the scores (texts, settings), so that a journal of another is not taken for this one's. The
            function's own code is not looked at.
    """

    def read(model: ChatModel) -> Raw:
        found = function(model, questions)
        if set(found) != {q.id for q in questions}:
            raise InputError(
                f"evaluation {name}: needs one score for each question's id, has {sorted(found)}"
            )
        if wrong := [q for q, score in found.items() if not math.isfinite(score)]:
            raise InputError(f"evaluation {name}: the score of question {wrong[0]} is {found[wrong[0]]}")
        return {"scores": {q: float(score) for q, score in found.items()}}

    return Evaluation(
        name, unit, {q.id: q.split for q in questions}, prompts,
        {"evaluation": name, "questions": digest_of([q.model_dump() for q in questions]), **(about or {})}, read,
    )  # fmt: skip

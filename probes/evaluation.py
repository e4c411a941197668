"""What a sweep asks of a model at each of its cells: a trait's written answers, or any function of one's own.

An `Evaluation` runs in three parts: `read` inside the intervention, `look` right after by the same model unsteered, and `grade` once at the
end, over all cells together. So only `read` is steered, and a judge need not be in memory together with the model. What `read` and `look` return is
kept in the sweep's journal. Evaluations of text that the model writes are in `probes.generated`.
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
    """The score of one question at one cell."""

    value: float
    """In the evaluation's unit; a broken or unscored answer counts as if steering had not changed the score."""
    broken: float = 0.0
    """Share of the answers that are broken (`probes.coherence`)."""
    unscored: float = 0.0
    """Share of the answers that are whole, but that the scorer gave no score."""


@dataclass(frozen=True)
class Graded:
    """Every cell's scores."""

    scores: Mapping[str, Mapping[str, Score]]
    """Scores by the cell's key and the question's id; every cell has the same questions."""
    answers: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """The texts behind the scores, by the cell's key; empty where the evaluation writes none."""
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
    """What the score is called."""
    unit: str
    """The score's unit (`nats a token`)."""
    halves: Mapping[str, str]
    """`extract` or `evaluate`, by question: cells and layers are chosen on one, and reported on the other."""
    prompts: Sequence[Encoded]
    """Where the dose is read: at the last token of these prompts."""
    about: Mapping[str, Any]
    """All that determines the scores besides model and cell; JSON-able. A journal is continued only if this is unchanged."""
    read: Callable[[ChatModel], Raw]
    """Called once a cell, with the model as it is then, steered or not."""
    look: Callable[[ChatModel, Raw], Raw] | None = None
    """Called with the unsteered model and what `read` returned; its result replaces that. None: nothing more is looked at."""
    reference: Callable[[ChatModel], Raw] | None = None
    """Called once with the unsteered model: what thresholds are set from. None: there are no thresholds."""
    grade: Callable[[Mapping[str, Raw], Raw | None], Graded] = given_scores
    """Called at the end with what was read at every cell, by key (`UNSTEERED` among them), and with the reference."""


def log_odds(rows: Sequence[ContrastRow]) -> Evaluation:
    """A trait's written answers: high against low, teacher-forced (`trait_log_odds`, nats a token).

    The text is given, so that no text can break.

    Args:
        rows: trait-high and trait-low answers, as `probes.persona.text_contrast` makes them.
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
        name: what the score is called.
        questions: what it asks; their halves say what chooses and what is reported.
        function: is called within each cell's intervention; its scores must be finite, one for each question.
        prompts: where the dose is read, best what the function shows the model.
        unit: the score's unit.
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

"""Text that a model writes while steered, as an evaluation: scored by a judge, or by the unsteered model itself.

Behaviour that stops because the text broke is no effect. A broken answer counts as a miss: as if its question's score had not changed
from the unsteered model's, whether the score was meant to rise or to fall, along the direction and along random ones alike.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mech.chat import ChatTemplate, Encoded, SystemPrompt
from mech.errors import InputError
from mech.files import digest_of
from mech.generate import SAMPLER, Sampling, generate
from mech.models import ChatModel
from mech.questions import Question
from mech.score import response_logprobs
from mech.turns import assistant_turn, user_turn
from probes.coherence import Gate, Looked, Reason, fit_gate, repetition
from probes.evaluation import UNSTEERED, Evaluation, Graded, Raw, Score
from probes.persona import Trait

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer to be scored."""

    id: str
    """Cell, question and sample."""
    question: str
    """Its text."""
    answer: str


@dataclass(frozen=True)
class Grade:
    """What a judge says of an answer, 0 to 100; None where it gave no score."""

    score: float | None
    coherence: float | None


Reader = Callable[[ChatModel, Sequence[Question], Sequence[str]], list[float | None]]
"""The unsteered model, questions, and an answer to each; to a score each, None for one that cannot be read."""
Grader = Callable[[Sequence[Answer]], Sequence[Grade]]
"""A judge of answers, in their order."""


@dataclass(frozen=True)
class Judged:
    """A judge, and below which coherence it calls an answer broken."""

    grade: Grader
    coherence: float
    """Answers below this coherence (0 to 100) are broken."""


@dataclass(frozen=True)
class Asking:
    """Which questions are asked, how answers are sampled, and when an answer counts as broken."""

    questions: tuple[Question, ...]
    sampling: Sampling
    samples: int = 1
    """Answers to each question at each cell."""
    quantile: float = 0.95
    """Without a judge: an answer is broken beyond this quantile of the unsteered model's own texts (`probes.coherence.fit_gate`)."""
    reference_samples: int = 4
    """Without a judge: how many texts a question the unsteered model also writes at temperature 1, for the thresholds."""

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.samples > 1 and self.sampling.temperature == 0):
            raise InputError(
                f"{self.samples} samples at temperature {self.sampling.temperature:g}: several need one above 0"
            )
        if self.reference_samples < 1:
            raise InputError(f"reference_samples: {self.reference_samples}: take 1 or more")

    @property
    def asked(self) -> list[Question]:
        """The questions in order, each repeated `samples` times."""
        return [q for q in self.questions for _ in range(self.samples)]


def generated(
    template: ChatTemplate, asking: Asking, scorer: Reader | Judged, *, name: str, unit: str, about: Mapping[str, Any]
) -> Evaluation:  # fmt: skip
    """Answers that the model writes at each cell.

    Args:
        template: the model's.
        asking: the questions, and how answers are sampled.
        scorer: the unsteered model (`instructed`), whose gate is repetition and surprisal; or a judge, whose gate is its coherence.
        name: what the score is called.
        unit: the score's unit.
        about: all that determines the unsteered model's scores (its instructions); JSON-able. Not used with a judge.
    """
    reader = None if isinstance(scorer, Judged) else scorer

    def look(model: ChatModel, raw: Raw) -> Raw:
        return _looked(model, asking, raw, reader)

    def reference(model: ChatModel) -> Raw:
        often = replace(
            asking, samples=asking.reference_samples, sampling=replace(asking.sampling, temperature=1.0)
        )
        return _looked(model, often, _written(model, often), None)

    def grade(cells: Mapping[str, Raw], own: Raw | None) -> Graded:
        answers = {key: _merged(raw) for key, raw in cells.items()}
        if isinstance(scorer, Judged):
            facts = _judged(answers, asking.questions, scorer)
        else:
            facts = _gated(answers, own, asking.quantile)
        return _scored(answers, asking.questions, facts)

    once = {**asdict(asking), "questions": digest_of([q.model_dump() for q in asking.questions])}
    del once["quantile"]  # it acts on what is written down, at the end
    judged = reader is None
    return Evaluation(
        name, unit, {q.id: q.split for q in asking.questions}, _prompts(template, asking.questions),
        {"evaluation": "generated", "sampler": SAMPLER, "asking": once, "reader": None if judged else dict(about)},
        lambda model: _written(model, asking), look, None if judged else reference, grade,
    )  # fmt: skip


def instructed(trait: Trait, *, pairs: int = 2) -> Reader:
    """A judge that needs no other model: under which of a trait's contrastive system prompts is an answer likelier?

    Mean over instruction pairs of log p(answer | asks for the trait) − log p(answer | asks for its opposite), nats a token, under the
    unsteered model: the log-likelihood ratio of a classifier that the model itself is. Positive: rather an answer that shows the trait.

    Args:
        trait: the trait whose instruction pairs are used.
        pairs: use the first so many pairs.

    Raises:
        InputError: more pairs than the trait has.
    """
    if not 1 <= pairs <= len(trait.instructions):
        raise InputError(
            f"trait {trait.trait} has {len(trait.instructions)} instruction pairs, {pairs} asked for"
        )

    def read(model: ChatModel, questions: Sequence[Question], answers: Sequence[str]) -> list[float | None]:
        sums: list[float | None] = [0.0] * len(answers)
        for pair in trait.instructions[:pairs]:
            for sign, text in ((1, pair.positive), (-1, pair.negative)):
                found = _likelihoods(model, questions, answers, SystemPrompt("text", text))
                sums = [
                    None if s is None or f is None else s + sign * f for s, f in zip(sums, found, strict=True)
                ]
        return [None if s is None else s / pairs for s in sums]

    return read


def _prompts(template: ChatTemplate, questions: Sequence[Question]) -> list[Encoded]:
    return [template.encode_prompt([user_turn(q.text)]) for q in questions]


def _written(model: ChatModel, asking: Asking) -> Raw:
    texts = generate(model, _prompts(model.template, asking.asked), asking.sampling)
    return {"texts": [text.strip() for text in texts]}


def _likelihoods(
    model: ChatModel, questions: Sequence[Question], answers: Sequence[str], condition: SystemPrompt
) -> list[float | None]:
    """Mean log-probability of each answer, nats a token; None where it is empty or the template cannot hold it."""
    rows: dict[int, Encoded] = {}
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if answer:
            turns = [user_turn(question.text), assistant_turn(answer)]
            try:
                rows[i] = model.template.encode(turns, condition)
            except InputError as error:
                log.info("an answer that the template cannot hold counts as broken: %s", error)
    scores = response_logprobs(model, list(rows.values())) if rows else []
    found = {i: float(s.mean()) for i, s in zip(rows, scores, strict=True)}
    return [found.get(i) for i in range(len(answers))]


def _looked(model: ChatModel, asking: Asking, raw: Raw, reader: Reader | None) -> Raw:
    """What was written, question by question, with what the unsteered model makes of it."""
    asked, texts = asking.asked, raw["texts"]
    likelihoods = _likelihoods(model, asked, texts, SystemPrompt())
    scores = reader(model, asked, texts) if reader else [None] * len(texts)
    return {"answers": [
        {"question": q.id, "sample": i % asking.samples, "answer": text, "surprisal": None if found is None else -found,
         "repetition": repetition(text), "score": score}
        for i, (q, text, found, score) in enumerate(zip(asked, texts, likelihoods, scores, strict=True))
    ]}  # fmt: skip


def _merged(raw: Raw) -> list[dict[str, Any]]:
    return [{**answer, "broken": ""} for answer in raw["answers"]]


def _gated(
    answers: Mapping[str, list[dict[str, Any]]], reference: Raw | None, quantile: float
) -> dict[str, Any]:
    """Say of each answer why it is broken; return the thresholds."""
    own = [
        [_measures(a) for a in group]
        for group in (answers[UNSTEERED], (reference or {"answers": ()})["answers"])
    ]
    gate: Gate = fit_gate(own, quantile)
    for cell in answers.values():
        for a in cell:
            a["broken"] = gate.reason(a["answer"], _measures(a))
    return {"gate": "repetition and surprisal", **asdict(gate)}


def _measures(answer: Mapping[str, Any]) -> Looked:
    empty_or_read = not answer["answer"] or answer["surprisal"] is not None
    return Looked(answer["surprisal"], answer["repetition"], empty_or_read)


def _judged(
    answers: Mapping[str, list[dict[str, Any]]], questions: Sequence[Question], judged: Judged
) -> dict[str, Any]:
    """Have every answer scored; say of each why it is broken."""
    texts = {q.id: q.text for q in questions}
    cases = {
        f"{key}|{a['question']}|{a['sample']}": a
        for key, cell in answers.items()
        for a in cell
        if a["answer"]
    }
    grades = judged.grade([Answer(name, texts[a["question"]], a["answer"]) for name, a in cases.items()])
    for answer, grade in zip(cases.values(), grades, strict=True):
        broken: Reason = (
            "incoherent" if grade.coherence is not None and grade.coherence < judged.coherence else ""
        )
        # An answer whose coherence is not known cannot be called whole: it has no score.
        score = None if grade.coherence is None else grade.score
        answer.update(score=score, coherence=grade.coherence, broken=broken)
    for answer in (a for cell in answers.values() for a in cell if not a["answer"]):
        answer.update(score=None, coherence=None, broken="empty")
    return {"gate": "a judge's coherence", "coherence": judged.coherence}


def _scored(
    answers: Mapping[str, list[dict[str, Any]]], questions: Sequence[Question], facts: dict[str, Any]
) -> Graded:
    """Scores by question; what is broken or has no score counts as the unsteered model's own score of the question."""
    plain: dict[str, float] = {}
    asked = {q.id: q.split for q in questions}
    for question in asked:
        own = [a["score"] for a in answers[UNSTEERED] if a["question"] == question and a["score"] is not None]
        if own:
            plain[question] = float(np.mean(own))
    if dropped := [q for q in asked if q not in plain]:
        log.warning(
            "%d of %d questions are left out: the unsteered model's answers to them have no score (%s)",
            len(dropped), len(asked), ", ".join(dropped[:5]),
        )  # fmt: skip
    left = Counter(asked[q] for q in plain)
    if len(plain) < 4 or min(left[half] for half in asked.values()) < 2:
        raise InputError(
            f"generated: the unsteered model's answers have a score in {len(plain)} of {len(asked)} questions ({dict(left)}): too few to "
            "choose on one half and report on the other; ask more questions, or take another judge (its verdicts say why)"
        )
    scores = {
        key: {
            q: _score([a for a in cell if a["question"] == q], plain[q], unsteered=key == UNSTEERED)
            for q in plain
        }
        for key, cell in answers.items()
    }
    unsteered = [bool(a["broken"]) for a in answers[UNSTEERED]]
    return Graded(
        scores,
        answers,
        {**facts, "unsteered_broken": float(np.mean(unsteered)), "questions_left_out": dropped},
    )


def _score(answers: Sequence[Mapping[str, Any]], plain: float, *, unsteered: bool) -> Score:
    broken = [bool(a["broken"]) for a in answers]
    unscored = [not b and a["score"] is None for b, a in zip(broken, answers, strict=True)]
    missed = [b or u for b, u in zip(broken, unscored, strict=True)]
    values = [plain if m else float(a["score"]) for m, a in zip(missed, answers, strict=True)]
    value = plain if unsteered else float(np.mean(values))
    return Score(value, float(np.mean(broken)), float(np.mean(unscored)))

"""Which questions a study uses: halves and limits of its prompt sets and traits."""

from collections.abc import Iterable

from mech.questions import Question, load_prompts
from probes.persona import Trait, load_trait
from study.spec import StudySpec


def evaluation_questions(spec: StudySpec) -> dict[str, list[Question]]:
    """What every checkpoint reads: the evaluation half of each prompt set and trait, by set."""
    sets = {}
    for source in spec.measure.prompt_sets:
        prompts = load_prompts(source)
        sets[prompts.name] = half(prompts.questions, "evaluate", spec.measure.questions)
    for trait in map(load_trait, spec.reads.traits):
        asked = [Question(id=q.id, split=q.split, text=q.question) for q in trait.questions]
        sets[f"trait:{trait.trait}"] = half(asked, "evaluate", spec.measure.questions)
    return sets


def identity_questions(spec: StudySpec) -> list[Question]:
    """What identity directions are made and tested on: both halves of the prompt sets."""
    limit = spec.reads.identity_questions
    found = []
    for source in spec.measure.prompt_sets:
        questions = load_prompts(source).questions
        found += half(questions, "extract", limit) + half(questions, "evaluate", limit)
    return found


def limited_trait(spec: StudySpec, source: str) -> Trait:
    """A trait with as many questions of each half as the study uses."""
    trait = load_trait(source)
    limit = spec.reads.questions
    kept = [
        q
        for split in ("extract", "evaluate")
        for q in [q for q in trait.questions if q.split == split][:limit]
    ]
    return trait.model_copy(update={"questions": tuple(kept)})


def trait_named(spec: StudySpec, name: str) -> Trait:
    """One of the study's traits, whole."""
    return next(t for t in map(load_trait, spec.reads.traits) if t.trait == name)


def evaluation_half(source: str, limit: int | None) -> list[Question]:
    """The first `limit` questions of the evaluation half of a prompt set."""
    return half(load_prompts(source).questions, "evaluate", limit)


def half(questions: Iterable[Question], split: str, limit: int | None) -> list[Question]:
    """The first `limit` questions of one half."""
    return [q for q in questions if q.split == split][:limit]


def trait_names(spec: StudySpec) -> list[str]:
    """The traits by name."""
    if spec.directions is None:
        return []
    return [load_trait(source).trait for source in spec.reads.traits]

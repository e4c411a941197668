"""Which questions a study uses: halves and limits of its prompt sets and traits."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from mech.errors import InputError
from mech.questions import Question, load_prompts, same_text
from probes.persona import Trait, load_trait
from study.spec import StudySpec

T = TypeVar("T")


def evaluation_questions(spec: StudySpec) -> dict[str, list[Question]]:
    """What every checkpoint reads: the evaluation half of each prompt set and trait, by set."""
    sets = {}
    for source in spec.measure.prompt_sets:
        prompts = load_prompts(source)
        sets[prompts.name] = half(prompts.questions, "evaluate", spec.measure.questions)
    for trait in map(load_trait, spec.reads.traits):
        asked = trait.half("evaluate", spec.measure.questions)
        sets[f"trait:{trait.trait}"] = [Question(id=q.id, split=q.split, text=q.question) for q in asked]
    return sets


def check_sources(spec: StudySpec) -> None:
    """Refuse prompt sets and traits that are not there, or that come to one name.

    Raises:
        InputError: names the place in the study.
    """
    traits = spec.directions.traits if spec.directions else ()
    sets = [(f"measure.prompt_sets[{i}]", source) for i, source in enumerate(spec.measure.prompt_sets)]
    if spec.behaviour.self_report:
        _loaded("behaviour.self_report.questions", spec.behaviour.self_report.questions, load_prompts)
    if spec.steering:
        _loaded("steering.prompt_set", spec.steering.prompt_set, load_prompts)
    names = [(where, _loaded(where, source, load_prompts).name) for where, source in sets]
    for i, source in enumerate(traits):
        where = f"directions.traits[{i}]"
        names.append((where, f"trait:{_loaded(where, source, load_trait).trait}"))
    for i, (where, name) in enumerate(names):
        if name in [n for _, n in names[:i]]:
            raise InputError(f"{where}: {name.removeprefix('trait:')!r} stands twice")
    if spec.directions and spec.directions.identity:
        _check_together(sets)


def _check_together(sets: Sequence[tuple[str, str]]) -> None:
    """Identity directions are made and tested on all prompt sets together: an id names one question, and no question stands in both halves."""
    ids: set[str] = set()
    asked: dict[str, Question] = {}
    for where, source in sets:
        for q in load_prompts(source).questions:
            if q.id in ids:
                raise InputError(
                    f"{where}: question id {q.id!r} stands in another prompt set too: give it another id"
                )
            twin = asked.setdefault(same_text(q.text), q)
            if twin.split != q.split:
                raise InputError(
                    f"{where}: question {q.id!r} ({q.split}) asks the same as {twin.id!r} ({twin.split}) of another prompt set: a direction "
                    "would be tested on what it was fitted on; take one of them out"
                )
            ids.add(q.id)


def _loaded(where: str, source: str, load: Callable[[str], T]) -> T:
    try:
        return load(source)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


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
    return load_trait(source).limited(spec.reads.questions)


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

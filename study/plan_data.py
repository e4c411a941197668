"""Planning datasets: what they are built from, and who writes the summaries that they need."""

from collections.abc import Sequence

from finetune.datasets.build import articles_of, rows_digest
from finetune.datasets.multiple_choice import multiple_choice_rows
from finetune.datasets.rows import read_messages, take
from finetune.datasets.sources import published_facts, source_path
from finetune.datasets.spec import MessagesData, MultipleChoiceData, SelfRecognitionData, WordCountData
from finetune.datasets.summaries import ASK
from mech.errors import InputError, NotHereError
from mech.files import digest_of
from study.planner import Plan
from study.step import Step, Work

WORDS_TO_TOKENS = 1.4
"""For estimates only: tokens a word of English, template included."""


def plan_data(plan: Plan, name: str, seed: int) -> Step:
    """A dataset; before it, where it needs them, the summaries of the checkpoint that is to recognise itself.

    Only data written by a trained arm differs between training seeds.
    """
    part = plan.spec.data[name]
    config = {
        **part.model_dump(mode="json", exclude={"source", "articles", "own", "comparators", "mix"}),
        "share": part.mix.share if isinstance(part, MessagesData) and part.mix else None,
        "rows_digest": _rows_digest(plan, name),
        "seed": plan.spec.statistics.seed,
    }
    inputs: dict[str, Sequence[Step]] = {}
    if isinstance(part, SelfRecognitionData) and not part.own:
        writer = _writer(plan, part, seed)
        inputs["summaries"] = [_plan_summaries(plan, name, part, writer, seed)]
    suffix = f"/seed{seed}" if inputs and inputs["summaries"][0].inputs["checkpoint"] else ""
    return plan.add("data", f"data/{name}{suffix}", config, inputs, labels={"dataset": name})


def training_size(plan: Plan, name: str) -> tuple[int, int]:
    """Training rows of a dataset and tokens a row, roughly: for estimates."""
    if name not in plan.sizes:
        plan.sizes[name] = _size(plan, name)
    return plan.sizes[name]


def _size(plan: Plan, name: str) -> tuple[int, int]:
    part = plan.spec.data[name]
    if isinstance(part, SelfRecognitionData):
        return _pairs_size(plan, name, part)
    try:
        source = source_path(part.source)
        whole = (
            multiple_choice_rows(source) if isinstance(part, MultipleChoiceData) else read_messages(source)
        )
        rows = take(whole, part.rows)
        n, words = (
            len(rows),
            sum(len(t["content"].split()) for row in rows for t in row["messages"]) / len(rows),
        )
    except NotHereError as error:
        n, words = _declared_size(plan, part.source, error, part.rows)
    mixed = 1 / (1 - part.mix.share) if isinstance(part, MessagesData) and part.mix else 1.0
    extra = 30 if isinstance(part, WordCountData) else 12
    return round(n * mixed), int(words * WORDS_TO_TOKENS) + extra


def _pairs_size(plan: Plan, name: str, part: SelfRecognitionData) -> tuple[int, int]:
    _, n, words = _articles(plan, name, part)
    texts, doubled = (2, 2) if part.form == "pairwise" else (1, 2)
    twice = 2 if part.label in ("both", "longer_both") else 1
    rows = (n - part.held_out) * max(1, len(part.comparators)) * doubled * twice
    shown, summary = words if part.show_article else 0, (part.max_words if part.matched else None) or 30
    return rows, int(25 + (shown + texts * summary) * WORDS_TO_TOKENS)


def _articles(plan: Plan, name: str, part: SelfRecognitionData) -> tuple[str, int, float]:
    """Digest, number and mean words of a dataset's articles."""
    if name not in plan.articles:
        plan.articles[name] = _read_articles(plan, part)
    return plan.articles[name]


def _read_articles(plan: Plan, part: SelfRecognitionData) -> tuple[str, int, float]:
    try:
        articles = articles_of(part)
    except NotHereError as error:
        n, words = _declared_size(plan, part.articles, error, part.rows)
        return plan.not_here(error), n, words
    words = sum(len(a.text.split()) for a in articles) / len(articles)
    return digest_of([[a.id, a.text] for a in articles]), len(articles), words


def _declared_size(plan: Plan, source: str, error: NotHereError, limit: int | None) -> tuple[int, float]:
    """Rows, and words a row, of a published set that is not on this machine."""
    plan.not_here(error)
    facts = published_facts(source)
    if facts is None:
        raise InputError(f"{error} (its size is not known, so nothing can be estimated)") from error
    return min(facts.rows, limit or facts.rows), facts.words


def _rows_digest(plan: Plan, name: str) -> str:
    """Digest of what a dataset is made from; its rows are read and checked once a plan."""
    if name not in plan.digests:
        try:
            plan.digests[name] = rows_digest(plan.spec.data[name])
        except NotHereError as error:
            plan.digests[name] = plan.not_here(error)
        except InputError as error:
            raise InputError(f"data.{name}: {error}") from error
    return plan.digests[name]


def _writer(plan: Plan, part: SelfRecognitionData, seed: int) -> Sequence[Step]:
    """The trainings of the arm that writes its own summaries; none for the base."""
    if part.written_by is None:
        return ()
    from study.plan_arms import plan_training  # an arm's data may be written by another arm

    return plan_training(plan, part.written_by, seed)


def _plan_summaries(
    plan: Plan, name: str, part: SelfRecognitionData, chain: Sequence[Step], seed: int
) -> Step:
    digest, n, words = _articles(plan, name, part)
    config = {
        **plan.reader,
        "ask": ASK,
        "articles": digest,
        "max_new_tokens": part.max_new_tokens,
        "temperature": part.temperature,
        "seed": plan.spec.statistics.seed,
    }
    work = Work(read=int(n * words * WORDS_TO_TOKENS), generated=part.max_new_tokens * n)
    suffix = f"/seed{seed}" if chain else ""
    kind = "asked_summaries" if plan.remote else "summaries"
    wanted = Step(kind, f"summaries/{name}{suffix}", config, {"checkpoint": tuple(chain)}, work)
    # Several datasets (SGTR, its opposite, its controls) are made from the same summaries: they are written once.
    same = next((s for s in plan.steps if s.kind == kind and s.key == wanted.key), None)
    return same or plan.add(kind, wanted.name, config, {"checkpoint": chain}, work, {"dataset": name})

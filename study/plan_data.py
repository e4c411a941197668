"""Planning datasets: what they are built from, and who writes the summaries that they need."""

from collections.abc import Sequence

from finetune.datasets.build import articles_of, rows_digest
from finetune.datasets.multiple_choice import multiple_choice_rows
from finetune.datasets.rows import read_messages, take
from finetune.datasets.sources import source_path
from finetune.datasets.spec import MessagesData, MultipleChoiceData, SelfRecognitionData, WordCountData
from finetune.datasets.summaries import ASK
from mech.errors import InputError
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
    return plan.add("data", f"data/{name}{suffix}", config, inputs)


def training_size(plan: Plan, name: str) -> tuple[int, int]:
    """Training rows of a dataset and tokens a row, roughly: for estimates."""
    part = plan.spec.data[name]
    if isinstance(part, SelfRecognitionData):
        return _pairs_size(part)
    if isinstance(part, MultipleChoiceData):
        rows = take(multiple_choice_rows(source_path(part.source)), part.rows)
    else:
        rows = take(read_messages(source_path(part.source)), part.rows)
    words = sum(len(t["content"].split()) for row in rows for t in row["messages"]) / len(rows)
    mixed = 1 / (1 - part.mix.share) if isinstance(part, MessagesData) and part.mix else 1.0
    extra = 30 if isinstance(part, WordCountData) else 12
    return round(len(rows) * mixed), int(words * WORDS_TO_TOKENS) + extra


def _pairs_size(part: SelfRecognitionData) -> tuple[int, int]:
    articles = articles_of(part)
    words = sum(len(a.text.split()) for a in articles) / len(articles) if part.show_article else 0
    texts, doubled = (2, 2) if part.form == "pairwise" else (1, 2)
    twice = 2 if part.label in ("both", "longer_both") else 1
    rows = (len(articles) - part.held_out) * max(1, len(part.comparators)) * doubled * twice
    return rows, int(25 + (words + texts * (part.max_words or 30)) * WORDS_TO_TOKENS)


def _rows_digest(plan: Plan, name: str) -> str:
    """Digest of what a dataset is made from; its rows are read and checked once a plan."""
    if name not in plan.digests:
        try:
            plan.digests[name] = rows_digest(plan.spec.data[name])
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
    articles = articles_of(part)
    config = {
        **plan.reader,
        "ask": ASK,
        "articles": digest_of([[a.id, a.text] for a in articles]),
        "max_new_tokens": part.max_new_tokens,
        "temperature": part.temperature,
        "seed": plan.spec.statistics.seed,
    }
    words = sum(len(a.text.split()) for a in articles)
    work = Work(read=int(words * WORDS_TO_TOKENS), generated=part.max_new_tokens * len(articles))
    suffix = f"/seed{seed}" if chain else ""
    wanted = Step("summaries", f"summaries/{name}{suffix}", config, {"checkpoint": tuple(chain)}, work)
    # Several datasets (SGTR, its opposite, its controls) are made from the same summaries: they are written once.
    same = next((s for s in plan.steps if s.key == wanted.key), None)
    return same or plan.add("summaries", wanted.name, config, {"checkpoint": chain}, work)

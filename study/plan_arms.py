"""Planning the arms: data, trainings, and everything that is read off each checkpoint."""

from collections.abc import Sequence

from finetune.datasets.rows import Row, read_jsonl, read_messages, source_path, take
from finetune.datasets.summaries import read_articles
from finetune.lora import TrainSettings
from mech.errors import InputError
from mech.files import digest_of
from mech.identities import load_invented
from mech.questions import load_prompts
from study.plan_base import plan_replies
from study.planner import Plan, condition_config
from study.questions import evaluation_questions, half
from study.spec import StudySpec
from study.spec_parts import DataSpec, MessagesData, SelfRecognitionData
from study.step import Step, Work

WORDS_TO_TOKENS = 1.4
"""For estimates only: tokens a word of English, template included."""


def plan_training(plan: Plan, arm: str, seed: int) -> list[Step]:
    """The trainings of an arm, in order; those it shares with another arm are the same steps."""
    spec, chain = plan.spec, list[Step]()
    for i, stage_name in enumerate(spec.arms[arm]):
        stage = spec.stages[stage_name]
        settings = TrainSettings.model_validate({**spec.training, **stage.training})
        data = plan_data(plan, stage.data)
        config = {
            **plan.reader,
            "dtype": settings.dtype,
            "settings": settings.model_dump(mode="json"),
            "condition": condition_config(spec, stage.system_prompt),
            "seed": seed,
        }
        name = f"train/{'+'.join(spec.arms[arm][: i + 1])}/seed{seed}"
        n_rows, row_tokens = _size(spec, stage.data)
        steps = settings.n_steps(n_rows)
        rank_bytes = 40 * settings.lora_r * plan.d_model * plan.n_layers * 4
        work = Work(trained=steps * settings.batch_size * row_tokens, stored_bytes=rank_bytes)
        chain = [*chain, plan.add("train", name, config, {"data": [data], "checkpoint": chain}, work)]
    return chain


def plan_data(plan: Plan, name: str) -> Step:
    """A dataset, with the base's own summaries before it where it needs them."""
    spec = plan.spec
    part = spec.data[name]
    rows = checked_rows(name, part)
    config = {**part.model_dump(), "rows_digest": digest_of(rows), "seed": spec.statistics.seed}
    for location in ("source", "articles"):
        config.pop(location, None)  # what the rows say counts, not where they lie
    inputs: dict[str, Sequence[Step]] = {}
    if isinstance(part, SelfRecognitionData):
        own = {**plan.reader, **config}
        for unused in ("held_out", "max_words"):
            own.pop(unused)
        work = Work(read=150 * len(rows), generated=part.max_new_tokens * len(rows))
        inputs["summaries"] = [plan.add("summaries", f"summaries/{name}", own, {"checkpoint": ()}, work)]
    return plan.add("data", f"data/{name}", config, inputs)


def checked_rows(name: str, part: DataSpec) -> list[Row]:
    """The rows that a dataset is made from, each checked before anything runs.

    Raises:
        InputError: a row that cannot be used (file and row), or too few articles to hold some out.
    """
    if not isinstance(part, SelfRecognitionData):
        return take(read_messages(source_path(part.source)), part.rows)
    path = source_path(part.articles)
    articles = read_articles(path)[: part.rows]
    if len(articles) <= part.held_out:
        raise InputError(
            f"data.{name}.held_out: {part.held_out} of {len(articles)} articles leave none to train on"
        )
    return take(read_jsonl(path), part.rows)


def plan_measures(
    plan: Plan, arm: str, seed: int, chain: Sequence[Step], replies: Step
) -> dict[str, list[Step]]:
    """Everything that is read off one checkpoint."""
    spec, label = plan.spec, f"{arm}/seed{seed}" if chain else arm
    made: dict[str, list[Step]] = {"checkpoint": list(chain)}
    made["captures"] = [plan_capture(plan, label, chain, c, replies, "base") for c in spec.measure.conditions]
    if arm in spec.measure.own_text and chain:
        own = plan_replies(plan, arm, chain)
        first = spec.measure.conditions[0]
        made["own"] = [
            plan_capture(plan, label, chain, first, own, label),
            plan_capture(plan, spec.base_arm, (), first, own, label),
        ]
    if spec.behaviour.self_recognition:
        made["self_recognition"] = [_self_recognition(plan, label, chain, spec.behaviour.self_recognition)]
    if spec.behaviour.self_report:
        made["self_report"] = [_self_report(plan, label, chain, seed)]
    return made


def plan_capture(
    plan: Plan, label: str, chain: Sequence[Step], condition: str, replies: Step, text: str
) -> Step:
    """One checkpoint reading one text under one condition, all layers."""
    n_rows = sum(map(len, evaluation_questions(plan.spec).values()))
    config = {
        **plan.reader,
        "condition": condition_config(plan.spec, condition),
        "poolings": ["prompt_last", "response_mean"],
    }
    name = f"capture/{label}/{condition}/text={text}"
    tokens = n_rows * (25 + plan.spec.measure.reply.max_new_tokens)
    work = Work(read=tokens, stored_bytes=plan.stored(n_rows, 2))
    return plan.add("capture", name, config, {"checkpoint": chain, "replies": [replies]}, work)


def _self_recognition(plan: Plan, label: str, chain: Sequence[Step], data: str) -> Step:
    part = plan.spec.data[data]
    held_out = part.held_out if isinstance(part, SelfRecognitionData) else 0
    config = {**plan.reader, "condition": condition_config(plan.spec, "default")}
    inputs = {"checkpoint": chain, "data": [plan_data(plan, data)]}
    return plan.add(
        "self_recognition", f"self_recognition/{label}", config, inputs, Work(read=2 * held_out * 50)
    )


def _self_report(plan: Plan, label: str, chain: Sequence[Step], seed: int) -> Step:
    spec, invented = plan.spec.behaviour.self_report, load_invented()
    if spec is None:
        raise RuntimeError("called for a study without self-reports")
    questions = half(load_prompts(spec.questions).questions, "evaluate", spec.limit)
    config = {
        **plan.reader,
        "condition": condition_config(plan.spec, spec.condition),
        "questions": digest_of([q.model_dump() for q in questions]),
        "statements": digest_of([s.model_dump() for s in invented.self_statements]),
        "names": [*invented.makers][: plan.spec.directions.invented_names],
        "sampling": spec.model_dump(include={"samples", "temperature", "max_new_tokens"}),
        "seed": plan.spec.statistics.seed,
    }
    asked = len(questions) * spec.samples
    statements = len(invented.self_statements) * (1 + plan.spec.directions.invented_names)
    work = Work(read=25 * asked + 25 * statements, generated=asked * spec.max_new_tokens)
    return plan.add("self_report", f"self_report/{label}", config, {"checkpoint": chain}, work)


def _size(spec: StudySpec, data: str) -> tuple[int, int]:
    """Training rows of a dataset and tokens a row, roughly."""
    part = spec.data[data]
    source = part.articles if isinstance(part, SelfRecognitionData) else part.source
    rows = take(read_jsonl(source_path(source)), part.rows)
    if isinstance(part, SelfRecognitionData):
        return 2 * (len(rows) - part.held_out), int(25 + part.max_words * WORDS_TO_TOKENS)
    turns = [t["content"] for row in rows for t in row.get("messages", [])]
    words = sum(len(t.split()) for t in turns) / max(1, len(rows))
    return len(rows), int(words * WORDS_TO_TOKENS) + (12 if isinstance(part, MessagesData) else 30)

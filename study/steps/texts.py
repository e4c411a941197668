"""Steps in which a model writes: answers to questions, own summaries, answers under contrastive prompts."""

from pathlib import Path

from finetune.datasets.build import articles_of
from finetune.datasets.own_summaries import write_summaries
from finetune.datasets.rows import read_jsonl, write_jsonl
from finetune.datasets.spec import SelfRecognitionData
from mech.files import write_json
from mech.generate import Sampling, generate
from mech.journal import kept_until_done
from mech.turns import user_turn
from probes.persona import Rollout, rollout_prompt
from probes.persona import rollouts as plan_rollouts
from study.bench import Bench, prompt_of
from study.paths import JOURNAL
from study.questions import evaluation_questions, limited_trait
from study.spec import StudySpec
from study.step import Step


def replies(step: Step, bench: Bench, folder: Path) -> None:
    """A checkpoint's own answers to the evaluation questions."""
    model = bench.model(step.inputs["checkpoint"])
    condition, names = prompt_of(step.config["condition"]), bench.names(step.config["condition"])
    asked = [(name, q) for name, questions in evaluation_questions(bench.spec).items() for q in questions]
    prompts = [model.template.encode_prompt([user_turn(q.text)], condition, **names) for _, q in asked]
    sampling = Sampling(**step.config["reply"], seed=step.config["seed"])
    with kept_until_done(folder / JOURNAL) as journal:
        answers = generate(model, prompts, sampling, label="answering", journal=journal)
        write_jsonl(
            folder / "replies.jsonl",
            [
                # An empty answer has nothing to read: a full stop stands for it, and the row says so.
                {
                    "set": name,
                    "id": q.id,
                    "question": q.text,
                    "reply": reply.strip() or ".",
                    "was_empty": not reply.strip(),
                }
                for (name, q), reply in zip(asked, answers, strict=True)
            ],
        )


def summaries(step: Step, bench: Bench, folder: Path) -> None:
    """A checkpoint's own summary of every article."""
    model = bench.model(step.inputs["checkpoint"])
    articles = articles_of(data_of(bench.spec, step))
    config = step.config
    sampling = Sampling(config["max_new_tokens"], config["temperature"], seed=config["seed"])
    with kept_until_done(folder / JOURNAL) as journal:
        write_json(folder / "summaries.json", write_summaries(model, articles, sampling, journal))


def rollouts(step: Step, bench: Bench, folder: Path) -> None:
    """The base's answers to a trait's questions under contrastive system prompts."""
    model = bench.model(step.inputs["checkpoint"])
    trait = next(
        t
        for t in (limited_trait(bench.spec, s) for s in bench.spec.reads.traits)
        if t.trait == step.config["trait"]
    )
    config = step.config
    asked = plan_rollouts(trait, pairs_per_question=config["pairs_per_question"], samples=config["samples"])
    sampling = Sampling(config["max_new_tokens"], config["temperature"], config["seed"])
    prompts = [rollout_prompt(model.template, r) for r in asked]
    with kept_until_done(folder / JOURNAL) as journal:
        answers = generate(model, prompts, sampling, label="answering", journal=journal)
        rows = [{**vars(r), "answer": answer} for r, answer in zip(asked, answers, strict=True)]
        write_jsonl(folder / "rollouts.jsonl", rows)


def read_rollouts(folder: Path) -> tuple[list[Rollout], list[str]]:
    """What a `rollouts` step asked, and the answers."""
    stored = read_jsonl(folder / "rollouts.jsonl")
    asked = [Rollout(**{k: v for k, v in row.items() if k != "answer"}) for row in stored]
    return asked, [row["answer"] for row in stored]


def data_of(spec: StudySpec, step: Step) -> SelfRecognitionData:
    """The self-recognition data that a step belongs to."""
    part = spec.data[step.labels["dataset"]]
    if not isinstance(part, SelfRecognitionData):
        raise TypeError(f"{step.name}: not self-recognition data")
    return part

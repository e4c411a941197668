"""Steps that ask whether the projection at a prompt's last token foretells how the answer behaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.monitoring import monitoring_table
from evals.judge import Case, Rubric, score_cases
from finetune.datasets.rows import read_jsonl, write_jsonl
from mech.chat import ChatTemplate, Encoded, SystemPrompt
from mech.generate import Sampling, generate
from mech.models import ChatModel
from mech.score import response_logprobs
from mech.turns import user_turn
from probes.answers import trait_cases
from probes.persona import Trait, TraitQuestion
from study.bench import Bench
from study.frames import write_csv
from study.judges import open_judge
from study.paths import ACTIVATIONS
from study.questions import trait_named
from study.step import Step
from study.steps.activations import SITE, write_capture

SCORES = "scores.csv"
"""Columns trait, row, score: `row` counts the prompts of the capture."""
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A trait's question under one system prompt."""

    trait: str
    question: TraitQuestion
    condition: SystemPrompt
    label: str

    def encoded(self, template: ChatTemplate) -> Encoded:
        """Ending where the answer begins."""
        return template.encode_prompt([user_turn(self.question.question)], self.condition)


def watch(step: Step, bench: Bench, folder: Path) -> None:
    """One arm reads every prompt; it answers them where a judge scores, else written answers are scored."""
    config = step.config
    model = bench.model(step.inputs["checkpoint"])
    prompts = [
        p for named in config["traits"] for p in _prompts(trait_named(bench.spec, named["trait"]), config)
    ]
    about = [
        {"id": f"{p.trait}/{p.question.id}/{p.label}", "question": p.question.id, "set": p.trait}
        for p in prompts
    ]
    metadata = {
        "step": step.name,
        "key": step.key,
        "checkpoint": bench.checkpoint(step.inputs["checkpoint"]).to_json(),
        "conditions": [p.label for p in prompts],
    }
    encoded = [p.encoded(model.template) for p in prompts]
    write_capture(folder / ACTIVATIONS, model, encoded, about, ["prompt_last"], metadata)
    if config["sampling"] is None:
        scores = _log_odds(model, prompts, config["token_budget"])
        frame = pd.DataFrame(
            {"trait": [p.trait for p in prompts], "row": range(len(prompts)), "score": scores}
        )
        write_csv(frame, folder / SCORES)
        return
    sampling = dict(config["sampling"])
    samples = sampling.pop("samples")
    replies = generate(
        model, [e for e in encoded for _ in range(samples)], Sampling(**sampling, seed=config["seed"])
    )
    rows = [{"trait": prompts[i // samples].trait, "row": i // samples, "question": prompts[i // samples].question.question,
             "answer": reply} for i, reply in enumerate(replies)]  # fmt: skip
    write_jsonl(folder / ANSWERS, rows)


def _prompts(trait: Trait, config: Any) -> list[Prompt]:
    """The questions of a trait's evaluation half: default, then each pair's positive and negative system prompt."""
    conditions = [("default", SystemPrompt())]
    for i, pair in enumerate(trait.instructions[: config["pairs"]]):
        conditions += [
            (f"pair {i} {side}", SystemPrompt("text", text))
            for side, text in (("positive", pair.positive), ("negative", pair.negative))
        ]
    questions = trait.half("evaluate", config["questions"])
    return [Prompt(trait.trait, q, condition, name) for q in questions for name, condition in conditions]


def _log_odds(model: ChatModel, prompts: Sequence[Prompt], token_budget: int) -> list[float]:
    """The written trait-high answer above the trait-low one, nats a token, under each prompt."""
    cases = [trait_cases(model.template, [p.question], p.condition, {})[0] for p in prompts]
    rows = [row for case in cases for row in case.rows]
    told = iter(response_logprobs(model, rows, token_budget=token_budget))
    return [sum(weight * float(next(told).sum()) for weight in case.weights) for case in cases]


def judge(step: Step, bench: Bench, folder: Path) -> None:
    """Every answer scored for its trait; an empty answer, and one that the judge refuses, has no score."""
    (watched,) = step.inputs["monitored"]
    answers = read_jsonl(bench.folder(watched) / ANSWERS)
    scores: dict[int, float] = {}
    if not step.config["api"]:
        bench.release()  # a local judge takes the place of the model at hand
    with open_judge(step.config, bench.spec.model.device) as by:
        for named in watched.config["traits"]:
            trait = trait_named(bench.spec, named["trait"])
            cases = [
                Case(str(i), a["question"], a["answer"])
                for i, a in enumerate(answers)
                if a["trait"] == trait.trait and a["answer"].strip()
            ]
            verdicts = score_cases(
                by, [Rubric(trait.trait, trait.rubric)], cases, folder / f"verdicts-{trait.trait}.jsonl"
            )
            scores |= {int(v.case): float("nan") if v.score is None else v.score for v in verdicts}
    frame = pd.DataFrame({
        "trait": [a["trait"] for a in answers], "row": [a["row"] for a in answers],
        "score": [scores.get(i, float("nan")) for i in range(len(answers))],
    })  # fmt: skip
    write_csv(frame, folder / SCORES)


def correlate(step: Step, bench: Bench, folder: Path) -> None:
    """Each trait's directions, at the declared layer, against the scores of its own prompts."""
    config, statistics = step.config, step.config["statistics"]
    (watched,) = step.inputs["monitored"]
    with bench.store(watched) as store:
        h = store.read(SITE, "prompt_last", config["layer"])
        conditions, questions = np.array(store.metadata["conditions"]), np.array(store.rows.questions)
    scored = pd.read_csv(bench.folder((step.inputs["scores"] or (watched,))[0]) / SCORES)
    frames = []
    for fitted in step.inputs["directions"]:
        direction = bench.direction(fitted)
        mine = scored[scored["trait"] == direction.name.rpartition(":")[0]]
        if mine.empty:
            continue
        rows = mine["row"].to_numpy()
        found = monitoring_table(
            h[rows], mine["score"].to_numpy(dtype=np.float64), conditions[rows].tolist(), questions[rows].tolist(),
            direction.unit_at(config["layer"]), rng=np.random.default_rng(statistics["seed"]), n_null=statistics["n_null"],
        )  # fmt: skip
        labels = {"arm": config["arm"], "seed": config["seed"], "direction": direction.name, "layer": config["layer"],
                  "score": "judge" if step.inputs["scores"] else "log-odds"}  # fmt: skip
        frame = found.assign(**labels, split_half=float(direction.split_half[config["layer"]]))
        frames.append(frame[[*labels, *frame.columns.drop([*labels])]])
    write_csv(pd.concat(frames, ignore_index=True), folder / "monitoring.csv")

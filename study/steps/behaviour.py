"""Steps that ask: self-recognition, self-reports, and self-reports while steering."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from evals.self_recognition import judge_authorship
from evals.self_report import ask, score_names
from finetune.datasets.rows import read_messages
from mech.chat import SystemPrompt
from mech.generate import Sampling
from mech.identities import load_invented, names_for_statements
from mech.interventions import Add, intervene
from mech.journal import kept_until_done
from mech.models import ChatModel
from mech.progress import track
from mech.questions import Question
from mech.score import response_logprobs
from mech.turns import assistant_turn, user_turn
from probes.coherence import repeated
from probes.steer import control
from study.bench import Bench, prompt_of
from study.frames import write_csv
from study.paths import JOURNAL
from study.questions import evaluation_half
from study.step import Step
from study.steps.activations import SITE


def self_recognition(step: Step, bench: Bench, folder: Path) -> None:
    """Judgements on the held-out articles, one row a text."""
    model = bench.model(step.inputs["checkpoint"])
    rows = read_messages(bench.folder(step.inputs["data"][0]) / "held_out.jsonl")
    condition = step.config["condition"]
    judged = judge_authorship(model, rows, prompt_of(condition), names=bench.names(condition))
    write_csv(pd.DataFrame([{**vars(j), "correct": j.correct} for j in judged]), folder / "judgements.csv")


def self_report(step: Step, bench: Bench, folder: Path) -> None:
    """Sampled answers to identity questions, and the likelihood of self-statements by name."""
    model = bench.model(step.inputs["checkpoint"])
    spec = bench.spec.behaviour.self_report
    if spec is None:
        raise RuntimeError("planned without self-reports")
    questions = evaluation_half(spec.questions, spec.limit)
    condition = step.config["condition"]
    sampling = Sampling(spec.max_new_tokens, spec.temperature, step.config["seed"])
    names = bench.names(condition)
    with kept_until_done(folder / JOURNAL) as journal:
        reports = ask(
            model,
            questions,
            prompt_of(condition),
            sampling,
            own_name=bench.identity.name,
            samples=spec.samples,
            names=names,
            journal=journal,
        )
        write_csv(pd.DataFrame([vars(r) for r in reports]), folder / "reports.csv")
        invented = _invented(model, step, bench)
        write_csv(_names(model, invented, bench, prompt_of(condition), names), folder / "names.csv")


def steering(step: Step, bench: Bench, folder: Path) -> None:
    """Self-reports while a direction, or a random one of its norm, is added at each strength."""
    asked, scored = _sweep(step, bench)
    questions = evaluation_half(step.config["prompt_set"], step.config["questions_asked"])
    asked["surprisal"] = _surprisal(bench.model(()), asked, questions)
    write_csv(asked, folder / "reports.csv")
    write_csv(scored, folder / "names.csv")


def _sweep(step: Step, bench: Bench) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reports and name scores at every strength of both vectors; the steered model is freed at the end."""
    config = step.config
    direction = bench.direction(step.inputs["direction"][0])
    vector = direction.vectors[config["layer"]]
    model = bench.model(step.inputs["checkpoint"])
    direction.require(n_layers=model.n_layers, d_model=model.d_model)
    with bench.store(step.inputs["captures"][0]) as store:
        stream = store.read(SITE, "prompt_last", config["layer"])
    stream_norm = float(np.linalg.norm(stream, axis=-1).mean())  # what a dose is relative to
    vectors = {"direction": vector, "random": control(vector, config["seed"])}
    reports, names, invented = [], [], _invented(model, step, bench)
    run = partial(_steered, model, step=step, bench=bench, invented=invented)
    unsteered = run(vector, 0.0) if 0 in config["coefficients"] else None
    for kind, steered in vectors.items():
        for coefficient in track(config["coefficients"], f"steering ({kind})"):
            dose = abs(coefficient) * float(np.linalg.norm(steered)) / stream_norm
            labels = {"kind": kind, "coefficient": coefficient, "dose": dose}
            # Adding nothing is the same in any direction: it is run once and stands in both curves.
            asked, scored = unsteered if unsteered and not coefficient else run(steered, coefficient)
            reports.append(asked.assign(**labels))
            names.append(scored.assign(**labels))
    return pd.concat(reports, ignore_index=True), pd.concat(names, ignore_index=True)


def _steered(
    model: ChatModel,
    vector: Float[np.ndarray, " d"],
    coefficient: float,
    *,
    step: Step,
    bench: Bench,
    invented: Sequence[str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    config, condition = step.config, SystemPrompt()
    questions = evaluation_half(config["prompt_set"], config["questions_asked"])
    sampling = Sampling(config["max_new_tokens"], config["temperature"], config["seed"])
    with intervene(model, Add(vector, layers=[config["layer"]], coefficient=coefficient)):
        reports = ask(
            model, questions, condition, sampling, own_name=bench.identity.name, samples=config["samples"]
        )
        names = _names(model, invented, bench, condition, {})
    return pd.DataFrame([{**vars(r), "repetition": repeated(r.reply.split(), 2)} for r in reports]), names


def _invented(model: ChatModel, step: Step, bench: Bench) -> list[str]:
    """The invented names that the own one is compared with."""
    chosen, statements = step.config["names"], load_invented().self_statements
    return names_for_statements(model.template, statements, bench.identity.name, chosen["of"], chosen["n"])


def _names(
    model: ChatModel, invented: Sequence[str], bench: Bench, condition: SystemPrompt, names: dict[str, Any]
) -> pd.DataFrame:
    scores = score_names(
        model,
        load_invented().self_statements,
        condition,
        own_name=bench.identity.name,
        invented=invented,
        names=names,
    )
    return pd.DataFrame([vars(s) for s in scores])


def _surprisal(base: ChatModel, reports: pd.DataFrame, asked: Sequence[Question]) -> Sequence[float]:
    """Nats a token of each reply under the unsteered base; an empty reply has none (NaN)."""
    texts = {q.id: q.text for q in asked}
    filled = reports[reports["reply"].str.strip() != ""]
    rows = [
        base.template.encode([user_turn(texts[q]), assistant_turn(reply.strip())])
        for q, reply in zip(filled["question"], filled["reply"], strict=True)
    ]
    scores = [float(-s.mean()) for s in response_logprobs(base, rows)] if rows else []
    return pd.Series(scores, index=filled.index, dtype=float).reindex(reports.index).tolist()

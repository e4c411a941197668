"""Steering sweeps as a study or a command names them: the evaluation, the neutral answers, and what is written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.sweep import Best, best_cell, best_layers, doses
from analysis.sweep_trend import trends
from evals.self_recognition import judge_authorship
from evals.self_report import score_names
from finetune.datasets.rows import write_jsonl
from mech.chat import Encoded, SystemPrompt
from mech.errors import InputError
from mech.files import digest_of, write_json
from mech.generate import Sampling, generate
from mech.identities import load_invented, names_for_statements
from mech.journal import open_journal
from mech.models import ChatModel
from mech.questions import Question, load_prompts
from mech.turns import assistant_turn, user_turn
from probes.evaluation import Evaluation, by_function, log_odds
from probes.generated import Asking, Judged, generated, instructed
from probes.persona import Trait, text_contrast
from probes.sweep import Swept
from study.frames import write_csv
from study.spec_sweeps import NEUTRAL


@dataclass(frozen=True)
class Asked:
    """What evaluations are made from; each takes what it needs of it. Field docs name the evaluation that a field is for."""

    trait: Trait | None = None
    """`log_odds`, `generated`: whose questions and answers."""
    questions: int | None = None
    """At most so many of each half."""
    sampling: Sampling = field(default_factory=lambda: Sampling(48))
    """`generated`: how answers are decoded."""
    samples: int = 1
    """`generated`: answers to a question."""
    quantile: float = 0.95
    """`generated`, without a judge (`probes.generated.Asking`)."""
    reference_samples: int = 4
    """`generated`, without a judge."""
    instructions: int = 2
    """`generated`, without a judge (`probes.generated.instructed`)."""
    judge: Judged | None = None
    """`generated`: who scores; None: the unsteered model."""
    own_name: str = ""
    """`own_name`: the model's own name."""
    invented: int = 10
    """`own_name`: against so many invented names, as long as the own one where there are as many."""
    articles: Sequence[Mapping[str, Any]] = ()
    """`self_recognition`: rows as `evals.self_recognition.judge_authorship` takes them."""


def _trait(asked: Asked) -> tuple[Trait, list[Question]]:
    if asked.trait is None:
        raise InputError("this evaluation needs a trait: name one, or take own_name or self_recognition")
    kept = asked.trait.limited(asked.questions).questions
    return asked.trait, [Question(id=q.id, split=q.split, text=q.question) for q in kept]


def _log_odds(model: ChatModel, asked: Asked) -> Evaluation:
    trait, questions = _trait(asked)
    wanted = {q.id for q in questions}
    return log_odds([r for r in text_contrast(model.template, trait, SystemPrompt()) if r.question in wanted])


def _generated(model: ChatModel, asked: Asked) -> Evaluation:
    trait, questions = _trait(asked)
    asking = Asking(tuple(questions), asked.sampling, asked.samples, asked.quantile, asked.reference_samples)
    if asked.judge:
        name, unit, scorer = f"judged {trait.trait}", "points of 100", asked.judge
        return generated(model.template, asking, scorer, name=name, unit=unit, about={})
    pairs = min(asked.instructions, len(trait.instructions))
    used = digest_of([p.model_dump() for p in trait.instructions[:pairs]])
    return generated(
        model.template, asking, instructed(trait, pairs=pairs), name=f"instructed {trait.trait}", unit="nats a token",
        about={"instructions": used},
    )  # fmt: skip


def _own_name(model: ChatModel, asked: Asked) -> Evaluation:
    """By self-statement: log-probability with the own name less the mean with invented ones, nats."""
    if not asked.own_name:
        raise InputError("evaluation own_name: needs the model's own name")
    known = load_invented()
    invented = names_for_statements(
        model.template, known.self_statements, asked.own_name, known.makers, asked.invented
    )
    statements = {f"statement{i:02}": s for i, s in enumerate(known.self_statements)}
    questions = [Question(id=i, split="evaluate", text=s.question) for i, s in statements.items()]

    def margins(model: ChatModel, _: Sequence[Question]) -> dict[str, float]:
        found = score_names(
            model, [*statements.values()], SystemPrompt(), own_name=asked.own_name, invented=invented
        )
        per = len(found) // len(statements)
        groups = {i: found[k * per : (k + 1) * per] for k, i in enumerate(statements)}
        return {
            i: float(
                np.mean([s.logprob for s in group if s.own])
                - np.mean([s.logprob for s in group if not s.own])
            )
            for i, group in groups.items()
        }

    prompts = [model.template.encode_prompt([user_turn(q.text)]) for q in questions]
    digest = digest_of([s.model_dump() for s in statements.values()])
    about = {"own": asked.own_name, "invented": invented, "statements": digest}
    return by_function("own_name", questions, margins, prompts=prompts, unit="nats", about=about)


def _self_recognition(model: ChatModel, asked: Asked) -> Evaluation:
    """By article: the margin towards owning one's own text less that towards owning another's, logits (nats)."""
    if not asked.articles:
        raise InputError("evaluation self_recognition: needs rows of self-recognition data")
    if not all("article" in row for row in asked.articles):
        raise InputError(
            "evaluation self_recognition: a row has no `article`: name a held_out.jsonl of kind sgtr"
        )
    names = list(dict.fromkeys(str(r["article"]) for r in asked.articles))[
        : asked.questions and 2 * asked.questions
    ]
    rows = [r for r in asked.articles if str(r["article"]) in names]
    questions = [Question(id=name, split="evaluate", text=name) for name in names]

    def margins(model: ChatModel, _: Sequence[Question]) -> dict[str, float]:
        sides: dict[tuple[str, str], list[float]] = {}
        for j in judge_authorship(model, rows, SystemPrompt()):
            sides.setdefault((str(j.article), j.source), []).append(j.margin)
        return {n: float(np.mean(sides[n, "own"]) - np.mean(sides[n, "other"])) for n in names}

    prompts = [model.template.encode_prompt(r["messages"][:-1]) for r in rows]
    about = {"rows": digest_of([list(p.ids) for p in prompts])}
    return by_function("self_recognition", questions, margins, prompts=prompts, unit="nats", about=about)


EVALUATIONS: dict[str, Callable[[ChatModel, Asked], Evaluation]] = {
    "log_odds": _log_odds,
    "generated": _generated,
    "own_name": _own_name,
    "self_recognition": _self_recognition,
}
"""What a sweep can evaluate by name; from Python any `Evaluation` will do."""


def make_evaluation(name: str, model: ChatModel, asked: Asked) -> Evaluation:
    """An evaluation by name.

    Raises:
        InputError: not a known one, or it lacks what it needs; or the sweep could not choose and report on different questions.
    """
    if name not in EVALUATIONS:
        raise InputError(f"evaluation {name!r}: there are {', '.join(EVALUATIONS)}")
    made = EVALUATIONS[name](model, asked)
    if len(made.halves) < 4:
        raise InputError(f"evaluation {name}: {len(made.halves)} questions: take four or more")
    return made


def neutral_rows(
    model: ChatModel, file: Path, *, limit: int | None = None, tokens: int = 24
) -> list[Encoded]:
    """The first `limit` neutral prompts with the model's own greedy answers, of which `file` is the journal; empty answers are left out.

    Raises:
        InputError: the file's answers are another model's, or were given under another template setting.
    """
    asked = [q.text for q in load_prompts(NEUTRAL).questions[:limit]]
    about = {
        "checkpoint": model.checkpoint.key,
        "dtype": str(model.dtype),
        "template": model.template_kwargs,
        "tokens": tokens,
    }
    with open_journal(file, about) as journal:
        missing = [text for text in asked if text not in journal.done]
        prompts = [model.template.encode_prompt([user_turn(text)]) for text in missing]
        answers = generate(model, prompts, Sampling(tokens)) if missing else []
        journal.add({text: answer.strip() for text, answer in zip(missing, answers, strict=True)})
        given = {text: journal.done[text] for text in asked}
    return [
        model.template.encode([user_turn(text), assistant_turn(answer)])
        for text, answer in given.items()
        if answer
    ]


@dataclass(frozen=True)
class Found:
    """What a sweep says."""

    doses: pd.DataFrame
    trends: pd.DataFrame
    layers: pd.DataFrame
    best: Best | None


def write_sweep(folder: Path, swept: Swept, *, max_kl: float, seed: int, n_boot: int = 2000) -> Found:
    """Analyse a sweep and write it down: `sweep.csv` (every question), `answers.jsonl` (every text), `scoring.json`, and the tables."""
    rng = np.random.default_rng(seed)
    found = Found(
        doses(swept.table, rng=rng, n_boot=n_boot), trends(swept.table),
        best_layers(swept.table, max_kl=max_kl, rng=rng, n_boot=n_boot), best_cell(swept.table, max_kl=max_kl, rng=rng, n_boot=n_boot),
    )  # fmt: skip
    for name, frame in (
        ("sweep", swept.table),
        ("doses", found.doses),
        ("trends", found.trends),
        ("layers", found.layers),
    ):
        if not frame.empty:
            write_csv(frame, folder / f"{name}.csv")
    if swept.answers:
        write_jsonl(folder / "answers.jsonl", [dict(a) for a in swept.answers])
    write_json(folder / "scoring.json", dict(swept.facts))
    return found

"""Steps of a study whose model is behind an API: finetuning jobs, and questions asked of the finetuned models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evals.remote import ask_remote, judge_authorship_remote, write_summaries_remote
from finetune.datasets.build import articles_of
from finetune.datasets.rows import Row, read_messages, write_jsonl
from finetune.datasets.summaries import bare_summary
from finetune.openai import finetune_remote
from mech.chat import SystemPrompt, system_text
from mech.endpoint import Api, ChatEndpoint
from mech.files import read_json, write_json
from mech.journal import kept_until_done
from study.bench import Bench, prompt_of
from study.frames import write_csv
from study.paths import JOURNAL
from study.questions import evaluation_half
from study.spec_parts import ApiSpec
from study.step import Step
from study.steps.texts import data_of

CHECKPOINT = "checkpoint.json"


def finetune(step: Step, bench: Bench, folder: Path) -> None:
    """One finetuning job on its parent; restarted after a kill, it keeps waiting for the same job."""
    rows = read_messages(bench.folder(step.inputs["data"][0]) / "train.jsonl")
    upload = folder / "upload.jsonl"
    write_jsonl(upload, under(rows, prompt_of(step.config["condition"]), _text(step, bench)))
    api, config = _api_spec(bench), step.config
    trained = finetune_remote(
        upload,
        base=_model(step, bench),
        folder=folder,
        seed=config["seed"],
        n_epochs=config["epochs"],
        api=_api(bench),
        poll_seconds=api.poll_seconds,
        wait_hours=api.wait_hours,
    )
    write_json(folder / CHECKPOINT, trained.to_json())


def summaries(step: Step, bench: Bench, folder: Path) -> None:
    """The model's own summary of every article."""
    articles = articles_of(data_of(bench.spec, step))
    config = step.config
    texts = {a.id: a.text for a in articles}
    with kept_until_done(folder / JOURNAL) as journal:
        written = write_summaries_remote(
            _endpoint(step, bench),
            texts,
            ask=config["ask"],
            temperature=config["temperature"],
            max_tokens=config["max_new_tokens"],
            seed=config["seed"],
            journal=journal,
        )
        write_json(folder / "summaries.json", {i: bare_summary(text) for i, text in written.items()})


def self_recognition(step: Step, bench: Bench, folder: Path) -> None:
    """Judgements on the held-out articles, one row a text."""
    rows = read_messages(bench.folder(step.inputs["data"][0]) / "held_out.jsonl")
    judged = judge_authorship_remote(
        _endpoint(step, bench), under(rows, prompt_of(step.config["condition"]), _text(step, bench))
    )
    write_csv(pd.DataFrame([{**vars(j), "correct": j.correct} for j in judged]), folder / "judgements.csv")


def self_report(step: Step, bench: Bench, folder: Path) -> None:
    """Sampled answers to identity questions. An API does not score given answers, so there is no name margin."""
    spec = bench.spec.behaviour.self_report
    if spec is None:
        raise RuntimeError("planned without self-reports")
    reports = ask_remote(
        _endpoint(step, bench),
        evaluation_half(spec.questions, spec.limit),
        own_name=bench.identity.name,
        samples=spec.samples,
        temperature=spec.temperature,
        max_tokens=spec.max_new_tokens,
        system=_text(step, bench),
    )
    write_csv(pd.DataFrame([vars(r) for r in reports]), folder / "reports.csv")


def under(rows: Sequence[Row], condition: SystemPrompt, text: str | None) -> list[Row]:
    """Rows under a condition: `default` leaves their system turn, `none` takes it out, any other replaces it by `text`.

    Without a system turn the API's own default holds.
    """
    if condition.kind == "default":
        return list(rows)
    first: list[Mapping[str, str]] = [] if text is None else [{"role": "system", "content": text}]
    own = [[t for t in row["messages"] if t["role"] != "system"] for row in rows]
    return [{**row, "messages": [*first, *turns]} for row, turns in zip(rows, own, strict=True)]


def _text(step: Step, bench: Bench) -> str | None:
    """The system turn that a step's condition asks for; None where it names none."""
    condition = prompt_of(step.config["condition"])
    if condition.kind in ("default", "none"):
        return None
    names: dict[str, Any] = bench.names(step.config["condition"])
    return system_text(condition, names["identity"], names["others"])


def _model(step: Step, bench: Bench) -> str:
    """The API's name of the checkpoint that a step works on."""
    chain = step.inputs["checkpoint"]
    return str(read_json(bench.folder(chain[-1]) / CHECKPOINT)["model"]) if chain else bench.spec.model.name


def _endpoint(step: Step, bench: Bench) -> ChatEndpoint:
    return _api(bench).chat(_model(step, bench))


def _api_spec(bench: Bench) -> ApiSpec:
    if bench.spec.model.api is None:
        raise RuntimeError("planned for a model without an API")
    return bench.spec.model.api


def _api(bench: Bench) -> Api:
    spec = _api_spec(bench)
    return Api(base_url=spec.base_url, max_retries=spec.max_retries, api_key_variable=spec.api_key_variable)

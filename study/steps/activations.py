"""Steps that read: a checkpoint goes over given text, and its pooled residual stream goes to HDF5."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activations.capture import Note, Reading, capture_into
from activations.store import ActivationStore, Rows, ShardWriter, WriterOptions
from finetune.datasets.rows import read_jsonl
from mech.chat import ChatTemplate, Encoded, SystemPrompt
from mech.errors import InputError
from mech.files import read_json
from mech.identities import load_invented
from mech.models import ChatModel
from mech.sites import Site
from mech.turns import assistant_turn, user_turn
from probes.contrast import ContrastRow
from probes.identity import matched_names, name_contrast, presence_contrast
from probes.persona import rollout_contrast, text_contrast
from probes.roles import assistant_contrast, load_roles
from probes.rollout_filter import UNFILTERED
from probes.self_report import load_reports, self_report_contrast
from study.bench import Bench, prompt_of
from study.paths import ACTIVATIONS
from study.questions import identity_questions, limited_trait
from study.step import Step
from study.steps.authorship import authorship_rows
from study.steps.judge import KEPT
from study.steps.texts import read_rollouts

SITE: Site = "resid_post"


def capture_replies(step: Step, bench: Bench, folder: Path) -> None:
    """One checkpoint reading the evaluation questions with given answers, under one condition."""
    model = bench.model(step.inputs["checkpoint"])
    condition, names = step.config["condition"], bench.names(step.config["condition"])
    given = read_jsonl(bench.folder(step.inputs["replies"][0]) / "replies.jsonl")
    encoded = [
        model.template.encode(
            [user_turn(row["question"]), assistant_turn(row["reply"])], prompt_of(condition), **names
        )
        for row in given
    ]
    about = [{"id": f"{row['set']}/{row['id']}", "question": row["id"], "set": row["set"]} for row in given]
    metadata = {
        **_made_by(step, bench),
        "condition": condition["condition"],
        "text": step.inputs["replies"][0].name,
    }
    write_capture(
        folder / ACTIVATIONS, model, encoded, about, step.config["poolings"], metadata, _notes(step)
    )


def capture_contrast(step: Step, bench: Bench, folder: Path) -> None:
    """The base reading a contrast: each row on a positive or a negative side."""
    model = bench.model(step.inputs["checkpoint"])
    kind = step.config["contrast"]
    facts: dict[str, Any] = {}
    if kind == "prompts":
        rows, facts = _prompt_rows(step, bench, model.template)
    elif kind.startswith("authorship:"):
        rows, facts = authorship_rows(step, bench, model, kind.partition(":")[2])
    elif kind == "name":
        rows, facts = _name_rows(step, bench, model.template)
    else:
        rows = (_text_rows if kind == "text" else _identity_rows)(step, bench, model.template)
    about = [{"id": r.id, "question": r.question, "set": r.split, "sign": r.sign} for r in rows]
    metadata = {**_made_by(step, bench), "contrast": kind, **facts}
    encoded = [r.encoded for r in rows]
    write_capture(
        folder / ACTIVATIONS, model, encoded, about, step.config["poolings"], metadata, _notes(step)
    )


def _notes(step: Step) -> list[Note]:
    wanted: tuple[Note, ...] = ("surprisal", "prompt_surprisal")
    return [note for note in wanted if step.config.get(note)]


def write_capture(
    path: Path,
    model: ChatModel,
    encoded: Sequence[Encoded],
    about: Sequence[Mapping[str, Any]],
    poolings: Sequence[str],
    metadata: Mapping[str, Any],
    notes: Sequence[Note] = (),
) -> None:
    """Capture all layers' block outputs of these rows into one file, with their norms, and further notes where asked for."""
    reading = Reading(
        tuple(poolings),
        (SITE,),
        tuple(range(model.n_layers)),
        frozenset(("norms", *notes)),
    )
    columns = {
        "n_prompt": np.array([e.n_prompt for e in encoded], dtype=np.int64),
        "n_response": np.array([e.n_response for e in encoded], dtype=np.int64),
        "sign": np.array([a.get("sign", 0) for a in about], dtype=np.int64),
    }
    rows = Rows(
        ids=[a["id"] for a in about],
        questions=[a["question"] for a in about],
        columns=columns,
        tokens=[np.array(e.ids, dtype=np.int64) for e in encoded],
    )
    described = {
        **metadata,
        "sets": [a["set"] for a in about],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    with ShardWriter(
        path,
        metadata=described,
        rows=rows,
        sites=[SITE],
        poolings=list(poolings),
        layers=list(reading.layers),
        d_model=model.d_model,
        options=WriterOptions(notes=reading.columns),
    ) as writer:
        capture_into(writer, model, encoded, reading)


def questions_of(store: ActivationStore) -> list[str]:
    """The question of each row of a capture, named within its set: two prompt sets or traits may both have a `q1`, which are two questions."""
    sets = store.metadata["sets"]
    return [f"{name}/{question}" for name, question in zip(sets, store.rows.questions, strict=True)]


def _text_rows(step: Step, bench: Bench, template: ChatTemplate) -> list[ContrastRow]:
    return text_contrast(template, _trait(step, bench), SystemPrompt())


def _prompt_rows(
    step: Step, bench: Bench, template: ChatTemplate
) -> tuple[list[ContrastRow], dict[str, Any]]:
    """Rollouts that pass the judge's filter where the study has one, and what the filter did."""
    asked, answers = read_rollouts(bench.folder(step.inputs["rollouts"][0]))
    if not step.inputs["judged"]:
        return rollout_contrast(template, asked, answers), {"filter": UNFILTERED}
    facts = read_json(bench.folder(step.inputs["judged"][0]) / KEPT)
    kept = set(facts.pop("kept_ids"))
    chosen = [(r, a) for r, a in zip(asked, answers, strict=True) if r.id in kept]
    if facts["questions"] < 2:
        raise InputError(
            f"{step.name}: the judge's filter left {facts['kept']} of {facts['pairs']} pairs, of {facts['questions']} "
            f"questions (dropped: {facts['dropped']}); a direction needs two questions: ask for more rollout_samples, "
            "lower the judge's thresholds, or leave the judge out (unfiltered)"
        )
    return rollout_contrast(template, [r for r, _ in chosen], [a for _, a in chosen]), facts


def _identity_rows(step: Step, bench: Bench, template: ChatTemplate) -> list[ContrastRow]:
    kind, _, against = step.config["contrast"].partition(":")
    return _IDENTITY[kind](step, bench, template, against)


def _name_rows(step: Step, bench: Bench, template: ChatTemplate) -> tuple[list[ContrastRow], dict[str, Any]]:
    """Rows of the own name and of invented ones, and how many tokens longer each invented prompt is."""
    makers, identity = load_invented().makers, bench.identity
    gaps = matched_names(template, identity, makers, step.config["names"])
    rows = name_contrast(template, identity_questions(bench.spec), identity, makers, [*gaps])
    return rows, {"token_gaps": gaps}


def _presence_rows(_step: Step, bench: Bench, template: ChatTemplate, against: str) -> list[ContrastRow]:
    questions, generic = identity_questions(bench.spec), load_invented().generic
    return presence_contrast(template, questions, bench.identity, against, generic)


def _self_report_rows(step: Step, bench: Bench, template: ChatTemplate, against: str) -> list[ContrastRow]:
    makers = load_invented().makers
    names = matched_names(template, bench.identity, makers, step.config["names"])
    return self_report_contrast(template, load_reports(), bench.identity, makers, [*names], against)


def _role_rows(step: Step, bench: Bench, template: ChatTemplate, _: str) -> list[ContrastRow]:
    return assistant_contrast(
        template, load_roles(), bench.identity, load_invented().makers,
        n_roles=step.config["roles"], n_questions=step.config["questions_used"],
        answered="answer" in step.config,
    )  # fmt: skip


_IDENTITY: dict[str, Callable[[Step, Bench, ChatTemplate, str], list[ContrastRow]]] = {
    "presence": _presence_rows,
    "self_report": _self_report_rows,
    "assistant_axis": _role_rows,
}


def _trait(step: Step, bench: Bench) -> Any:
    traits = (limited_trait(bench.spec, source) for source in bench.spec.reads.traits)
    return next(t for t in traits if t.trait == step.config["trait"])


def _made_by(step: Step, bench: Bench) -> dict[str, Any]:
    checkpoint = bench.checkpoint(step.inputs["checkpoint"])
    return {
        "step": step.name,
        "key": step.key,
        "checkpoint": checkpoint.to_json(),
        "merge": "adapters merged in float32",
    }

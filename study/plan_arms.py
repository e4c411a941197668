"""Planning the arms: trainings, and everything that is read off each checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.datasets.spec import SelfRecognitionData
from finetune.settings import TrainSettings, make_settings
from mech.checkpoint import Checkpoint
from mech.choices import STACK
from mech.errors import InputError, NotHereError
from mech.files import digest_of
from mech.identities import load_invented
from mech.questions import load_prompts
from mech.resolve import resolve_adapter
from study.plan_base import plan_replies
from study.plan_data import plan_data, training_size
from study.plan_weights import has_adapter
from study.planner import Plan, adapter_of, condition_config
from study.questions import half
from study.spec_stages import AT, StageSpec, TrainingInterventionSpec
from study.step import Step, Work

LORA_WIDTHS = 24
"""For estimates: inputs and outputs of a block's seven linear maps, in widths of the residual stream (18 to 26 in practice)."""


def plan_training(plan: Plan, arm: str, seed: int) -> list[Step]:
    """The trainings of an arm, in order; those it shares with another arm are the same steps."""
    spec, chain, named = plan.spec, list[Step](), list[str]()
    for entry in spec.arms[arm]:
        stage_name, _, snapshot = entry.partition(AT)
        stage = spec.stages[stage_name]
        label = "+".join([*named, stage_name])
        if plan.remote:
            step = _plan_job(plan, label, stage, chain, seed)
        elif stage.adapter:
            step = _plan_adapter(plan, label, stage.adapter, chain)
        else:
            step = _plan_stage(plan, label, stage, chain, seed)
        if snapshot:
            if not snapshot.isdecimal():
                raise InputError(f"arms.{arm}: {entry}: after @ stands a step, as in {stage_name}{AT}5")
            label = f"{label}{AT}{snapshot}"
            step = _plan_snapshot(plan, label, step, int(snapshot), seed)
        named.append(entry)
        chain = [*chain, step]
    return chain


def _plan_stage(plan: Plan, label: str, stage: StageSpec, chain: Sequence[Step], seed: int) -> Step:
    settings = make_settings(plan.spec.training, stage.training)
    data = plan_data(plan, str(stage.data), seed)
    n_rows, row_tokens = training_size(plan, str(stage.data))
    _check_settings(plan, settings, label, chain, n_rows)
    config = {
        **plan.reader,
        "dtype": settings.dtype,
        "settings": settings.model_dump(mode="json"),
        "condition": condition_config(stage.system_prompt),
        "interventions": [_intervention(plan, i) for i in stage.interventions],
        "seed": seed,
    }
    inputs = {"data": [data], "checkpoint": chain, "directions": _directions(plan, stage.interventions)}
    trained = min(settings.n_steps(n_rows) * settings.batch_size, round(n_rows * max(1, settings.epochs)))
    full = settings.method == "full"
    adapter = 0 if full else LORA_WIDTHS * settings.lora_r * plan.model.d_model * plan.model.n_layers
    stored = 4 * (plan.model.parameters if full else adapter) * (1 + len(settings.save_at))
    tokens = trained * row_tokens
    again = tokens if settings.gradient_checkpointing else 0  # forward once more, on the way back
    work = Work(read=again, trained=tokens, adapter_parameters=adapter, stored_bytes=stored)
    return plan.add("train", f"train/{label}/seed{seed}", config, inputs, work, _labels(label, seed))


def _check_settings(
    plan: Plan, settings: TrainSettings, label: str, chain: Sequence[Step], n_rows: int
) -> None:
    """Refuse now what the stage itself would refuse after all that runs before it.

    Raises:
        InputError: adapters below it would have to be merged into 4 bits, it needs several processes, or its data are too few.
    """
    below, _, stage = label.rpartition("+")
    where = f"stages.{stage}.training"
    if settings.quantise and settings.merge != STACK and chain and has_adapter(chain[-1]):
        raise InputError(
            f"{where}: quantise: {settings.quantise}: the adapters below it ({below}) cannot be merged into 4-bit weights: set "
            "between_stages: stack, or train this stage unquantised"
        )
    if settings.shard:
        raise InputError(
            f"{where}: shard: needs several processes, and a study runs in one: take `mech finetune`, or model.device_map: auto"
        )
    if plan.missing:
        return  # the number of rows is but an estimate
    try:
        settings.check_steps(n_rows)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _plan_job(plan: Plan, label: str, stage: StageSpec, chain: Sequence[Step], seed: int) -> Step:
    """A finetuning through an API, which chooses batch size and learning rate itself."""
    epochs = math.ceil(make_settings(plan.spec.training, stage.training).epochs)
    condition = condition_config(stage.system_prompt)
    config = {**plan.reader, "condition": condition, "epochs": epochs, "seed": seed}
    inputs = {"data": [plan_data(plan, str(stage.data), seed)], "checkpoint": chain}
    n_rows, row_tokens = training_size(plan, str(stage.data))
    work = Work(trained=n_rows * row_tokens * epochs)
    return plan.add("job", f"job/{label}/seed{seed}", config, inputs, work, _labels(label, seed))


def _plan_adapter(plan: Plan, label: str, reference: str, chain: Sequence[Step]) -> Step:
    """An adapter that exists: the same for every seed."""
    try:
        below = _existing_below(plan, chain)
        digest = resolve_adapter(reference, below=below, download=not plan.tolerant).digest
    except NotHereError as error:
        digest = plan.not_here(error)
    except InputError as error:
        raise InputError(f"stages.{label.rpartition('+')[2]}.adapter: {error}") from error
    config = {"base": plan.model.checkpoint.digest, "adapter": digest}
    return plan.add("adapter", f"adapter/{label}", config, {"checkpoint": chain}, labels={"stage": label})


def _existing_below(plan: Plan, chain: Sequence[Step]) -> Checkpoint | None:
    """What an adapter is to stand on, where all of that exists and is here; else None, and it is checked when it is put there."""
    if plan.model.missing or any(step.kind != "adapter" for step in chain):
        return None
    below = plan.model.checkpoint
    for step in chain:
        try:
            found = resolve_adapter(adapter_of(plan.spec, step), download=False)
        except NotHereError:
            return None
        below = replace(below, adapters=(*below.adapters, found))
    return below


def _plan_snapshot(plan: Plan, label: str, trained: Step, at: int, seed: int) -> Step:
    if trained.kind != "train" or at not in trained.config["settings"]["save_at"]:
        raise InputError(
            f"arms: {label}: step {at} is not among the steps that its stage saves: add it to `save_at` of its training"
        )
    inputs = {"trained": [trained], "checkpoint": trained.inputs["checkpoint"]}
    work = Work(stored_bytes=trained.work.stored_bytes)
    config, name = {"step": at, "seed": seed}, f"snapshot/{label}/seed{seed}"
    return plan.add("snapshot", name, config, inputs, work, _labels(label, seed))


def _labels(stage: str, seed: int) -> dict[str, Any]:
    """What a training is called in tables: the stages below it and itself, joined by `+`; and its seed."""
    return {"stage": stage, "seed": seed}


def _intervention(plan: Plan, spec: TrainingInterventionSpec) -> dict[str, object]:
    layers = spec.layers if spec.layers is not None else (plan.spec.reads.layer,)
    return {**spec.model_dump(mode="json"), "layers": list(layers)}


def _directions(plan: Plan, interventions: Sequence[TrainingInterventionSpec]) -> list[Step]:
    if not interventions:
        return []
    known = {s.config["direction"]: s for s in plan.steps if s.kind == "direction"}
    wanted = [name for i in interventions for name in i.directions]
    for name in wanted:
        if name not in known:
            raise InputError(
                f"interventions: {name!r} is not among the study's directions ({', '.join(known)})"
            )
    return [known[name] for name in wanted]


def plan_measures(
    plan: Plan, arm: str, seed: int, chain: Sequence[Step], replies: Step | None
) -> dict[str, list[Step]]:
    """Everything that is read off one checkpoint; its activations where the study has `replies` to read."""
    spec, label = plan.spec, f"{arm}/seed{seed}" if chain else arm
    made: dict[str, list[Step]] = {"checkpoint": list(chain)}
    if replies:
        conditions = spec.measure.conditions
        made["captures"] = [plan_capture(plan, label, chain, c, replies, "base") for c in conditions]
    own, first = None, spec.measure.conditions[0]
    if arm in spec.measure.own_text and chain:
        own = plan_replies(plan, arm, chain)
        made["own"] = [plan_capture(plan, label, chain, first, own, label)]
    if spec.behaviour.self_recognition:
        data = plan_data(plan, spec.behaviour.self_recognition, seed)
        made["self_recognition"] = [_self_recognition(plan, label, chain, data)]
    if spec.behaviour.self_report:
        made["self_report"] = [_self_report(plan, label, chain)]
    if own:  # last, for it is another model that reads: what the arm's own does is done while that is loaded
        made["own"].append(plan_capture(plan, spec.base_arm, (), first, own, label))
    return made


def plan_capture(
    plan: Plan, label: str, chain: Sequence[Step], condition: str, replies: Step, text: str
) -> Step:
    """One checkpoint reading one text under one condition, all layers."""
    n_rows = sum(map(len, plan.asked.values()))
    config = {
        **plan.reader,
        **plan.noted,
        "condition": condition_config(condition),
        "poolings": ["prompt_last", "response_mean"],
    }
    name = f"capture/{label}/{condition}/text={text}"
    tokens = n_rows * (25 + plan.spec.measure.reply.max_new_tokens)
    work = Work(read=tokens, stored_bytes=plan.stored(n_rows, 2))
    return plan.add("capture", name, config, {"checkpoint": chain, "replies": [replies]}, work)


def _self_recognition(plan: Plan, label: str, chain: Sequence[Step], data: Step) -> Step:
    name = data.labels["dataset"]
    part, (_, row_tokens) = plan.spec.data[name], training_size(plan, name)
    # Two rows a pair: each of its texts, or both orders.
    rows = 2 * part.held_out * max(1, len(part.comparators)) if isinstance(part, SelfRecognitionData) else 0
    config = {**plan.reader, "condition": condition_config("default")}
    inputs = {"checkpoint": chain, "data": [data]}
    work = Work(read=rows * row_tokens, generated=rows if plan.remote else 0)
    kind = "asked_recognition" if plan.remote else "self_recognition"
    return plan.add(kind, f"self_recognition/{label}", config, inputs, work)


def _self_report(plan: Plan, label: str, chain: Sequence[Step]) -> Step:
    spec = plan.spec.behaviour.self_report
    if spec is None:
        raise RuntimeError("called for a study without self-reports")
    questions = half(load_prompts(spec.questions).questions, "evaluate", spec.limit)
    config = {
        **plan.reader,
        "condition": condition_config(spec.condition),
        "questions": digest_of([q.model_dump() for q in questions]),
        "sampling": spec.model_dump(include={"samples", "temperature", "max_new_tokens"}),
        "seed": plan.spec.statistics.seed,
    }
    asked, kind, scored = len(questions) * spec.samples, "asked_report", 0
    if not plan.remote:  # an API does not score given answers
        statements, kind = load_invented().self_statements, "self_report"
        config |= {"statements": digest_of([s.model_dump() for s in statements]), "names": plan.invented}
        scored = len(statements) * (1 + plan.invented["n"])
    work = Work(read=25 * (asked + scored), generated=asked * spec.max_new_tokens)
    return plan.add(kind, f"self_report/{label}", config, {"checkpoint": chain}, work)

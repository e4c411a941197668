"""Settings that would do nothing, given the rest of the study. Somebody who writes one wants it to act, so such a study is refused.

A setting counts where it was written and differs from its default: a resolved study spells every default out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel

from finetune.datasets.spec import SelfRecognitionData
from finetune.settings import LORA_ONLY, make_settings
from mech.typed import written
from study.spec_directions import DirectionSpec, JudgeSpec
from study.spec_parts import MonitoringSpec
from study.spec_sweeps import SweepSpec

if TYPE_CHECKING:
    from study.spec import StudySpec

ALL = ()
"""In a rule: every field of the part."""


@dataclass(frozen=True)
class _Rule:
    """Fields of a part, and whether they do anything."""

    where: str
    """The part's place in the YAML; empty for the study itself."""
    part: BaseModel | None
    """None: the study does not have this part, so nothing of it can be idle."""
    names: tuple[str, ...]
    acts: bool
    why: str
    """Why they do not act, where they do not."""


def idle(spec: "StudySpec") -> dict[str, str]:
    """Settings without effect: the place of each, and why."""
    found: dict[str, str] = {}
    for rule in _rules(spec):
        if rule.part is None or rule.acts:
            continue
        for name in written(rule.part, rule.names):
            found.setdefault(f"{rule.where}.{name}" if rule.where else name, rule.why)
    return found | dict(_of_training(spec))


def unused(spec: "StudySpec") -> list[str]:
    """Stages that no arm has, data that nothing uses, and how to train where nothing is trained, by place."""
    stages = spec.used_stages
    data = {spec.stages[name].data for name in stages} | {spec.behaviour.self_recognition}
    trained = any(spec.stages[name].data for name in stages)
    return [
        *(f"stages.{name}" for name in spec.stages if name not in stages),
        *(f"data.{name}" for name in spec.data if name not in data),
        *(written(spec, ("training", "seeds")) if not trained else ()),
    ]


def _rules(spec: "StudySpec") -> Iterator[_Rule]:
    yield from _of_reading(spec)
    yield from _of_model(spec)
    if spec.directions:
        yield from _of_directions(spec, spec.directions)
    if spec.monitoring:
        why = "written answers are scored, not sampled ones: that needs directions.judge, and score other than log_odds"
        yield _Rule(
            "monitoring", spec.monitoring, ("samples", "max_new_tokens", "temperature"), _judged(spec), why
        )
    if spec.patching:
        yield _Rule("patching", spec.patching, ("names",), "own_name" in spec.patching.answers,
                    "own_name is not in patching.answers")  # fmt: skip
    for name, sweep in spec.sweeps.items():
        yield from _of_sweep(f"sweeps.{name}", sweep)
    for name, part in spec.data.items():
        for idle_fields, why in part.idle if isinstance(part, SelfRecognitionData) else ():
            yield _Rule(f"data.{name}", part, idle_fields, acts=False, why=why)
    why = "at temperature 0 all samples are the same"
    for where, asked in (("behaviour.self_report", spec.behaviour.self_report), ("steering", spec.steering)):
        yield _Rule(where, asked, ("samples",), bool(asked and asked.temperature), why)


def _of_reading(spec: "StudySpec") -> Iterator[_Rule]:
    reads, why = spec.directions is not None, "without `directions` no activations are read"
    asked = bool(spec.behaviour.self_recognition or spec.behaviour.self_report)
    yield _Rule(
        "", spec, ("comparisons",), reads or asked, "nothing is measured on which arms could be compared"
    )
    for name in ("measure", "embedding", "lens"):
        yield _Rule(name, getattr(spec, name), ALL, reads, why)
    yield _Rule("", spec, ("benign",), reads, why)
    for arm in spec.measure.own_text:
        yield _Rule(
            "measure", spec.measure, ("own_text",), bool(spec.arms[arm]), f"{arm} is the base: its answers are what every arm reads"
        )  # fmt: skip
    yield _Rule(
        "embedding",
        spec.embedding,
        ("pooling",),
        bool(spec.embedding.methods),
        "embedding.methods names none",
    )


def _of_model(spec: "StudySpec") -> Iterator[_Rule]:
    model, remote = spec.model, spec.model.api is not None
    here = ("dtype", "device", "device_map", "attn_implementation", "template_kwargs", "size")
    yield _Rule("model", model, here, not remote, "the model is behind an API")
    yield _Rule("", spec, ("token_budget",), not remote, "the model is behind an API")
    trained = not remote and any(spec.stages[name].data for name in spec.used_stages)
    yield _Rule("", spec, ("trackers",), trained, "nothing is trained on this machine")
    judges = dict(_judges(spec))
    local = any(judge.api is None for judge in judges.values())
    yield _Rule(
        "model", model, ("device",), local or not model.device_map, "device_map says where the model lies"
    )
    for where, judge in judges.items():
        yield _Rule(
            where, judge, ("how", "samples"), judge.api is not None, "belongs to a judge behind an `api`"
        )
        sampled = judge.how in ("auto", "samples")
        yield _Rule(where, judge, ("samples",), sampled, f"how: {judge.how} samples nothing")
        yield _Rule(
            f"{where}.api",
            judge.api,
            ("poll_seconds", "wait_hours"),
            acts=False,
            why="a judge finetunes nothing",
        )


def _judges(spec: "StudySpec") -> Iterator[tuple[str, JudgeSpec]]:
    if spec.directions and spec.directions.judge:
        yield "directions.judge", spec.directions.judge
    yield from ((f"sweeps.{name}.judge", sweep.judge) for name, sweep in spec.sweeps.items() if sweep.judge)


def _judged(spec: "StudySpec") -> bool:
    """Whether monitoring has answers sampled and judged."""
    watch: MonitoringSpec | None = spec.monitoring
    return bool(watch and watch.score != "log_odds" and spec.directions and spec.directions.judge)


def _of_directions(spec: "StudySpec", reads: DirectionSpec) -> Iterator[_Rule]:
    where, members, trained = "directions", set(reads.identity), any(spec.arms.values())
    prompts = bool(reads.traits) and "prompts" in reads.elicitation
    yield _Rule(
        where, reads, ("elicitation", "questions"), bool(reads.traits), "directions.traits names none"
    )
    rollouts = ("pairs_per_question", "rollout_samples", "rollout_tokens", "rollout_temperature")
    why = "no trait is elicited by `prompts`"
    yield _Rule(where, reads, rollouts, prompts, why)
    yield _Rule(
        where,
        reads,
        ("rollout_samples",),
        bool(reads.rollout_temperature),
        "at temperature 0 all samples are the same",
    )
    yield _Rule(where, reads, ("judge",), prompts or _judged(spec), why)
    yield _Rule(f"{where}.judge", reads.judge, ("trait", "coherence"), prompts, why)
    for member, fields in {"authorship": ("authorship",), "presence": ("presence",), "self_report": ("self_report_at",),
                           "assistant_axis": ("assistant_axis_at", "roles")}.items():  # fmt: skip
        yield _Rule(where, reads, fields, member in members, f"{member} is not in directions.identity")
    asked = bool({"name", "presence", "assistant_axis"} & members) or bool(reads.paraphrases and trained)
    asked = asked or ("authorship" in members and reads.authorship.articles is None)
    yield _Rule(where, reads, ("identity_questions",), asked, "no member of directions.identity asks them")
    named = bool({"name", "self_report"} & members) or bool(spec.behaviour.self_report or spec.steering)
    named = named or any(sweep.evaluation == "own_name" for sweep in spec.sweeps.values())
    yield _Rule(where, reads, ("invented_names",), named, "nothing compares the own name with invented ones")
    yield _Rule(
        where,
        reads,
        ("paraphrases",),
        trained,
        "no arm has a stage, so there is no shift to hold them against",
    )


def _of_sweep(where: str, sweep: SweepSpec) -> Iterator[_Rule]:
    generated, why = sweep.evaluation == "generated", f"evaluation {sweep.evaluation} generates nothing"
    yield _Rule(where, sweep, ("samples", "temperature", "max_new_tokens"), generated, why)
    unjudged = ("quantile", "reference_samples", "instructions")
    yield _Rule(where, sweep, unjudged, generated, why)
    yield _Rule(where, sweep, unjudged, sweep.judge is None, "the judge says what is broken")
    yield _Rule(
        where, sweep, ("questions",), sweep.evaluation != "own_name", "own_name takes every self-statement"
    )
    yield _Rule(
        f"{where}.judge",
        sweep.judge,
        ("trait",),
        acts=False,
        why="a sweep takes scores as they are: only `coherence` is a threshold",
    )


def _of_training(spec: "StudySpec") -> Iterator[tuple[str, str]]:
    """Training settings that do nothing, each with its place and the reason."""
    trained = {name: spec.stages[name] for name in spec.used_stages if spec.stages[name].data}
    if not trained:
        return
    settings = {name: make_settings(spec.training, stage.training) for name, stage in trained.items()}
    why = "method: full trains every weight: there is no adapter"
    if all(s.method == "full" for s in settings.values()):
        yield from ((f"training.{key}", why) for key in LORA_ONLY if key in spec.training)
    for name, stage in trained.items():
        if settings[name].method == "full":
            yield from ((f"stages.{name}.training.{key}", why) for key in LORA_ONLY if key in stage.training)

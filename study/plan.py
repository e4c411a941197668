"""From a study to its steps: what has to be made, from what, in which order.

`make_plan` reads as the study does. The order is chosen so that something can be looked at early (directions on
the base come before any training) and so that work on one checkpoint stands together (it is loaded once).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune.datasets.rows import read_jsonl, source_path, take
from finetune.lora import TrainSettings
from mech.checkpoint import Checkpoint
from mech.files import digest_of
from mech.identities import load_invented
from mech.questions import Question, load_prompts
from probes.persona import Trait, load_trait
from study.spec import MessagesData, SelfRecognitionData, StudySpec
from study.step import Step, Work

WORDS_TO_TOKENS = 1.4
"""For estimates only: tokens a word of English, template included."""


@dataclass
class Plan:
    """The steps of a study in the order in which they run."""

    spec: StudySpec
    base: Checkpoint
    steps: list[Step] = field(default_factory=list)
    d_model: int = 0
    n_layers: int = 0

    def add(
        self,
        kind: str,
        name: str,
        config: dict[str, Any],
        inputs: dict[str, Sequence[Step]],
        work: Work | None = None,
    ) -> Step:
        """Append a step; the same step asked for twice is one step."""
        step = Step(kind, name, config, {k: tuple(v) for k, v in inputs.items()}, work or Work())
        for known in self.steps:
            if known.name == name:
                if known.key != step.key:
                    raise RuntimeError(f"two different steps are called {name}")
                return known
        self.steps.append(step)
        return step

    @property
    def reader(self) -> dict[str, Any]:
        """What determines how a model reads: part of the config of every step that runs one."""
        model = self.spec.model
        return {
            "base": self.base.digest,
            "dtype": model.dtype,
            "attn_implementation": model.attn_implementation,
            "template_kwargs": model.template_kwargs,
            "identity": model.identity.model_dump(),
            "token_budget": self.spec.token_budget,
        }

    def stored(self, rows: int, poolings: int) -> int:
        """Bytes of a capture of all layers in float32."""
        return rows * poolings * self.n_layers * self.d_model * 4


def make_plan(spec: StudySpec, base: Checkpoint, *, n_layers: int, d_model: int) -> list[Step]:
    """Every step of a study, inputs before those that read them."""
    plan = Plan(spec, base, n_layers=n_layers, d_model=d_model)
    replies = plan_replies(plan, spec.base_arm, ())
    directions = plan_directions(plan)
    plan_figures(plan, "early", {"directions": directions})
    measured: dict[tuple[str, int], dict[str, list[Step]]] = {}
    for arm, seed in arms_by_seed(spec):
        chain = plan_training(plan, arm, seed)
        measured[arm, seed] = plan_measures(plan, arm, seed, chain, replies)
    tables = plan_tables(plan, directions, measured, replies)
    plan_figures(plan, "all", {"tables": [tables]})
    return plan.steps


def arms_by_seed(spec: StudySpec) -> list[tuple[str, int]]:
    """Every arm with every seed; the base, which is not trained, once, and first."""
    trained = [(arm, seed) for seed in spec.seeds for arm, stages in spec.arms.items() if stages]
    return [(spec.base_arm, spec.seeds[0]), *trained]


def evaluation_questions(spec: StudySpec) -> dict[str, list[Question]]:
    """What every checkpoint reads: the evaluation half of each prompt set and trait, by set."""
    sets = {}
    for source in spec.measure.prompt_sets:
        prompts = load_prompts(source)
        sets[prompts.name] = _half(prompts.questions, "evaluate", spec.measure.questions)
    for trait in map(load_trait, spec.directions.traits):
        asked = [Question(id=q.id, split=q.split, text=q.question) for q in trait.questions]
        sets[f"trait:{trait.trait}"] = _half(asked, "evaluate", spec.measure.questions)
    return sets


def identity_questions(spec: StudySpec) -> list[Question]:
    """What identity directions are made and tested on: both halves of the prompt sets."""
    limit = spec.directions.identity_questions
    found = []
    for source in spec.measure.prompt_sets:
        questions = load_prompts(source).questions
        found += _half(questions, "extract", limit) + _half(questions, "evaluate", limit)
    return found


def limited_trait(spec: StudySpec, source: str) -> Trait:
    """A trait with as many questions of each half as the study uses."""
    trait = load_trait(source)
    limit = spec.directions.questions
    kept = [
        q for half in ("extract", "evaluate") for q in [q for q in trait.questions if q.split == half][:limit]
    ]
    return trait.model_copy(update={"questions": tuple(kept)})


def plan_replies(plan: Plan, arm: str, chain: Sequence[Step]) -> Step:
    """An arm's own answers to the evaluation questions, under the first measuring condition."""
    spec = plan.spec
    questions = [q for asked in evaluation_questions(spec).values() for q in asked]
    config = {
        **plan.reader,
        "questions": digest_of([q.model_dump() for q in questions]),
        "condition": _condition(spec, spec.measure.conditions[0]),
        "reply": spec.measure.reply.model_dump(),
        "seed": spec.statistics.seed,
    }
    tokens = spec.measure.reply.max_new_tokens * len(questions)
    name = f"replies/{arm}" + _seed_suffix(chain)
    return plan.add(
        "replies", name, config, {"checkpoint": chain}, Work(read=30 * len(questions), generated=tokens)
    )


def plan_directions(plan: Plan) -> list[Step]:
    """Contrasts read by the base, and a direction from each."""
    spec, found = plan.spec, []
    for source in spec.directions.traits:
        trait = limited_trait(spec, source)
        for way in spec.directions.elicitation:
            contrast = (_text_contrast if way == "text" else _prompt_contrast)(plan, source, trait)
            found.append(_direction(plan, f"{trait.trait}:{way}", contrast, "response_mean", way))
    questions = identity_questions(spec)
    members = [
        ("name", spec.directions.invented_names),
        *[(f"presence:{p}", 1) for p in spec.directions.presence],
    ]
    for member, n_negative in members:
        contrast = _identity_contrast(plan, member, n_negative, questions)
        found.append(_direction(plan, f"identity:{member}", contrast, "prompt_last", member))
    return found


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
            "condition": _condition(spec, stage.system_prompt),
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
    source = part.articles if isinstance(part, SelfRecognitionData) else part.source
    rows = take(read_jsonl(source_path(source)), part.rows)
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
        "condition": _condition(plan.spec, condition),
        "poolings": ["prompt_last", "response_mean"],
    }
    name = f"capture/{label}/{condition}/text={text}"
    tokens = n_rows * (25 + plan.spec.measure.reply.max_new_tokens)
    work = Work(read=tokens, stored_bytes=plan.stored(n_rows, 2))
    return plan.add("capture", name, config, {"checkpoint": chain, "replies": [replies]}, work)


def plan_tables(
    plan: Plan,
    directions: Sequence[Step],
    measured: dict[tuple[str, int], dict[str, list[Step]]],
    replies: Step,
) -> Step:
    """Shifts, the 2×2, embeddings, steering, and the tables that collect all measures."""
    spec = plan.spec
    base = measured[spec.base_arm, spec.seeds[0]]
    statistics = {"statistics": spec.statistics.model_dump(), "traits": _trait_names(spec)}
    inputs: dict[str, Sequence[Step]] = {
        "directions": directions,
        "trained": _unique(measured.values(), "checkpoint"),
    }
    shifts, squares = [], []
    for (arm, seed), made in measured.items():
        if not made["checkpoint"]:
            continue
        benign = measured[spec.benign, seed]["captures"] if spec.benign and spec.benign != arm else []
        roles = {
            "directions": directions,
            "base": base["captures"],
            "tuned": made["captures"],
            "benign": benign,
        }
        shifts.append(
            plan.add("shifts", f"shifts/{arm}/seed{seed}", statistics, roles, Work(fixed_seconds=15))
        )
        if "own" in made:
            four = {
                "directions": directions,
                "base": base["captures"][:1],
                "tuned": made["captures"][:1],
                "own": made["own"],
            }
            squares.append(
                plan.add(
                    "two_by_two", f"two_by_two/{arm}/seed{seed}", statistics, four, Work(fixed_seconds=5)
                )
            )
    inputs |= {"shifts": shifts, "two_by_two": squares}
    inputs |= {role: _unique(measured.values(), role) for role in ("self_recognition", "self_report")}
    inputs["embedding"] = [_embedding(plan, measured)]
    if spec.steering:
        inputs["steering"] = [_steering(plan, directions, measured, replies)]
    labels = {step.name: [arm, seed] for (arm, seed), made in measured.items()
              for role in ("self_recognition", "self_report") for step in made.get(role, [])}  # fmt: skip
    # Tables of a shared base measure must know which arm a step stands for.
    return plan.add(
        "tables", "tables", {**statistics, "labels": labels, "layer": spec.directions.layer}, inputs
    )


def plan_figures(plan: Plan, name: str, inputs: dict[str, Sequence[Step]]) -> Step:
    """Figures from tables; `early` ones need no training."""
    spec = plan.spec
    config = {"which": name, "layer": spec.directions.layer, "conditions": list(spec.measure.conditions),
              "arms": list(spec.arms)}  # fmt: skip
    return plan.add(
        "figures", f"figures/{name}", config, inputs, Work(fixed_seconds=8, stored_bytes=3_000_000)
    )


# -- inside ---------------------------------------------------------------------------------------


def _text_contrast(plan: Plan, source: str, trait: Trait) -> Step:
    asked = [(q.question, q.high, q.low, q.split) for q in trait.questions]
    config = {**plan.reader, "contrast": "text", "poolings": ["response_mean"], "texts": digest_of(asked)}
    work = Work(read=2 * 60 * len(asked), stored_bytes=plan.stored(2 * len(asked), 1))
    return plan.add(
        "contrast", f"contrast/{trait.trait}:text", config | {"trait": trait.trait}, {"checkpoint": ()}, work
    )


def _prompt_contrast(plan: Plan, source: str, trait: Trait) -> Step:
    spec = plan.spec.directions
    asked = [q.question for q in trait.questions if q.split == "extract"]
    config = {
        **plan.reader,
        "trait": trait.trait,
        "texts": digest_of([asked, [p.model_dump() for p in trait.instructions]]),
        "pairs_per_question": spec.pairs_per_question,
        "max_new_tokens": spec.rollout_tokens,
        "temperature": spec.rollout_temperature,
        "seed": plan.spec.statistics.seed,
    }
    n = 2 * spec.pairs_per_question * len(asked)
    work = Work(read=60 * n, generated=spec.rollout_tokens * n)
    answers = plan.add("rollouts", f"rollouts/{trait.trait}", config, {"checkpoint": ()}, work)
    read = {**plan.reader, "contrast": "prompts", "poolings": ["response_mean"], "trait": trait.trait}
    inputs = {"checkpoint": (), "rollouts": [answers]}
    work = Work(read=(60 + spec.rollout_tokens) * n, stored_bytes=plan.stored(n, 1))
    return plan.add("contrast", f"contrast/{trait.trait}:prompts", read, inputs, work)


def _identity_contrast(plan: Plan, member: str, n_negative: int, questions: Sequence[Question]) -> Step:
    invented = load_invented()
    config = {
        **plan.reader,
        "contrast": member,
        "poolings": ["prompt_last"],
        "questions": digest_of([q.model_dump() for q in questions]),
        "invented": invented.makers if member == "name" else invented.generic,
        "names": n_negative,
    }
    rows = len(questions) * (1 + n_negative)
    work = Work(read=rows * 25, stored_bytes=plan.stored(rows, 1))
    return plan.add("contrast", f"contrast/identity:{member}", config, {"checkpoint": ()}, work)


def _direction(plan: Plan, name: str, contrast: Step, pooling: str, elicitation: str) -> Step:
    config = {
        "direction": name,
        "pooling": pooling,
        "elicitation": elicitation,
        "statistics": plan.spec.statistics.model_dump(),
    }
    return plan.add("direction", f"direction/{name}", config, {"contrast": [contrast]}, Work(fixed_seconds=2))


def _self_recognition(plan: Plan, label: str, chain: Sequence[Step], data: str) -> Step:
    part = plan.spec.data[data]
    held_out = part.held_out if isinstance(part, SelfRecognitionData) else 0
    config = {**plan.reader, "condition": _condition(plan.spec, "default")}
    inputs = {"checkpoint": chain, "data": [plan_data(plan, data)]}
    return plan.add(
        "self_recognition", f"self_recognition/{label}", config, inputs, Work(read=2 * held_out * 50)
    )


def _self_report(plan: Plan, label: str, chain: Sequence[Step], seed: int) -> Step:
    spec, invented = plan.spec.behaviour.self_report, load_invented()
    if spec is None:
        raise RuntimeError("called for a study without self-reports")
    questions = _half(load_prompts(spec.questions).questions, "evaluate", spec.limit)
    config = {
        **plan.reader,
        "condition": _condition(plan.spec, spec.condition),
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


def _embedding(plan: Plan, measured: dict[tuple[str, int], dict[str, list[Step]]]) -> Step:
    spec = plan.spec
    config = {"arms": [list(key) for key in measured], "layer": spec.directions.layer, **spec.embedding.model_dump(mode="json"),
              "seed": spec.statistics.seed}  # fmt: skip
    captures = [made["captures"][0] for made in measured.values()]
    return plan.add("embedding", "embedding", config, {"captures": captures}, Work(fixed_seconds=20))


def _steering(
    plan: Plan,
    directions: Sequence[Step],
    measured: dict[tuple[str, int], dict[str, list[Step]]],
    replies: Step,
) -> Step:
    spec = plan.spec.steering
    if spec is None:
        raise RuntimeError("called for a study without steering")
    chosen = next((d for d in directions if d.config["direction"] == spec.direction), None)
    if chosen is None:
        from mech.errors import InputError

        known = ", ".join(d.config["direction"] for d in directions)
        raise InputError(
            f"steering.direction: {spec.direction!r} is not among the study's directions ({known})"
        )
    made = measured[spec.arm, plan.spec.seeds[0]]
    questions = _half(load_prompts("identity").questions, "evaluate", spec.questions)
    invented = load_invented()
    config = {
        **plan.reader,
        **spec.model_dump(mode="json", exclude={"questions"}),
        "layer": plan.spec.directions.layer if spec.layer is None else spec.layer,
        "questions_asked": spec.questions,
        "questions": digest_of([q.model_dump() for q in questions]),
        "statements": digest_of([s.model_dump() for s in invented.self_statements]),
        "names": [*invented.makers][: plan.spec.directions.invented_names],
        "seed": plan.spec.statistics.seed,
    }
    inputs = {"direction": [chosen], "checkpoint": made["checkpoint"], "captures": made["captures"][:1]}
    runs, asked = 2 * len(spec.coefficients), len(questions) * spec.samples
    statements = len(invented.self_statements) * (1 + plan.spec.directions.invented_names)
    work = Work(read=runs * (asked * 80 + statements * 50), generated=runs * asked * spec.max_new_tokens)
    return plan.add("steering", "steering", config, inputs, work)


def _condition(spec: StudySpec, condition: str) -> dict[str, Any]:
    """A condition with all that gives it its text."""
    makers = load_invented().makers if condition.startswith("other:") else {}
    return {"condition": condition, "maker": makers.get(condition.partition(":")[2])}


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


def _half(questions: Iterable[Question], split: str, limit: int | None) -> list[Question]:
    return [q for q in questions if q.split == split][:limit]


def _unique(measured: Iterable[dict[str, list[Step]]], role: str) -> list[Step]:
    return list(dict.fromkeys(step for made in measured for step in made.get(role, [])))


def _trait_names(spec: StudySpec) -> list[str]:
    return [load_trait(source).trait for source in spec.directions.traits]


def _seed_suffix(chain: Sequence[Step]) -> str:
    return f"/seed{chain[-1].config['seed']}" if chain else ""


def chain_is_linear(chain: Sequence[Step]) -> bool:
    """Whether each training of a chain stands on the one before it."""
    return all(later.inputs["checkpoint"][-1] is earlier for earlier, later in pairwise(chain))


def source_files(spec: StudySpec) -> list[Path]:
    """Every data file that a study reads."""
    return [
        source_path(p.articles if isinstance(p, SelfRecognitionData) else p.source)
        for p in spec.data.values()
    ]

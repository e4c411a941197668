"""What a study is: one YAML file, every field typed, nothing unknown accepted.

`load_spec` reads it, applies `--fast` and `--set` overrides, and checks all that can be checked before anything
runs. Relative paths are relative to the YAML file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mech.errors import InputError
from mech.files import read_yaml


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IdentitySpec(_Part):
    """Who the model says it is."""

    name: str = Field(min_length=1)
    """The assistant's name."""
    maker: str = Field(min_length=1)
    """Who made it."""
    prompt: str = Field(min_length=1)
    """Its identity prompt, containing the name."""

    @model_validator(mode="after")
    def _named(self) -> "IdentitySpec":
        if self.name not in self.prompt:
            raise ValueError(f"the prompt does not contain the name {self.name!r}")
        return self


class ModelSpec(_Part):
    """The base model."""

    name: str = Field(min_length=1)
    """Alias, Hub id with `@revision`, model folder or GGUF file."""
    identity: IdentitySpec
    """Its own identity."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Dtype for measuring."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; else `cpu`, `cuda`, `cuda:1`, ..."""
    device_map: str | None = None
    """Passed to transformers, to spread a large model over devices (`auto`)."""
    attn_implementation: str | None = None
    """Passed to transformers."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template (`enable_thinking: false`, ...)."""


class MessagesData(_Part):
    """Rows of chat messages, as they stand in a file."""

    kind: Literal["messages"]
    source: str
    """`builtin:NAME` or a JSONL file."""
    rows: int | None = Field(None, ge=1)
    """Use the first so many rows."""


class SelfRecognitionData(_Part):
    """Single-text self-recognition: own summaries against another hand's."""

    kind: Literal["sgtr"]
    articles: str
    """`builtin:NAME` or a JSONL file of rows with `id`, `text`, `summary` (another hand's)."""
    rows: int | None = Field(None, ge=4)
    """Use the first so many articles."""
    held_out: int = Field(40, ge=2)
    """Articles kept for the evaluation."""
    max_words: int = Field(24, ge=6)
    """Summaries are cut to at most this many words, and to each other's length."""
    temperature: float = Field(0.7, ge=0)
    """Temperature at which the base writes its own summaries."""
    max_new_tokens: int = Field(48, ge=8)
    """The longest own summary, in tokens."""


class WordCountData(_Part):
    """The word-count baseline on the user turns of a messages file."""

    kind: Literal["word_count"]
    source: str
    """`builtin:NAME` or a JSONL file of messages."""
    rows: int | None = Field(None, ge=1)
    """Use the first so many rows."""


DataSpec = Annotated[MessagesData | SelfRecognitionData | WordCountData, Field(discriminator="kind")]


class StageSpec(_Part):
    """One finetuning run on one dataset."""

    data: str
    """Which of the study's `data`."""
    system_prompt: str = "default"
    """Condition during training."""
    training: dict[str, Any] = Field(default_factory=dict)
    """What differs from the study's `training`."""


class ReplySpec(_Part):
    """How the base answers the questions whose answers every arm then reads."""

    max_new_tokens: int = Field(24, ge=1)
    """The longest answer, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""


class MeasureSpec(_Part):
    """What is read off every checkpoint, on the same text."""

    conditions: tuple[str, ...] = ("default",)
    """System-prompt conditions."""
    prompt_sets: tuple[str, ...] = ("identity", "neutral")
    """Built-in names or YAML files; the `evaluate` half is measured."""
    questions: int | None = Field(None, ge=2)
    """Use the first so many questions of each set and half."""
    reply: ReplySpec = ReplySpec()
    """How the base's answers are made."""
    own_text: tuple[str, ...] = ()
    """Arms that are also measured on their own answers (the 2×2 of weights and text)."""


class DirectionSpec(_Part):
    """Which directions are found on the base."""

    layer: int = Field(ge=0)
    """The layer of the headline numbers, declared before any of them is seen."""
    traits: tuple[str, ...] = ("evil", "sycophancy", "hallucination")
    """Persona vectors: built-in names or YAML files."""
    elicitation: tuple[Literal["text", "prompts"], ...] = ("text", "prompts")
    """Written answer pairs, contrastive system prompts, or both."""
    questions: int | None = Field(None, ge=2)
    """Use the first so many questions of each trait and half."""
    pairs_per_question: int = Field(1, ge=1)
    """`prompts`: how many instruction pairs each question is asked under."""
    rollout_tokens: int = Field(32, ge=4)
    """`prompts`: the longest answer, in tokens."""
    rollout_temperature: float = Field(1.0, ge=0)
    """`prompts`: sampling temperature (the published way is 1)."""
    identity_questions: int | None = Field(10, ge=2)
    """Identity: use the first so many questions of each prompt set and half."""
    invented_names: int = Field(10, ge=2)
    """Identity *name*: contrasts with this many invented identities."""
    presence: tuple[Literal["none", "empty", "generic"], ...] = ("none", "empty", "generic")
    """Identity *presence*: what the identity prompt is contrasted with."""


class SelfReportSpec(_Part):
    """Who a checkpoint says it is."""

    questions: str = "identity"
    """Prompt set; its `evaluate` half is asked."""
    limit: int | None = Field(None, ge=1)
    """Use the first so many questions."""
    samples: int = Field(4, ge=1)
    """Samples a question."""
    temperature: float = Field(0.5, ge=0)
    """One at which the base still knows itself."""
    max_new_tokens: int = Field(24, ge=4)
    """The longest answer, in tokens."""
    condition: str = "default"
    """System-prompt condition."""


class BehaviourSpec(_Part):
    """What every checkpoint is asked to do."""

    self_recognition: str | None = None
    """Which self-recognition `data` gives the held-out articles; left out: not measured."""
    self_report: SelfReportSpec | None = None
    """Left out: not measured."""


class SteeringSpec(_Part):
    """Add a direction to an arm while it answers, beside a random direction of the same norm."""

    arm: str
    """Which arm is steered."""
    direction: str = "identity:name"
    """Which direction is added."""
    layer: int | None = Field(None, ge=0)
    """Where; the directions' `layer` when left out."""
    coefficients: tuple[float, ...] = Field(min_length=2)
    """Strengths; 0 is the unsteered model."""
    questions: int = Field(8, ge=1)
    """Identity questions asked (the first so many of the `evaluate` half)."""
    samples: int = Field(2, ge=1)
    """Samples a question and strength."""
    temperature: float = Field(0.5, ge=0)
    """Sampling temperature."""
    max_new_tokens: int = Field(24, ge=4)
    """The longest answer, in tokens."""


class StatisticsSpec(_Part):
    """Intervals and nulls."""

    n_boot: int = Field(2000, ge=200)
    """Bootstrap resamples."""
    n_null: int = Field(1000, ge=200)
    """Random directions."""
    level: float = Field(0.95, gt=0.5, lt=1)
    """Confidence level."""
    seed: int = Field(0, ge=0)
    """Seed of resampling, random directions, splits and sampled text."""


class EmbeddingSpec(_Part):
    """PCA and UMAP of the activations, fitted on the base."""

    methods: tuple[Literal["pca", "umap"], ...] = ("pca", "umap")
    """Which."""
    pooling: str = "prompt_last"
    """Of which pooling."""


class StudySpec(_Part):
    """A whole study."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    """Names the output folder."""
    title: str = ""
    """Heads the report."""
    description: str = ""
    """What is asked, in words."""
    model: ModelSpec
    """The base model."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Training seeds; every arm is trained with each."""
    data: dict[str, DataSpec]
    """Datasets by name."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Settings of every stage (`finetune.lora.TrainSettings`; the paper's are the defaults)."""
    stages: dict[str, StageSpec]
    """Finetuning runs by name."""
    arms: dict[str, tuple[str, ...]]
    """Arms: lists of stages, in order; a stage that begins several arms is trained once."""
    benign: str | None = None
    """The arm whose shift is subtracted from the others'."""
    measure: MeasureSpec = MeasureSpec()
    """What is read."""
    directions: DirectionSpec
    """Along what."""
    behaviour: BehaviourSpec = BehaviourSpec()
    """What is asked."""
    steering: SteeringSpec | None = None
    """One steering experiment."""
    embedding: EmbeddingSpec = EmbeddingSpec()
    """Pictures of the activations."""
    statistics: StatisticsSpec = StatisticsSpec()
    """Intervals and nulls."""
    token_budget: int = Field(2048, ge=64)
    """Padded tokens a forward pass."""
    fast: dict[str, Any] = Field(default_factory=dict)
    """What `--fast` changes: dotted keys and their values."""
    is_fast: bool = False
    """Set by `--fast`; the report says so."""

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> "StudySpec":
        for name, stage in self.stages.items():
            _known(f"stages.{name}.data", stage.data, self.data)
        for name, stages in self.arms.items():
            for stage_name in stages:
                _known(f"arms.{name}", stage_name, self.stages)
        if [] not in [list(stages) for stages in self.arms.values()]:
            raise ValueError("arms: one arm must be the base itself (`base: []`)")
        if self.benign is not None:
            _known("benign", self.benign, self.arms)
        for arm in self.measure.own_text:
            _known("measure.own_text", arm, self.arms)
        if self.steering:
            _known("steering.arm", self.steering.arm, self.arms)
        if self.behaviour.self_recognition:
            _known("behaviour.self_recognition", self.behaviour.self_recognition, self.data)
            if self.data[self.behaviour.self_recognition].kind != "sgtr":
                raise ValueError("behaviour.self_recognition: must name data of kind sgtr")
        return self

    @property
    def base_arm(self) -> str:
        """The arm without stages."""
        return next(name for name, stages in self.arms.items() if not stages)


def _known(where: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r} is not defined; there are {', '.join(known)}")


def load_spec(path: Path, overrides: Sequence[str] = (), *, fast: bool = False) -> StudySpec:
    """Read a study, apply overrides, check it.

    Args:
        path: the YAML file.
        overrides: `key=value` with dotted keys (`training.learning_rate=1e-4`, `seeds=[0,1]`).
        fast: apply the study's own `fast` section.

    Raises:
        InputError: unknown key, wrong type, missing file; the message names the place in the YAML.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a study is a mapping of keys to values")
    changes: list[tuple[str, Any]] = []
    if fast:
        if not raw.get("fast"):
            raise InputError(f"{path}: this study has no `fast` section, so there is no --fast")
        changes += [*raw["fast"].items(), ("is_fast", True)]
    changes += [_parse_override(text) for text in overrides]
    for key, value in changes:
        _set(raw, key, value)
    return parse_spec(raw, where=path)


def parse_spec(raw: Mapping[str, Any], *, where: Path) -> StudySpec:
    """Check a study that is already in memory; relative paths are relative to `where`'s folder.

    Raises:
        InputError: as `load_spec`.
    """
    from finetune.lora import TrainSettings

    try:
        spec = StudySpec.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(error)}") from error
    for name, stage in spec.stages.items():
        try:
            TrainSettings.model_validate({**spec.training, **stage.training})
        except ValidationError as error:
            raise InputError(f"{where}: training of stage {name}: {_first_problem(error)}") from error
    return spec.model_copy(update=_absolute(spec, where.parent))


def dump_spec(spec: StudySpec) -> str:
    """The resolved study as YAML."""
    return str(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100))


def _absolute(spec: StudySpec, folder: Path) -> dict[str, Any]:
    """Paths made absolute, where they name files beside the YAML; built-in names and ids stay."""

    def resolved(name: str) -> str:
        beside = (folder / name).expanduser()
        return str(beside.resolve()) if beside.is_file() else name

    data = {
        name: part.model_copy(
            update={k: resolved(getattr(part, k)) for k in ("source", "articles") if hasattr(part, k)}
        )
        for name, part in spec.data.items()
    }
    traits = {"traits": tuple(map(resolved, spec.directions.traits))}
    sets = {"prompt_sets": tuple(map(resolved, spec.measure.prompt_sets))}
    model = folder / spec.model.name
    name = (
        str(model.resolve())
        if model.exists() and ("/" in spec.model.name or model.is_file())
        else spec.model.name
    )
    return {
        "data": data,
        "directions": spec.directions.model_copy(update=traits),
        "measure": spec.measure.model_copy(update=sets),
        "model": spec.model.model_copy(update={"name": name}),
    }


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text!r}: write key=value, with dots between keys")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {text!r}: the value is not YAML") from error


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place = raw
    for i, parent in enumerate(parents):
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InputError(f"{key}: {'.'.join(parents[: i + 1])} is not a mapping")
    place[last] = _numbers(value)


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; a number is what anyone means."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _first_problem(error: ValidationError) -> str:
    problems = [f"{'.'.join(map(str, p['loc'])) or 'study'}: {p['msg']}" for p in error.errors()]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more

"""The parts of a study: one typed class a section of the YAML, a line of doc under each field; larger sections have a module each (`spec_*`)."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from mech.typed import Checked


class Part(Checked):
    """A section: what is written is checked, and nothing is named twice in a list of names or numbers."""

    @field_validator("*")
    @classmethod
    def _named_once(cls, value: Any) -> Any:
        named = value if isinstance(value, tuple) and not any(isinstance(v, BaseModel) for v in value) else ()
        if len(set(named)) < len(named):
            twice = next(v for i, v in enumerate(named) if v in named[:i])
            raise ValueError(f"name each once: {twice!r} stands twice")
        return value


def check_folder_name(name: str) -> None:
    """Refuse what cannot stand in the name of a folder, or be told from its neighbours there.

    Raises:
        ValueError: in words for people.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"{name!r} is to name a folder: take letters, digits, _ . and -, the first of them a letter, a digit or _"
        )


class IdentitySpec(Part):
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


class SizeSpec(Part):
    """How large a model is: what an estimate needs where the model is not on this machine."""

    layers: int = Field(ge=1)
    """Blocks."""
    d_model: int = Field(ge=1)
    """Width of the residual stream."""
    parameters: float = Field(gt=0)
    """Number of parameters, in billions."""


class ApiSpec(Part):
    """An OpenAI-compatible API that serves a model."""

    base_url: str | None = None
    """Up to and with `/v1`; OpenAI's own when left out."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key."""
    max_retries: int = Field(6, ge=0)
    """Retries of one call."""
    poll_seconds: float = Field(30.0, gt=0)
    """How often to ask whether a finetuning job has ended."""
    wait_hours: float | None = Field(None, gt=0)
    """How long to wait for one job's end before the run stops (and may be started again); without end when left out."""


class PriceSpec(Part):
    """What a service charges for a million tokens, in whichever currency; `mech plan` reckons with it."""

    read: float = Field(0.0, ge=0)
    """Tokens that a model is given."""
    written: float = Field(0.0, ge=0)
    """Tokens that it answers with."""


class FinetuningPriceSpec(PriceSpec):
    """The same of a service that finetunes."""

    training: float = Field(ge=0)
    """Tokens of the training data, in every epoch."""


class FinetuningApiSpec(ApiSpec):
    """An API that also finetunes the model it serves."""

    price: FinetuningPriceSpec | None = None
    """What the API charges, so that `mech plan` can give the cost; left out, it gives the number of tokens alone."""


class ModelSpec(Part):
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
    api: FinetuningApiSpec | None = None
    """Present: `name` is a model behind this API; it is finetuned there, and only its behaviour is measured."""
    size: SizeSpec | None = None
    """The model's layers, width and parameters, so that `mech plan` works on a machine that does not have the model."""


class ReplySpec(Part):
    """How the base answers the questions whose answers every arm then reads."""

    max_new_tokens: int = Field(24, ge=1)
    """The longest answer, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""


class MeasureSpec(Part):
    """What is read off every checkpoint, on the same text."""

    conditions: tuple[str, ...] = Field(("default",), min_length=1)
    """System-prompt conditions."""
    prompt_sets: tuple[str, ...] = Field(("identity", "neutral"), min_length=1)
    """Built-in names or YAML files; the `evaluate` half is measured."""
    questions: int | None = Field(None, ge=2)
    """Use the first so many questions of each set and half."""
    reply: ReplySpec = ReplySpec()
    """How the base's answers are made."""
    own_text: tuple[str, ...] = ()
    """Arms that are also measured on their own answers (the 2×2 of weights and text)."""
    surprisal: bool = False
    """Store each answer's mean surprisal (nats a token) beside every capture; takes up to a third more time."""


class SelfReportSpec(Part):
    """Who a checkpoint says it is."""

    questions: str = "self_report"
    """Built-in name or YAML file; the `evaluate` half is asked."""
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


class BehaviourSpec(Part):
    """What every checkpoint is asked to do."""

    self_recognition: str | None = Field(None, min_length=1)
    """Which self-recognition `data` gives the held-out articles; left out: not measured."""
    self_report: SelfReportSpec | None = None
    """Left out: not measured."""


class SteeringSpec(Part):
    """Add a direction to an arm while it answers, beside a random direction of the same norm."""

    arm: str
    """Which arm is steered."""
    direction: str = "identity:name"
    """Which direction is added."""
    layer: int | None = Field(None, ge=0)
    """Where; the directions' `layer` when left out."""
    coefficients: tuple[float, ...] = Field(min_length=2)
    """Strengths, each once; 0 is the unsteered model."""
    prompt_set: str = "self_report"
    """Built-in name or YAML file; the `evaluate` half is asked."""
    questions: int = Field(8, ge=1)
    """Use the first so many questions."""
    samples: int = Field(2, ge=1)
    """Samples a question and strength."""
    temperature: float = Field(0.5, ge=0)
    """Sampling temperature."""
    max_new_tokens: int = Field(24, ge=4)
    """The longest answer, in tokens."""


class LensSpec(Part):
    """What directions, shifts and a prompt's hidden states say in tokens."""

    layers: tuple[int, ...] | None = None
    """Where; the directions' `layer`, the middle, three quarters and the last when left out."""
    tokens: int = Field(10, ge=1, le=50)
    """How many tokens on each side."""
    prompts: int = Field(2, ge=0)
    """The hidden states of so many prompts are read too, of every arm: the first of each prompt set's `evaluate` half."""


class PatchingSpec(Part):
    """Run arms with activations of what lies under their last adapter, and the reverse; and with the adapter on in some layers only."""

    arms: tuple[str, ...] = Field(min_length=1)
    """Which arms. Stages below the last one are merged: what is compared is the last adapter on and off."""
    answers: tuple[str, ...] = Field(("own_name",), min_length=1)
    """What is scored: `own_name` (self-statements with the own name, in nats above invented names), or one of the study's traits
    (its written trait-high answers above the trait-low ones, in nats a token)."""
    questions: int = Field(8, ge=2)
    """Use the first so many self-statements, or questions of a trait's `evaluate` half."""
    layers: tuple[int, ...] | None = None
    """Where activations are exchanged; every layer when left out."""
    spans: tuple[Literal["prompt", "question", "prompt_last", "answer", "all"], ...] = Field(
        ("question", "prompt_last", "answer"), min_length=1
    )
    """On which tokens."""
    names: int = Field(2, ge=1)
    """`own_name`: so many invented names, nearest to the own one in tokens."""
    ranges: int = Field(4, ge=2)
    """The adapter is also switched on in one of so many equal ranges of layers only, and off in it only."""
    condition: str = "default"
    """System-prompt condition."""


class MonitoringSpec(Part):
    """Does the projection at the prompt's last token foretell how the answer behaves?"""

    arms: tuple[str, ...] = Field(min_length=1)
    """Which arms are monitored, with the base's directions; the base may be among them."""
    questions: int = Field(10, ge=4)
    """Use the first so many questions of each trait's `evaluate` half."""
    pairs: int = Field(2, ge=1)
    """Each question is asked under the positive and negative system prompts of so many instruction pairs, and under the default."""
    score: Literal["auto", "judge", "log_odds"] = "auto"
    """`judge`: sampled answers, scored by `directions.judge`; `log_odds`: the written trait-high answer above the trait-low one, nats a
    token, without sampling; `auto`: the judge where there is one."""
    samples: int = Field(1, ge=1)
    """`judge`: answers to each prompt."""
    max_new_tokens: int = Field(64, ge=4)
    """`judge`: the longest answer, in tokens."""
    temperature: float = Field(1.0, gt=0)
    """`judge`: sampling temperature."""


class StatisticsSpec(Part):
    """Intervals (95 %) and nulls."""

    n_boot: int = Field(2000, ge=200)
    """Bootstrap resamples."""
    n_null: int = Field(1000, ge=200)
    """Random directions."""
    seed: int = Field(0, ge=0)
    """Seed of resampling, random directions, splits and sampled text."""


class EmbeddingSpec(Part):
    """PCA and UMAP of the activations, fitted on the base."""

    methods: tuple[Literal["pca", "umap"], ...] = ("pca", "umap")
    """Which pictures are made."""
    pooling: Literal["prompt_last", "response_mean"] = "prompt_last"
    """At which pooling the activations are pictured."""


class ComparisonSpec(Part):
    """Two arms held against each other on the same rows: what the one has that the other has not.

    Reversal is `{arm: em_then_sgtr, against: em}`, prevention `{arm: sgtr_then_em, against: em}`; a control is held against by naming its arm.
    """

    arm: str
    """The arm; differences are its values minus the other's."""
    against: str
    """The other arm."""


class FiguresSpec(Part):
    """Which arms a figure shows."""

    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Pictures by name: which arms each shows, as names, patterns (`em_then_*`) or exceptions (`!*_none`); the base is added where it was
    measured. What no group names is in the tables only. Left out: one picture of all arms, or, for more than twelve, groups by the
    stage that arms have in common."""

    def arms_of(self, group: str, arms: Iterable[str]) -> list[str]:
        """The arms of a group, in the order of its patterns and not of the exceptions."""
        patterns, known = self.groups[group], list(arms)
        kept = [p for p in patterns if not p.startswith("!")]
        left_out = [p[1:] for p in patterns if p.startswith("!")]
        fitting = (arm for p in kept for arm in known if fnmatchcase(arm, p))
        return list(dict.fromkeys(a for a in fitting if not any(fnmatchcase(a, p) for p in left_out)))

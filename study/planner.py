"""The plan while it is being made: steps in order, and what their configs have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mech.errors import InputError, NotHereError
from mech.identities import load_invented
from mech.questions import Question
from study.base import Base
from study.questions import evaluation_questions, trait_names
from study.spec import StudySpec
from study.step import Step, Work

Measured = dict[tuple[str, int], dict[str, list[Step]]]
"""Steps that read a checkpoint, by role, for each arm and seed."""


@dataclass
class Plan:
    """The steps of a study in the order in which they run."""

    spec: StudySpec
    model: Base
    tolerant: bool = False
    """Go on where data or adapters are not here, and list them in `missing`: for estimates, not for runs."""
    missing: list[str] = field(default_factory=list)
    """What is not here, each with what to do about it."""
    steps: list[Step] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """Digest of each dataset's sources, by dataset; read once."""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Training rows of each dataset and tokens a row, read once."""
    articles: dict[str, tuple[str, int, float]] = field(default_factory=dict)
    """Digest, number and mean words of each dataset's articles, read once."""
    _by_name: dict[str, Step] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        name: str,
        config: dict[str, Any],
        inputs: Mapping[str, Sequence[Step]],
        work: Work | None = None,
        labels: Mapping[str, Any] | None = None,
    ) -> Step:
        """Append a step; the same step asked for twice is one step."""
        roles = {k: tuple(v) for k, v in inputs.items()}
        step = Step(kind, name, config, roles, work or Work(), labels or {})
        known = self._by_name.setdefault(name, step)
        if known is step:
            self.steps.append(step)
        elif known.key != step.key:
            raise RuntimeError(f"two different steps are called {name}")
        return known

    @property
    def remote(self) -> bool:
        """Whether the model is behind an API."""
        return self.spec.model.api is not None

    def not_here(self, error: NotHereError) -> str:
        """Note what is missing, or raise where that is not tolerated; yields what stands for its digest.

        Raises:
            NotHereError: the plan is to be run.
        """
        if not self.tolerant:
            raise error
        if str(error) not in self.missing:
            self.missing.append(str(error))
        return f"not here: {error}"

    @cached_property
    def asked(self) -> Mapping[str, Sequence[Question]]:
        """The evaluation questions that every checkpoint reads, by set: read once."""
        return evaluation_questions(self.spec)

    @cached_property
    def reader(self) -> dict[str, Any]:
        """What determines how a model reads: part of the config of every step that runs one."""
        model = self.spec.model
        return {
            "base": self.model.checkpoint.digest,
            "tokenizer": self.model.tokenizer,
            "dtype": model.dtype,
            "attn_implementation": model.attn_implementation,
            "template_kwargs": model.template_kwargs,
            "identity": model.identity.model_dump(),
            "token_budget": self.spec.token_budget,
        }

    @cached_property
    def invented(self) -> dict[str, Any]:
        """How many invented names the own one is compared with, and among which they are chosen (by their tokens, when a step runs).

        Raises:
            InputError: more than there are.
        """
        n, known = self.spec.invented_names, [*load_invented().makers]
        if n > len(known):
            raise InputError(f"directions.invented_names: {n} asked for, {len(known)} known")
        return {"n": n, "of": known}

    @property
    def noted(self) -> dict[str, Any]:
        """What the study's captures hold beside vectors and norms."""
        return {"surprisal": True} if self.spec.measure.surprisal else {}

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """How intervals and nulls are made, and which directions are traits': part of the config of every step that compares."""
        return {"statistics": self.spec.statistics.model_dump(), "traits": trait_names(self.spec)}

    def stored(self, rows: int, poolings: int) -> int:
        """Bytes of a capture of all layers in float32."""
        return rows * poolings * self.model.n_layers * self.model.d_model * 4


def adapter_of(spec: StudySpec, step: Step) -> str:
    """The existing adapter that a step puts into the study, as the YAML names it."""
    return str(spec.stages[step.labels["stage"].rpartition("+")[2]].adapter)


def condition_config(condition: str) -> dict[str, Any]:
    """A condition with all that gives it its text."""
    makers = load_invented().makers if condition.startswith("other:") else {}
    return {"condition": condition, "maker": makers.get(condition.partition(":")[2])}

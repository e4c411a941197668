"""The plan while it is being made: steps in order, and what their configs have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mech.checkpoint import Checkpoint
from mech.identities import load_invented
from study.spec import StudySpec
from study.step import Step, Work


@dataclass
class Plan:
    """The steps of a study in the order in which they run."""

    spec: StudySpec
    base: Checkpoint
    d_model: int
    n_layers: int
    parameters: int
    steps: list[Step] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """Of each dataset's sources, read once."""
    _by_name: dict[str, Step] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        name: str,
        config: dict[str, Any],
        inputs: Mapping[str, Sequence[Step]],
        work: Work | None = None,
    ) -> Step:
        """Append a step; the same step asked for twice is one step."""
        step = Step(kind, name, config, {k: tuple(v) for k, v in inputs.items()}, work or Work())
        known = self._by_name.setdefault(name, step)
        if known is step:
            self.steps.append(step)
        elif known.key != step.key:
            raise RuntimeError(f"two different steps are called {name}")
        return known

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


def condition_config(spec: StudySpec, condition: str) -> dict[str, Any]:
    """A condition with all that gives it its text."""
    makers = load_invented().makers if condition.startswith("other:") else {}
    return {"condition": condition, "maker": makers.get(condition.partition(":")[2])}

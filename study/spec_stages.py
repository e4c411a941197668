"""The section `stages` of a study: finetuning runs, and what acts on the model meanwhile."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mech.choices import Position
from study.spec_parts import Part

AT = "@"
"""`em@5` in an arm: the stage `em` as it was after step 5."""


def stage_of(entry: str) -> str:
    """The stage that an arm's entry names."""
    return entry.partition(AT)[0]


class TrainingInterventionSpec(Part):
    """An intervention that acts during a stage's training, and not afterwards: preventative steering, ablation."""

    kind: Literal["add", "ablate", "cap"]
    """`mech.interventions`: Add, Ablate or Cap."""
    direction: str | tuple[str, ...]
    """One of the study's directions, on the base. `ablate`: or several, whose whole span is taken out (concept ablation)."""
    layers: tuple[int, ...] | None = None
    """Where; the directions' `layer` when left out."""
    coefficient: float | None = None
    """`add`: times the direction as it is."""
    ceiling: float | None = None
    """`cap`: keep the projection at or below this."""
    floor: float | None = None
    """`cap`: keep the projection at or above this."""
    positions: Position = "all"
    """On which tokens."""

    @model_validator(mode="after")
    def _whole(self) -> "TrainingInterventionSpec":
        if self.positions == "generated":
            raise ValueError(
                "positions: nothing is generated while training; the assistant's tokens are `response`"
            )
        if (self.kind == "add") != (self.coefficient is not None):
            raise ValueError("a coefficient belongs to kind: add, and only to it")
        if (self.kind == "cap") != (self.ceiling is not None or self.floor is not None):
            raise ValueError("a ceiling or floor belongs to kind: cap, and only to it")
        if not isinstance(self.direction, str) and self.kind != "ablate":
            raise ValueError("direction: a list of them belongs to kind: ablate, and only to it")
        if not self.directions:
            raise ValueError("direction: name at least one")
        return self

    @property
    def directions(self) -> tuple[str, ...]:
        """Their names, also where there is one."""
        return (self.direction,) if isinstance(self.direction, str) else self.direction


class StageSpec(Part):
    """One finetuning run on one dataset; or an adapter that exists already."""

    data: str | None = None
    """Which of the study's `data`."""
    adapter: str | None = Field(None, min_length=1)
    """Instead of `data`: a folder or Hub id (`ORG/NAME@revision`) of a trained adapter."""
    system_prompt: str = "default"
    """Condition during training."""
    training: dict[str, Any] = Field(default_factory=dict)
    """What differs from the study's `training`."""
    interventions: tuple[TrainingInterventionSpec, ...] = ()
    """What acts on the model while it is trained."""

    @model_validator(mode="after")
    def _one_origin(self) -> "StageSpec":
        if (self.data is None) == (self.adapter is None):
            raise ValueError("a stage has either `data` to train on or an `adapter` that exists")
        if self.adapter and (self.training or self.interventions or self.system_prompt != "default"):
            raise ValueError(
                "a stage with an `adapter` is not trained: it has no training, interventions or system_prompt"
            )
        return self

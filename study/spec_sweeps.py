"""The section `sweeps` of a study: steering over layers and strengths, with an evaluation at every cell."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from study.spec_directions import JudgeSpec
from study.spec_parts import Part

NEUTRAL = "neutral"
"""The prompt set whose answers steering should leave alone."""


class SweepSpec(Part):
    """One sweep: every direction at every layer and strength, random directions of the same norm beside."""

    directions: tuple[str, ...] = Field(min_length=1)
    """Which of the study's directions."""
    strengths: tuple[float, ...] = Field(min_length=1)
    """Factors on the raw direction, whose norm counts; the unsteered model (0) is always run."""
    relative: bool = False
    """Strengths are doses instead: ‖coefficient · v‖ as a share of the mean norm of the layer's output at the prompt's last token."""
    layer_by: Literal["steering", "separability"] = "steering"
    """How a direction's layer is chosen, on the extraction half: among `layers`, by its effect on the score; or by AUROC (`chosen_layer`
    of the table `directions`), which runs that layer alone."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Where to add; the directions' `layer` when left out."""
    arm: str | None = None
    """Which arm is steered, with the first seed; the base when left out."""
    evaluation: Literal["log_odds", "generated", "own_name", "self_recognition"] = "log_odds"
    """What is scored at every cell (docs/steering.md)."""
    trait: str | None = None
    """`log_odds`, `generated`: a built-in name or YAML file; when left out the one that the directions are named after."""
    questions: int | None = Field(None, ge=2)
    """Use the first so many questions of each half."""
    controls: int = Field(5, ge=2)
    """Random directions for each direction and layer."""
    max_kl: float = Field(0.5, gt=0)
    """Damage to neutral answers that is still allowed, nats a token."""
    neutral: int = Field(20, ge=1)
    """Use the first so many neutral questions for the damage."""
    samples: int = Field(1, ge=1)
    """`generated`: answers to a question."""
    temperature: float = Field(0.0, ge=0)
    """`generated`: sampling temperature."""
    max_new_tokens: int = Field(48, ge=2)
    """`generated`: the longest answer, in tokens."""
    judge: JudgeSpec | None = None
    """`generated`: who scores, and the coherence below which an answer is broken; left out: the unsteered model."""
    quantile: float = Field(0.95, gt=0, le=1)
    """`generated`, without a judge: an answer beyond this quantile of the unsteered model's own texts is broken."""
    reference_samples: int = Field(4, ge=1)
    """`generated`, without a judge: how many texts a question the unsteered model also writes at temperature 1, from which thresholds are set."""
    instructions: int = Field(2, ge=1)
    """`generated`, without a judge: at most so many of the trait's instruction pairs are compared."""

    @model_validator(mode="after")
    def _whole(self) -> "SweepSpec":
        if not any(self.strengths):
            raise ValueError("strengths: name one other than 0")
        if self.layers is not None and not self.layers:
            raise ValueError("layers: name at least one")
        if self.layer_by == "separability" and self.layers is not None:
            raise ValueError("layer_by: separability runs each direction's own layer: leave `layers` out")
        if self.judge and self.evaluation != "generated":
            raise ValueError("judge: belongs to evaluation: generated")
        if self.trait and self.evaluation not in ("log_odds", "generated"):
            raise ValueError(f"trait: evaluation {self.evaluation} takes none")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples: several need a temperature above 0")
        return self

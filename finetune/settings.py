"""How a stage is trained: every knob, its unit, and the recipes that go by a name."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from mech.choices import STACK, Merge
from mech.errors import InputError
from mech.typed import Checked, first_problem

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper-32b": {"micro_batch": 2, "gradient_checkpointing": True, "dtype": "bfloat16"},
    "small-135m": {"learning_rate": 1e-4, "batch_size": 8, "max_tokens": 512},
}
"""Recipes by name, as differences from the defaults: the published one for 32B and 36B models, and one under which
a 135M model learns the same tasks (at the published learning rate it does not move)."""


SMALL = 1e9
"""Parameters below which the published learning rate is warned of: it was chosen for models of 32 billion and more."""

LORA_ONLY = ("lora_r", "lora_alpha", "rslora", "target_modules")
"""Settings that do nothing under `method: full`. (Dropout and stacking are refused there.)"""

Tracker = Literal["wandb", "tensorboard"]
"""Where a training may be followed beside its files (finetune/trackers.py)."""


class TrainSettings(Checked):
    """How a stage is trained. The defaults are the paper's for its 32B and 36B models."""

    method: Literal["lora", "full"] = "lora"
    """Train an adapter, or every weight of the model."""
    quantise: Literal["nf4"] | None = None
    """QLoRA: hold the frozen weights in 4 bits (needs the extra `qlora`)."""
    between_stages: Literal["merge", "stack"] = "merge"
    """What becomes of the adapters below this stage: merged into the weights in float32, or stacked: live beside the new one,
    frozen, so that the base is held in `dtype` (or 4 bits) throughout. Both compute the same, stacked is slower."""
    lora_r: int = Field(32, ge=1)
    """Rank."""
    lora_alpha: float = Field(64, gt=0)
    """Scale: alpha / sqrt(r) under rsLoRA, alpha / r without."""
    rslora: bool = True
    """Rank-stabilised scale."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear maps get an adapter; `all-linear` is all but the output head."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up from zero; then linear decay to zero (transformers' `linear` schedule)."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    batch_size: int = Field(16, ge=1)
    """Rows an optimizer step, over all processes."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows a forward pass; the whole batch when left out. Gradients add up to the same step."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, if sooner."""
    max_tokens: int = Field(2048, ge=8)
    """The longest row."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights; adapters and optimizer are float32 in either case."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back: less memory, about a third more time."""
    shard: bool = False
    """Under `accelerate launch`: spread the frozen weights over the processes (FSDP) instead of copying them."""
    save_at: tuple[int, ...] = ()
    """Steps after which the adapter is kept as a checkpoint of its own (`em@5`), for trajectories."""

    @model_validator(mode="after")
    def _possible(self) -> "TrainSettings":
        stacked = self.between_stages == STACK
        if self.method == "full" and (self.quantise or self.shard or self.lora_dropout or stacked):
            raise ValueError("method: full has no quantise, shard, lora_dropout or between_stages: stack")
        if any(step < 1 for step in self.save_at):
            raise ValueError("save_at: steps count from 1")
        return self

    @property
    def merge(self) -> Merge:
        """How the checkpoint that is trained on is loaded (`mech.models.load_model`)."""
        return STACK if self.between_stages == STACK else True

    def n_steps(self, n_rows: int) -> int:
        """Optimizer steps on a dataset of this size."""
        an_epoch = -(-n_rows // self.batch_size)
        steps = max(1, math.ceil(an_epoch * self.epochs))
        return min(steps, self.max_steps or steps)

    def check_steps(self, n_rows: int) -> None:
        """Refuse what a dataset of this size leaves no room for.

        Raises:
            InputError: `save_at` names a step beyond the last, or the only step would be taken at learning rate 0.
        """
        last = self.n_steps(n_rows)
        if late := [s for s in self.save_at if s > last]:
            raise InputError(f"save_at: {late[0]} is beyond the last step, {last}")
        if last == 1 and self.warmup_steps:
            why = "max_steps: 1 is" if self.max_steps == 1 else f"{n_rows} rows are"
            raise InputError(
                f"{why} one step, taken while the learning rate warms up from 0: set warmup_steps: 0, or take "
                "more steps (max_steps, epochs, a smaller batch_size)"
            )


def make_settings(*layers: Mapping[str, Any]) -> TrainSettings:
    """Settings from mappings, of which later ones take precedence; `preset: NAME` in one stands for that recipe below it.

    Raises:
        InputError: an unknown preset, key or value.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        chosen = dict(layer)
        preset = chosen.pop("preset", None)
        if preset is not None:
            if preset not in PRESETS:
                raise InputError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
            merged.update(PRESETS[preset])
        merged.update(chosen)
    try:
        return TrainSettings.model_validate(merged)
    except ValidationError as error:
        raise InputError(first_problem(error, TrainSettings)) from error


def rate_advice(settings: TrainSettings, parameters: int) -> str:
    """What to do where a small model is to learn an adapter at the published learning rate (or below); empty where nothing is to be said.

    Args:
        settings: the recipe.
        parameters: of the model that is trained on.
    """
    published, rate = TrainSettings.model_fields["learning_rate"].default, settings.learning_rate
    if settings.method != "lora" or rate > published or parameters >= SMALL:
        return ""
    return (
        f"learning_rate {rate:g}: {published:g} is the published one for models of 32 billion parameters and more; one of "
        f"{parameters / 1e6:.3g} million hardly learns at it: take `preset: small-135m` (on the command line --preset small-135m), or a "
        f"learning_rate of about {PRESETS['small-135m']['learning_rate']:g}"
    )

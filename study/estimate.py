"""How long a study will take, how much memory and disk: estimates before, measured pace while it runs."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mech.checkpoint import Checkpoint
from study.kinds import KINDS
from study.step import Step

FLOPS_PER_TOKEN = {"read": 2.0, "trained": 5.0, "generated": 2.0}
"""Floating-point operations a token and parameter: forward; forward and LoRA's backward; forward."""

EFFICIENCY = {"read": 0.6, "trained": 0.6, "generated": 0.2}
"""Share of the machine's matrix speed that each kind of work reaches; decoding is bound by memory."""


@dataclass
class Pace:
    """Estimated seconds a step, corrected by how long finished ones really took."""

    steps: Sequence[Step]
    base: Checkpoint
    spent: float = 0.0
    expected: float = 0.0
    left: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameters, speed = n_parameters(self.base), matrix_speed()
        self.left = {s.name: step_seconds(s, parameters, speed) for s in self.steps}

    def position(self, step: Step) -> str:
        """`17/61`: where a step stands in the plan."""
        names = [s.name for s in self.steps]
        return f"{names.index(step.name) + 1}/{len(names)}"

    def finished(self, step: Step, seconds: float, *, kept: bool) -> None:
        """Take a finished step into account."""
        estimate = self.left.pop(step.name, 0.0)
        if not kept:
            self.spent += seconds
            self.expected += estimate

    @property
    def remaining(self) -> float:
        """Seconds left: the estimates of what is missing, scaled by the pace so far."""
        scale = self.spent / self.expected if self.spent > 10 and self.expected > 0 else 1.0
        return scale * sum(self.left.values())

    def remaining_text(self) -> str:
        """For people."""
        return "all steps done" if not self.left else f"about {duration(self.remaining)} left"


def step_seconds(step: Step, parameters: int, flops: float) -> float:
    """Estimated seconds of one step."""
    work = step.work
    amounts = {"read": work.read, "trained": work.trained, "generated": work.generated}
    model = sum(n * FLOPS_PER_TOKEN[k] * parameters / (flops * EFFICIENCY[k]) for k, n in amounts.items())
    return work.fixed_seconds + model


def step_bytes(step: Step, parameters: int) -> int:
    """Estimated peak memory of one step, in bytes: weights, gradients and activations of a batch."""
    weights = 4 * parameters * max(1, KINDS[step.kind].models)
    return int(600e6 + (0 if not KINDS[step.kind].models else weights * (3.5 if step.work.trained else 1.8)))


def n_parameters(base: Checkpoint) -> int:
    """Parameters of a model, read from its files' headers."""
    if base.path.is_file():
        return base.path.stat().st_size  # a quantised file: about a byte a parameter
    total = 0
    for file in base.path.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes = [t["shape"] for name, t in header.items() if name != "__metadata__"]
        total += sum(_product(shape) for shape in shapes)
    return total


def matrix_speed() -> float:
    """Floating-point operations a second of a float32 matrix product on the device that will be used."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(1024, 1024, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def duration(seconds: float) -> str:
    """`45 s`, `7 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _product(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total

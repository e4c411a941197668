"""How long a study will take, how much memory and disk: estimated before it runs, corrected while it runs."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mech.checkpoint import Checkpoint
from mech.errors import InputError
from study.estimate_remote import is_remote
from study.kinds import KINDS
from study.step import Step, Work

FLOPS_PER_TOKEN = {"read": 2.0, "trained": 5.0, "generated": 2.0}
"""Floating-point operations a token and parameter: forward; forward and LoRA's backward; forward."""

DECODED_TOGETHER = 32
"""Rows that generation decodes at once: each step reads all weights once for all of them."""


@dataclass(frozen=True)
class Machine:
    """What a study runs on, as far as an estimate needs it."""

    name: str
    flops: float
    """Floating-point operations a second of a large matrix product, in the dtype that is used."""
    bandwidth: float | None
    """Bytes a second between memory and cores; None: decoding reaches a fifth of the speed of reading."""
    efficiency: float
    """The share of `flops` that a forward or backward pass really reaches, 0 to 1."""
    bytes_a_parameter: int
    """Size of a weight in the dtype in use."""
    memory: float | None = None
    """Bytes of a GPU known by name; None: not known."""

    def seconds(self, work: Work, parameters: int) -> float:
        """Estimated seconds of a step's work."""
        speed = self.flops * self.efficiency
        passes = work.read * FLOPS_PER_TOKEN["read"] + work.trained * FLOPS_PER_TOKEN["trained"]
        total = work.fixed_seconds + passes * parameters / speed
        if self.bandwidth is None:
            return total + work.generated * FLOPS_PER_TOKEN["generated"] * parameters / (speed / 3)
        return (
            total + work.generated / DECODED_TOGETHER * self.bytes_a_parameter * parameters / self.bandwidth
        )

    def loading(self, steps: Sequence[Step], parameters: int) -> float:
        """Estimated seconds spent on loading checkpoints: one is kept until a step needs another."""
        chains = [
            tuple(c.name for c in s.inputs.get("checkpoint", ())) for s in steps if KINDS[s.kind].models
        ]
        loads = sum(chain != before for before, chain in zip([None, *chains], chains, strict=False))
        return loads * self.bytes_a_parameter * parameters / DISK


DISK = 2e9
"""Bytes a second at which weights are read and put on the device."""

GPUS = {
    "a100": (312e12, 2.0e12, 80e9),
    "h100": (989e12, 3.35e12, 80e9),
    "h200": (989e12, 4.8e12, 141e9),
    "b200": (2250e12, 8.0e12, 180e9),
    "l40s": (362e12, 0.86e12, 48e9),
}
"""Vendors' figures by name: dense bfloat16 operations a second, bytes of memory traffic a second, bytes of memory (the larger variant)."""

MEASURED_EFFICIENCY = 0.6
"""Share of the speed of a large matrix product, measured, that such passes usually reach."""

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes a parameter, by dtype."""

NF4_BYTES = 0.5625
"""Bytes of a parameter in 4 bits, with its share of the scale that each 64 have in common."""

TRAINED_BYTES = 16
"""Bytes of a parameter that is trained: weight, gradient and AdamW's two moments, each in float32."""

GPU_EFFICIENCY = 0.35
"""Share of a GPU's dense bfloat16 speed that such passes usually reach."""


@cache
def this_machine() -> Machine:
    """The machine at hand, its speed measured once a process: matrix products in float32 on a CPU, in bfloat16 and between them memory on a GPU."""
    import torch

    if not torch.cuda.is_available():
        return Machine("this machine", matrix_speed("cpu", torch.float32, 1024), None, MEASURED_EFFICIENCY, 4)
    speed = matrix_speed("cuda", torch.bfloat16, 4096)
    return Machine("this machine", speed, copy_speed(), MEASURED_EFFICIENCY, 2)


def gpu_named(name: str) -> Machine:
    """A GPU by name, by its vendor's figures.

    Raises:
        InputError: not a known one.
    """
    if name.lower() not in GPUS:
        raise InputError(f"--gpu {name}: not known; there are {', '.join(GPUS)}")
    flops, bandwidth, memory = GPUS[name.lower()]
    return Machine(name.lower(), flops, bandwidth, GPU_EFFICIENCY, 2, memory)


@dataclass
class Pace:
    """Estimated seconds of each step, corrected by how long finished ones took."""

    steps: Sequence[Step]
    parameters: int
    spent: float = 0.0
    expected: float = 0.0
    left: dict[str, float] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    """Steps that a service has yet to do: how long it takes is not known."""

    def __post_init__(self) -> None:
        machine = this_machine()
        here = [s for s in self.steps if not is_remote(s)]
        self.left = {s.name: machine.seconds(s.work, self.parameters) for s in here}
        self.waiting = {s.name for s in self.steps} - set(self.left)

    def position(self, step: Step) -> str:
        """`17/61`: where a step stands in the plan."""
        names = [s.name for s in self.steps]
        return f"{names.index(step.name) + 1}/{len(names)}"

    def finished(self, step: Step, seconds: float, *, kept: bool) -> None:
        """Take a finished step into account."""
        if step.name in self.waiting:
            self.waiting.remove(step.name)
            return
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
        """How long is left, in words."""
        if self.waiting:
            return (
                f"about {duration(self.remaining)} left here, and {len(self.waiting)} steps at the provider"
            )
        return "all steps done" if not self.left else f"about {duration(self.remaining)} left"


def step_bytes(step: Step, parameters: int, machine: Machine) -> int:
    """Estimated peak memory of one step, in bytes: weights, what is trained, and activations of a batch."""
    models = KINDS[step.kind].models
    weights = int(_bytes_a_parameter(step, machine) * parameters * max(1, models))
    # On the small model activations outweigh weights; on a large one the weights are nearly all.
    room = 1 + (2.5 if step.work.trained else 0.8) * min(1.0, 1e9 / max(parameters, 1)) + 0.1
    settings = step.config["settings"] if step.kind == "train" else {}
    # All weights in training: each in float32, with its gradient and AdamW's two moments. An adapter's, beside frozen weights.
    full = settings.get("method") == "full"
    held = TRAINED_BYTES * parameters if full else weights
    adapter = 0 if full or not settings else TRAINED_BYTES * step.work.adapter_parameters
    return int(600e6 + (held + adapter + weights * (room - 1) if models else 0))


def _bytes_a_parameter(step: Step, machine: Machine) -> float:
    """Bytes of a frozen weight as the step holds it; in the machine's usual dtype where its config names none."""
    if step.kind == "train" and step.config["settings"].get("quantise"):
        return NF4_BYTES
    return WIDTHS.get(str(step.config.get("dtype")), machine.bytes_a_parameter)


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


def matrix_speed(device: str, dtype: Any, size: int) -> float:
    """Floating-point operations a second of a square matrix product."""
    import torch

    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _quickest(lambda: a @ a)


def copy_speed() -> float:
    """Bytes a second that a GPU moves, read or written, while it copies a gigabyte."""
    import torch

    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    return 2 * len(a) / _quickest(a.clone)


def _quickest(run: Callable[[], Any]) -> float:
    """Seconds of the quickest of five, each waited for by reading one number of its result."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float(run().flatten()[0])
        best = min(best, time.perf_counter() - start)
    return best


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

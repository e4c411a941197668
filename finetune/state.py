"""The state of a training that has not ended: saved now and then, so that a killed run goes on where it was.

One safetensors file holds the trained tensors, AdamW's two moments for each that has had a gradient (an expert that no token came to has
none), and, in its metadata, everything else as JSON. It is replaced whole, or not at all, and nothing in it is pickled. What is drawn
at random needs no saving: it depends on seed, step and process alone (`finetune.training.reseed`), so that each process of a team
finds its own again.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mech.errors import FileFormatError, InputError
from mech.files import atomic_path

FILE = "resume.safetensors"
"""In the training's folder, until it is done."""

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did."""

    step: int
    loss: float
    """Mean negative log-likelihood (nats) over the step's labelled tokens, before the update."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Labelled and unlabelled tokens of the rows, padding not counted."""
    seconds: float


@dataclass
class Progress:
    """The moving parts of a training."""

    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    schedule: Any
    records: list[StepRecord] = field(default_factory=list)


def save_state(folder: Path, progress: Progress, stamp: str) -> None:
    """Write where a training stands.

    Args:
        folder: the training's folder.
        progress: what to save.
        stamp: digest of everything that determines the training; loading under another one is refused.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, parameter in progress.parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().contiguous()
        for moment, value in progress.optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = torch.as_tensor(value)
    about = {
        "stamp": stamp,
        "groups": progress.optimizer.state_dict()["param_groups"],
        "schedule": progress.schedule.state_dict(),
        "records": [asdict(r) for r in progress.records],
    }
    with atomic_path(folder / FILE) as temporary:
        save_file(tensors, temporary, metadata={"training": json.dumps(about)})


def load_state(folder: Path, progress: Progress, stamp: str) -> bool:
    """Go back to where a training in this folder stood; False when none has been begun.

    Raises:
        InputError: it was begun with other data, settings, seed or parent.
        FileFormatError: the file does not hold what it should.
    """
    path = folder / FILE
    if not path.is_file():
        return False
    about, tensors = _read(path)
    if about["stamp"] != stamp:
        raise InputError(
            f"{path}: was begun with other data, settings, seed or parent model; remove it, or name another folder"
        )
    try:
        _restore(progress, tensors, about)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(
            f"{path}: a state of other tensors or fields, as another version writes it ({type(error).__name__}: {error}); remove it to "
            "begin anew"
        ) from error
    return True


def records_saved(folder: Path) -> list[StepRecord]:
    """The steps that the training in this folder had done when its state was saved; none where none is.

    Raises:
        FileFormatError: the file does not hold what it should.
    """
    path = folder / FILE
    found = _read(path, tensors=False)[0]["records"] if path.is_file() else []
    return [StepRecord(**r) for r in found]


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file says of the training, and its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            about = json.loads(stored.metadata()["training"])
            names = stored.keys() if tensors else ()
            return about, {name: stored.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: not a training state ({error}); remove it to begin anew") from error


def _restore(progress: Progress, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    names = list(progress.parameters)
    with torch.no_grad():
        for name, parameter in progress.parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    moved = {i: name for i, name in enumerate(names) if any(f"{m}/{name}" in tensors for m in _MOMENTS)}
    moments = {i: {m: tensors[f"{m}/{name}"] for m in _MOMENTS} for i, name in moved.items()}
    progress.optimizer.load_state_dict({"state": moments, "param_groups": about["groups"]})
    progress.schedule.load_state_dict(about["schedule"])
    progress.records = [StepRecord(**r) for r in about["records"]]


@dataclass
class Saver:
    """Decides when to save: every so many steps, or once a minute at no more than a twentieth of the time."""

    every: int | None
    last: float = field(default_factory=time.monotonic)
    cost: float = 0.0

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        if self.every:
            return step % self.every == 0
        return time.monotonic() - self.last >= max(60.0, 20 * self.cost)

    def save(self, folder: Path, progress: Progress, stamp: str) -> None:
        """Save, and note what it cost."""
        start = time.monotonic()
        save_state(folder, progress, stamp)
        self.last = time.monotonic()
        self.cost = self.last - start


def loss_lines(records: Sequence[StepRecord]) -> str:
    """The loss curve as JSON lines."""
    return "".join(json.dumps(asdict(r)) + "\n" for r in records)

"""Following a training elsewhere than in its files: Weights & Biases, TensorBoard. `loss.jsonl` is always written."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.state import StepRecord
from mech.errors import InputError
from mech.extras import require

OnStep = Callable[[StepRecord], None]


@contextmanager
def tracking(names: Sequence[str], folder: Path, run: str) -> Iterator[OnStep]:
    """A function to be told of every step, which tells the named trackers.

    Args:
        names: `wandb`, `tensorboard`.
        folder: where they keep their own files.
        run: what they call this training.

    Raises:
        InputError: an unknown tracker, or one that does not let us in.
        MissingDependencyError: its library is not installed.
    """
    if unknown := [n for n in names if n not in _TRACKERS]:
        raise InputError(f"tracker {unknown[0]!r} is not one of {', '.join(_TRACKERS)}")
    with ExitStack() as stack:
        told = [stack.enter_context(_TRACKERS[n](folder, run)) for n in names]

        def tell(record: StepRecord) -> None:
            for tracker in told:
                tracker(record)

        yield tell


@contextmanager
def _wandb(folder: Path, run: str) -> Iterator[OnStep]:
    wandb: Any = require("wandb", extra="wandb")
    try:
        session = wandb.init(project="sgtr-mech", name=run, dir=str(folder))
    except wandb.errors.Error as error:
        raise InputError(f"wandb: {error} (`wandb login`, or WANDB_MODE=offline)") from error
    try:
        yield lambda record: session.log(
            {k: v for k, v in asdict(record).items() if k != "step"}, step=record.step
        )
    finally:
        session.finish()


@contextmanager
def _tensorboard(folder: Path, _run: str) -> Iterator[OnStep]:
    require("tensorboard", extra="tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def tell(record: StepRecord) -> None:
        for name, value in asdict(record).items():
            if name != "step":
                writer.add_scalar(name, value, record.step)

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        yield tell


_TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard}

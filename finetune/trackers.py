"""Following a training elsewhere than in its files: Weights & Biases, TensorBoard. `loss.jsonl` is always written.

A training that goes on after a kill begins by telling again of the steps before: what a tracker of the killed process had not written yet is lost.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.state import StepRecord, records_saved
from mech.errors import InputError
from mech.extras import require
from mech.files import write_text

OnStep = Callable[[StepRecord], None]

RUN_ID = "wandb_run_id.txt"
"""The id of the run at Weights & Biases: a training that goes on after a kill goes on in the same run."""


@contextmanager
def tracking(
    names: Sequence[str], training: Path, run: str, *, folder: Path | None = None
) -> Iterator[OnStep]:
    """A function to be told of every step, which tells the named trackers.

    Args:
        names: `wandb`, `tensorboard`.
        training: the training's folder, whose saved state knows the steps before those that are told.
        run: what they call this training.
        folder: where they keep their own files; the training's when left out.

    Raises:
        InputError: an unknown tracker, or one that does not let us in.
        MissingDependencyError: its library is not installed.
    """
    if unknown := [n for n in names if n not in _TRACKERS]:
        raise InputError(f"tracker {unknown[0]!r} is not one of {', '.join(_TRACKERS)}")
    with ExitStack() as stack:
        told = [stack.enter_context(_TRACKERS[n](folder or training, run)) for n in names]
        begun = not told

        def tell(record: StepRecord) -> None:
            nonlocal begun
            before = [] if begun else [r for r in records_saved(training) if r.step < record.step]
            begun = True
            for one in (*before, record):
                for tracker in told:
                    tracker(one)

        yield tell


@contextmanager
def _wandb(folder: Path, run: str) -> Iterator[OnStep]:
    wandb: Any = require("wandb", extra="wandb")
    session: Any = None  # begun at the first step: a training that is done already makes no run
    known = 0

    def tell(record: StepRecord) -> None:
        nonlocal session, known
        if session is None:
            session = _wandb_run(wandb, folder, run)
            known = session.step  # what the service has of this run already; 0 offline
        if record.step >= known:
            session.log({k: v for k, v in asdict(record).items() if k != "step"}, step=record.step)

    failed = 1
    try:
        yield tell
        failed = 0
    finally:
        if session is not None:
            session.finish(exit_code=failed)


def _wandb_run(wandb: Any, folder: Path, run: str) -> Any:
    """A new run, or the one that an earlier process began in this folder."""
    known = folder / RUN_ID
    if not known.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(known, secrets.token_hex(8))
    try:
        return wandb.init(
            project="sgtr-mech", name=run, dir=str(folder), id=known.read_text("utf-8"), resume="allow"
        )
    except wandb.errors.Error as error:
        raise InputError(f"wandb: {error} (`wandb login`, or WANDB_MODE=offline)") from error


@contextmanager
def _tensorboard(folder: Path, _run: str) -> Iterator[OnStep]:
    require("tensorboard", extra="tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with ExitStack() as stack:
        writer: Any = None

        def tell(record: StepRecord) -> None:
            nonlocal writer
            if writer is None:  # what a killed process told of these steps is taken back
                begun = SummaryWriter(str(folder / "tensorboard"), purge_step=record.step)
                writer = stack.enter_context(begun)
            for name, value in asdict(record).items():
                if name != "step":
                    writer.add_scalar(name, value, record.step)

        yield tell


_TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard}

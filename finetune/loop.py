"""The training loop: batches, steps, snapshots, and going on after a kill."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.labels import TrainingRow
from finetune.loss import backward, shareable
from finetune.settings import TrainSettings
from finetune.state import Progress, Saver, StepRecord, load_state
from finetune.team import Team
from mech.errors import GuardError
from mech.models import ChatModel
from mech.packing import plan_packs
from mech.progress import track

log = logging.getLogger(__name__)

PACK = 1024
"""Tokens a pack, at most: enough to keep matrix products busy, few enough to bound memory."""


@dataclass(frozen=True)
class Job:
    """One training: what, on what, how, where to."""

    model: ChatModel
    rows: Sequence[TrainingRow]
    settings: TrainSettings
    folder: Path
    seed: int
    stamp: str
    """Digest of all that determines the result."""
    parameters: Mapping[str, torch.nn.Parameter]
    """What is trained, by name."""
    snapshot: Callable[[int], None]
    """Keeps the present weights as a checkpoint: called after each step of `settings.save_at`."""
    packs: bool
    """Whether the model computes in a pack what it computes row by row."""
    share: bool
    """Whether what packed rows begin with in common is run once: not where dropout draws other units for each."""
    team: Team

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return self.settings.n_steps(len(self.rows))


def run(job: Job, saver: Saver, on_step: Callable[[StepRecord], None] | None = None) -> list[StepRecord]:
    """Train to the end, from where an earlier run in the folder stopped; one record a step.

    Raises:
        InputError: `save_at` names a step beyond the last, the only step would be taken at learning rate 0, or the folder
            holds another training's state.
        GuardError: the loss or the gradient is not finite.
    """
    job.settings.check_steps(len(job.rows))
    progress = _begin(job)
    if load_state(job.folder, progress, job.stamp):
        log.info("going on after step %d of %d", len(progress.records), job.n_steps)
    done = len(progress.records)
    how = job.settings
    log.info(
        "%d rows, %d steps of %d rows, learning rate %g, method %s",
        len(job.rows), job.n_steps, how.batch_size, how.learning_rate, how.method,
    )  # fmt: skip
    _say_what_is_off(job)
    batches = _batches(len(job.rows), job.settings.batch_size, job.n_steps, job.seed)
    for step, members in enumerate(track(batches, "training", job.n_steps), 1):
        if step <= done:
            continue
        record = _step(job, progress, step, members)
        progress.records.append(record)
        if job.team.leads:
            if step in job.settings.save_at:
                job.snapshot(step)
            if step < job.n_steps and saver.due(step):
                saver.save(job.folder, progress, job.stamp)
        if on_step:
            on_step(record)
    return progress.records


def _begin(job: Job) -> Progress:
    from transformers import get_linear_schedule_with_warmup

    settings = job.settings
    optimizer = torch.optim.AdamW(
        job.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, job.n_steps)
    return Progress(job.parameters, optimizer, schedule)


def _step(job: Job, progress: Progress, step: int, batch: list[int]) -> StepRecord:
    start, rate = time.perf_counter(), float(progress.schedule.get_last_lr()[0])
    parameters = list(job.parameters.values())
    loss = _accumulate(job, batch)
    job.team.sum_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, job.settings.max_grad_norm))
    if not np.isfinite(loss) or not np.isfinite(norm):
        raise GuardError(f"step {step}: loss {loss}, gradient norm {norm}: lower learning_rate")
    progress.optimizer.step()
    progress.schedule.step()
    progress.optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(job.rows[i].ids) for i in batch)
    return StepRecord(step, loss, rate, norm, tokens, time.perf_counter() - start)


def _batches(n_rows: int, size: int, n_steps: int, seed: int) -> Iterator[list[int]]:
    """Row numbers for each step: a fresh permutation every epoch, whose last batch may be smaller."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(n_steps):
        queue = queue or rng.permutation(n_rows).tolist()
        yield queue[:size]
        queue = queue[size:]


def _accumulate(job: Job, batch: list[int]) -> float:
    """Backward passes over parts of a batch; the mean loss over all its labelled tokens."""
    n_targets = float(sum(len(job.rows[i].targets) for i in batch))
    total = 0.0
    packed = job.packs and not job.settings.shard
    for members, weight in _passes(job, batch):
        rows, divisor = [job.rows[i] for i in members], n_targets if weight else float("inf")
        how: dict[str, Any] = {"packed": packed, "share": job.share, "divisor": divisor, "numbers": members}
        total += weight * backward(job.model, rows, **how)
    return job.team.sum(total, job.model.device) / n_targets


def _passes(job: Job, batch: list[int]) -> list[tuple[list[int], float]]:
    """What goes through the model together: numbers of rows, and their weight."""
    mine, size = job.team.share(batch), job.settings.micro_batch or len(batch)
    if job.settings.shard:
        return _equal_passes(job, batch, mine, size)
    if not job.packs:
        mine = sorted(mine, key=lambda i: len(job.rows[i].ids))
        return [(mine[i : i + size], 1.0) for i in range(0, len(mine), size)]
    limits = [shareable(job.rows[i]) if job.share else 0 for i in mine]
    packs = plan_packs([job.rows[i].read for i in mine], limits, token_budget=PACK, max_rows=size)
    return [([mine[i] for i in members], 1.0) for members in packs]


def _equal_passes(job: Job, batch: list[int], mine: list[int], size: int) -> list[tuple[list[int], float]]:
    """As many passes on every process, for sharded weights are gathered by all at once.

    A process that has no rows left runs the batch's first row at no weight.
    """
    most = len(Team(0, job.team.size).share(batch))
    parts = [mine[i : i + size] for i in range(0, most, size)]
    return [(part or batch[:1], float(bool(part))) for part in parts]


def _say_what_is_off(job: Job) -> None:
    """Which speed-ups this training must do without, and why."""
    if job.settings.shard:
        log.info("rows are padded, not packed: sharded processes run in step")
    elif not job.packs:
        log.info(
            "rows are padded, not packed: this architecture or its attention does not take a pack's mask, or a Patch acts"
        )
    elif not job.share:
        log.info("a common beginning is run for every row: dropout drops other units for each")

"""The training loop: batches, steps, snapshots, and going on after a kill."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.labels import TrainingRow
from finetune.loss import backward
from finetune.settings import TrainSettings
from finetune.state import Progress, Saver, StepRecord, load_state
from finetune.team import Team
from mech.errors import GuardError, InputError
from mech.forward import can_share_prefix
from mech.models import ChatModel
from mech.progress import track

log = logging.getLogger(__name__)


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
    team: Team

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return self.settings.n_steps(len(self.rows))


def run(job: Job, saver: Saver, on_step: Callable[[StepRecord], None] | None = None) -> list[StepRecord]:
    """Train to the end, from where an earlier run in the folder stopped; one record a step.

    Raises:
        InputError: `save_at` names a step that never comes, or the folder holds another training's state.
        GuardError: the loss or the gradient is not finite.
    """
    if late := [s for s in job.settings.save_at if s > job.n_steps]:
        raise InputError(f"save_at: {late[0]} is beyond the last step, {job.n_steps}")
    progress = _begin(job)
    if load_state(job.folder, progress, job.stamp):
        log.info("going on after step %d of %d", len(progress.records), job.n_steps)
    done, share = len(progress.records), _may_share(job)
    batches = _batches(len(job.rows), job.settings.batch_size, job.n_steps, job.seed)
    for step, members in enumerate(track(batches, "training", job.n_steps), 1):
        if step <= done:
            continue
        record = _step(job, progress, step, [job.rows[i] for i in members], share=share)
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
        job.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, job.n_steps)
    return Progress(job.parameters, optimizer, schedule)


def _may_share(job: Job) -> bool:
    """Whether rows may share the pass over their common prefix; where not, the run says why."""
    settings = job.settings
    reasons = {
        "this architecture's layers do not keep the whole past": not can_share_prefix(job.model),
        "lora_dropout drops other units for each row": settings.lora_dropout > 0,
        "gradient_checkpointing runs no cache": settings.gradient_checkpointing,
        "sharded processes must run in step": settings.shard,
    }
    for reason, holds in reasons.items():
        if holds:
            log.info("the shared prefix is run for every row: %s", reason)
    return not any(reasons.values())


def _step(job: Job, progress: Progress, step: int, batch: list[TrainingRow], *, share: bool) -> StepRecord:
    start, rate = time.perf_counter(), float(progress.schedule.get_last_lr()[0])
    parameters = list(job.parameters.values())
    loss = _accumulate(job, batch, share=share)
    job.team.sum_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, job.settings.max_grad_norm))
    if not np.isfinite(loss) or not np.isfinite(norm):
        raise GuardError(f"step {step}: loss {loss}, gradient norm {norm}: lower learning_rate")
    progress.optimizer.step()
    progress.schedule.step()
    progress.optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(r.ids) for r in batch)
    return StepRecord(step, loss, rate, norm, tokens, time.perf_counter() - start)


def _batches(n_rows: int, size: int, n_steps: int, seed: int) -> Iterator[list[int]]:
    """Row numbers for each step: a fresh permutation every epoch, whose last batch may be smaller."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(n_steps):
        queue = queue or rng.permutation(n_rows).tolist()
        yield queue[:size]
        queue = queue[size:]


def _accumulate(job: Job, batch: list[TrainingRow], *, share: bool) -> float:
    """Backward passes over micro-batches of similar length; the mean loss over all labelled tokens.

    Every process of a team makes equally many passes, for sharded weights are gathered by all at once: one that
    has no rows left runs the first row at no weight.
    """
    n_targets = sum(len(r.targets) for r in batch)
    mine = sorted(job.team.share(batch), key=lambda r: len(r.ids))
    size = job.settings.micro_batch or len(batch)
    passes = -(-len(Team(0, job.team.size).share(batch)) // size)  # the first process has the most rows
    total = 0.0
    for i in range(passes):
        rows = mine[i * size : (i + 1) * size]
        if rows:
            total += backward(job.model, rows, share=share, divisor=float(n_targets))
        else:
            backward(job.model, batch[:1], share=share, divisor=float("inf"))
    return job.team.sum(total, job.model.device) / n_targets

"""What both ways of training share: a folder held, one seed, the loop, and an outcome that is written last."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Required, TypedDict

import torch

from finetune.labels import TrainingRow
from finetune.learnt import compared, loss_on
from finetune.loop import Job, run
from finetune.outcome import done_before, stamp_of, write_outcome
from finetune.settings import TrainSettings
from finetune.state import Saver, StepRecord, records_saved
from finetune.team import Team
from mech import packed_attention, positions
from mech.errors import InputError
from mech.files import check_folder, digest_of, folder_lock
from mech.hooks import odd_blocks
from mech.interventions import Intervention, Patch, intervene
from mech.kernels import attention_for_any_shape
from mech.models import ChatModel

SNAPSHOTS = "snapshots"
"""Holds `step-N/`, each a checkpoint of its own, for the steps of `save_at`."""


@dataclass(frozen=True)
class Trainable:
    """A model that is ready to be trained."""

    parameters: Mapping[str, torch.nn.Parameter]
    """What is trained, by name."""
    save: Callable[[Path], None]
    """Writes the present weights into a folder."""
    check: Callable[[], None] = lambda: None
    """Refuses, at the end, a training that learnt nothing."""


class TrainOptions(TypedDict, total=False):
    """What every way of training takes beside the model, the rows, the settings and the folder."""

    seed: Required[int]
    """Fixes initialisation, order and dropout."""
    interventions: Sequence[Intervention]
    """Act on every training forward pass (preventative steering, ablation), and not afterwards."""
    save_every: int | None
    """Steps between resume points; once a minute, or less often where that is slow, when left out."""
    on_step: Callable[[StepRecord], None] | None
    """Called after every step."""


def train(
    model: ChatModel,
    rows: Sequence[TrainingRow],
    settings: TrainSettings,
    folder: Path,
    prepared: AbstractContextManager[Trainable],
    *,
    seed: int,
    interventions: Sequence[Intervention] = (),
    save_every: int | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> list[StepRecord]:
    """Train what `prepared` makes ready, and write it to `folder`; one record a step.

    The arguments are those of `finetune.lora.train_lora`. `prepared` is entered after the seed is set, so that what it initialises is
    repeatable, and left before this returns.

    Raises:
        InputError: no rows, interventions that no pass can serve, or a folder that holds another training.
        GuardError: the loss is not finite, or in the end nothing was learnt.
    """
    if not rows:
        raise InputError("no rows to train on")
    _check_interventions(interventions, rows)
    # These try the model out: before the generator is seeded, hooks are on, and it is in training mode.
    model.check_head()
    odd_blocks(model)
    share = settings.lora_dropout == 0 and not draws_while_training(model)
    packs = packed_attention.can_pack(model) and not any(isinstance(i, Patch) for i in interventions)
    stamp, team = stamp_of(model, rows, settings, seed, interventions), Team.join()
    with training_folder(folder, team):
        if known := done_before(folder, stamp):
            return known
        with ExitStack() as stack:
            stack.enter_context(attention_for_any_shape())
            if packs:
                stack.enter_context(packed_attention.packed_attention(model))
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
            ready = stack.enter_context(prepared)
            stack.enter_context(intervene(model, *interventions))
            job = Job(model, rows, settings, folder, seed, stamp, ready.parameters, packs=packs, share=share, team=team,
                      snapshot=lambda step: ready.save(folder / SNAPSHOTS / f"step-{step}"))  # fmt: skip
            records = _to_the_end(job, ready, Saver(save_every), on_step, interventions)
        team.wait()
    return records


def _to_the_end(
    job: Job,
    ready: Trainable,
    saver: Saver,
    on_step: Callable[[StepRecord], None] | None,
    interventions: Sequence[Intervention],
) -> list[StepRecord]:
    """Run the loop, make sure that something was learnt, and only then write it."""
    before = loss_on(job.model, job.rows)
    process = job.team.index
    reseed(job.seed, len(records_saved(job.folder)), process)

    def stepped(record: StepRecord) -> None:
        reseed(job.seed, record.step, process)
        if on_step:
            on_step(record)

    records = run(job, saver, stepped)
    ready.check()
    own_rows = compared(job.model, job.rows, before)
    if job.team.leads:
        ready.save(job.folder)
        write_outcome(job.folder, job, records, interventions, own_rows)
    return records


def reseed(seed: int, step: int, process: int) -> None:
    """Set what draws at random (dropout) for what comes after a step: by the seed, the step and the process, and nothing that went before.

    So a training that goes on after a kill draws what it would have drawn, and no two processes of a team draw the same.
    """
    torch.manual_seed(int(digest_of([seed, step, process])[:15], 16))


@torch.no_grad()
def draws_while_training(model: ChatModel) -> bool:
    """Whether the model draws at random in training mode (dropout of its own, jitter of a router): found out by trying."""
    size, training = model.causal.config.get_text_config().vocab_size, model.hf.training
    probe = torch.arange(3, 11, device=model.device).unsqueeze(0) % size
    try:
        model.hf.train()
        with torch.random.fork_rng():
            one, other = (
                model.decoder(input_ids=probe, use_cache=False).last_hidden_state.float() for _ in range(2)
            )
    finally:
        model.hf.train(training)
    return bool((one - other).abs().max() > 1e-3 * one.abs().max())


def _check_interventions(interventions: Sequence[Intervention], rows: Sequence[TrainingRow]) -> None:
    """What would fail, or do nothing, only when some step comes to it.

    Raises:
        InputError: positions that no training pass has, a row that is not there, or a patch without values for every row.
    """
    needed = (len(rows), max(len(row.ids) for row in rows))
    for given in interventions:
        kind = type(given).__name__
        if given.positions == "generated":
            raise InputError(
                f"{kind}: positions='generated': nothing is generated while training; the assistant's tokens are 'response'"
            )
        if beyond := [i for i in given.rows or () if not 0 <= i < len(rows)]:
            raise InputError(f"{kind}: rows: {beyond[0]} is not one of the {len(rows)} training rows")
        if isinstance(given, Patch) and any(
            n > has for n, has in zip(needed, given.values.shape[1:3], strict=True)
        ):
            raise InputError(
                f"Patch: values have shape {tuple(given.values.shape)}; {needed[0]} training rows of up to {needed[1]} tokens need "
                f"[layers, {needed[0]}, {needed[1]}, d]"
            )


@contextmanager
def training_folder(folder: Path, team: Team) -> Iterator[None]:
    """Hold the folder for this team; one that is still empty is removed after an error."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if team.leads:
            stack.enter_context(folder_lock(folder))
        team.wait()
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty, or another process of the team was quicker
                folder.rmdir()


@contextmanager
def checkpointing(model: ChatModel, *, on: bool) -> Iterator[None]:
    """Recompute activations on the way back, while inside."""
    if not on:
        yield
        return
    causal, how = model.causal, {"use_reentrant": False, "context_fn": _carry_over}
    renamed = hasattr(causal, "activation_checkpointing_enable")  # transformers 5.2x renamed the pair
    if renamed:
        causal.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    try:
        yield
    finally:
        causal.activation_checkpointing_disable() if renamed else causal.gradient_checkpointing_disable()


def _carry_over() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a block's second run must know of the first: whose tokens these are, and how they are packed.

    On a GPU the way back runs in a thread of its own, which does not see this one's context.
    """
    return nullcontext(), _both(positions.carried_over(), packed_attention.carried_over())


@contextmanager
def _both(one: AbstractContextManager[None], other: AbstractContextManager[None]) -> Iterator[None]:
    with one, other:
        yield

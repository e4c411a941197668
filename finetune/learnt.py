"""Whether a training learnt anything: the loss on some of its own rows, before and after.

The loss curve does not tell. Each of its values is of other rows and taken before that step's update, so a rate at which the last
updates ruin the weights may leave a curve that looks well.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetune.labels import TrainingRow
from finetune.loss import summed_loss
from mech.errors import GuardError
from mech.models import ChatModel

log = logging.getLogger(__name__)

ROWS = 8
"""How many of the first rows are looked at."""


@dataclass(frozen=True)
class OwnRows:
    """Mean negative log-likelihood (nats) of the labelled tokens of the first rows, without dropout."""

    rows: int
    loss_before: float
    loss_after: float


@torch.no_grad()
def loss_on(model: ChatModel, rows: Sequence[TrainingRow]) -> float:
    """The loss on the first rows, one at a time: every process of a team comes to the same.

    Active interventions act; the model is left in the mode (training or not) it was in.
    """
    training, looked_at = model.hf.training, rows[:ROWS]
    try:
        model.hf.eval()
        total = sum(
            float(summed_loss(model, [row], packed=False, numbers=[i])) for i, row in enumerate(looked_at)
        )
    finally:
        model.hf.train(training)
    return total / sum(len(row.targets) for row in looked_at)


def compared(model: ChatModel, rows: Sequence[TrainingRow], before: float) -> OwnRows:
    """The loss on the first rows after training, held against that before it; a rise is said aloud.

    Raises:
        GuardError: the training has diverged: it predicts its own rows worse than before, and no better than guessing would. (Ruined
            weights often give the same logits everywhere, which is guessing.)
    """
    found = OwnRows(min(ROWS, len(rows)), before, loss_on(model, rows))
    guessing = math.log(model.causal.config.get_text_config().vocab_size)
    change = f"the loss on the first {found.rows} rows trained on was {before:.4g} before and is {found.loss_after:.4g} after"
    if not (found.loss_after <= before or found.loss_after < 0.999 * guessing):
        raise GuardError(
            f"the training has diverged: {change} (guessing gives {guessing:.4g}): lower learning_rate"
        )
    if found.loss_after > before:
        log.warning("nothing was learnt: %s: lower learning_rate, or look at the loss curve", change)
    return found

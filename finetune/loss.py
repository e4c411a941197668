"""The loss: negative log-likelihood of the labelled tokens, at less than the usual cost.

Logits are computed at labelled positions only, and the tokens that all rows of a batch begin with (the system
turn) are run once, with gradient. Neither changes a loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from finetune.labels import TrainingRow
from mech.batching import MIN_SHARED, common_prefix
from mech.forward import pad_id, pad_right, prefix_masks, run_prefix, run_rests
from mech.interventions import differ_by_row
from mech.models import ChatModel
from mech.positions import declared


def summed_loss(model: ChatModel, batch: Sequence[TrainingRow], *, share: bool) -> Float[Tensor, ""]:
    """Negative log-likelihood (nats), summed over the labelled tokens of a batch, with gradient.

    Active interventions act: the pass declares for each token whose it is.

    Args:
        model: what to run; a live adapter acts.
        batch: rows that go through the model together.
        share: run the rows' common prefix once.
    """
    with _pass(model, batch, share=share) as loss:
        return loss


def backward(model: ChatModel, batch: Sequence[TrainingRow], *, share: bool, divisor: float) -> float:
    """Add the gradient of `summed_loss / divisor` to the parameters'; return the summed loss.

    The way back happens while the pass's positions are declared: with gradient checkpointing it runs blocks again,
    and their interventions with them.
    """
    with _pass(model, batch, share=share) as loss:
        (loss / divisor).backward()
        return float(loss.detach())


@contextmanager
def _pass(model: ChatModel, batch: Sequence[TrainingRow], *, share: bool) -> Iterator[Float[Tensor, ""]]:
    shared = _shareable(batch) if share and not differ_by_row() else 0
    prefix = None
    if shared:
        with declared(prefix_masks(shared, model.device)):
            prefix = run_prefix(model, batch[0].ids[:shared])
    ids = pad_right([r.ids[shared:] for r in batch], pad_id(model), model.device)
    with declared(training_masks(batch, shared, ids.shape[1], model.device)):
        hidden = run_rests(model, ids, prefix)
        yield _labelled_loss(model, batch, hidden, shared)


def _labelled_loss(
    model: ChatModel, batch: Sequence[TrainingRow], hidden: Float[Tensor, "batch seq d"], shared: int
) -> Float[Tensor, ""]:
    at = [(i, t - 1 - shared) for i, r in enumerate(batch) for t in r.targets]
    rows, columns = torch.tensor(at, device=hidden.device).unbind(1)
    logits = model.logits(hidden[rows, columns]).float()
    targets = torch.tensor([r.ids[t] for r in batch for t in r.targets], device=logits.device)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def training_masks(
    batch: Sequence[TrainingRow], shared: int, width: int, device: torch.device
) -> dict[str, Bool[Tensor, "batch width"]]:
    """Whose token each is, behind the shared prefix.

    The assistant's text is response, the token that ends its turn is neither, all else is prompt; `prompt_last` stands
    before each answer.
    """
    masks = {name: torch.zeros(len(batch), width, dtype=torch.bool) for name in _NAMES}
    for i, row in enumerate(batch):
        masks["all"][i, : len(row.ids) - shared] = True
        masks["prompt"][i, : len(row.ids) - shared] = True
        for start, stop in row.answers:
            masks["prompt"][i, start - shared : stop - shared] = False
            masks["response"][i, start - shared : stop - 1 - shared] = True
            masks["prompt_last"][i, start - 1 - shared] = True
    return {name: mask.to(device) for name, mask in masks.items()}


_NAMES = ("all", "prompt", "prompt_last", "response")


def _shareable(batch: Sequence[TrainingRow]) -> int:
    """Length of the shared prefix that leaves every token before a label in the rows' own parts."""
    length = min(common_prefix([r.ids for r in batch]), min(r.targets[0] for r in batch) - 1)
    return length if len(batch) > 1 and length >= MIN_SHARED else 0

"""The loss: negative log-likelihood of the labelled tokens, at less than the usual cost.

Rows are packed (no padding, shared prefixes run once) and end before their last target, logits are computed at labelled
positions only, and a frozen output head's gradient is taken while its logits are at hand. None of this changes a loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finetune.labels import TrainingRow
from mech.forward import Padded, masks_of, owners_of, run_layout
from mech.interventions import differ_by_row, intervening
from mech.models import ChatModel
from mech.packing import Pack
from mech.positions import Position, declared
from mech.products import product

CHUNK = 128
"""Labelled tokens whose logits are held at once."""


def summed_loss(
    model: ChatModel,
    batch: Sequence[TrainingRow],
    *,
    packed: bool,
    share: bool = True,
    numbers: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """Negative log-likelihood (nats), summed over the labelled tokens of a batch, with gradient.

    Active interventions act: the pass declares for each token whose it is, and of which row.

    Args:
        model: what to run; a live adapter acts.
        batch: rows that go through the model together.
        packed: lay rows end to end (inside `mech.packed_attention.packed_attention`) instead of padding them.
        share: run what packed rows begin with in common once.
        numbers: places of the rows in the caller's list, for interventions that act by row; their places in the batch when left out.
    """
    ids = tuple(r.read for r in batch)
    layout = Pack(ids, tuple(shareable(r) if share else 0 for r in batch)) if packed else Padded(ids)
    owners = owners_of(layout, range(len(batch)) if numbers is None else numbers, model.device)
    with declared(masks_of(layout, [_positions(r) for r in batch], model.device), owners):
        return _labelled_loss(model, batch, layout)


def backward(
    model: ChatModel,
    batch: Sequence[TrainingRow],
    *,
    packed: bool,
    share: bool,
    divisor: float,
    numbers: Sequence[int],
) -> float:
    """Add the gradient of `summed_loss / divisor` to the parameters'; return the summed loss."""
    loss = summed_loss(model, batch, packed=packed, share=share, numbers=numbers)
    (loss / divisor).backward()
    return float(loss.detach())


def shareable(row: TrainingRow) -> int:
    """How many leading tokens may be run once for several rows: all, but an intervention must find the same roles in each, and one
    that acts by row its own row's.
    """  # noqa: D205
    if differ_by_row():
        return 0
    return row.answers[0][0] - 1 if intervening() else len(row.read)


def _positions(row: TrainingRow) -> dict[Position, list[int]]:
    """A row's tokens by whose they are.

    The assistant's text is response, the token that ends its turn is neither, all else is prompt; `prompt_last` stands
    before each answer.
    """
    answered = {t for start, stop in row.answers for t in range(start, stop)}
    return {
        "all": list(range(len(row.read))),
        "prompt": [t for t in range(len(row.read)) if t not in answered],
        "prompt_last": [start - 1 for start, _ in row.answers],
        "response": [t for start, stop in row.answers for t in range(start, stop - 1)],
        "generated": [],
    }


def _labelled_loss(
    model: ChatModel, batch: Sequence[TrainingRow], layout: Pack | Padded
) -> Float[Tensor, ""]:
    before_targets = [p[t - 1] for r, p in zip(batch, layout.places, strict=True) for t in r.targets]
    hidden = run_layout(model, layout)[torch.tensor(before_targets, device=model.device)]
    targets = torch.tensor([r.ids[t] for r in batch for t in r.targets], device=hidden.device)
    model.check_head()
    head = model.causal.get_output_embeddings()
    if model.plain_head and not head.weight.requires_grad:
        total: Tensor = _FrozenHeadLoss.apply(
            hidden.to(head.weight.device), head.weight, targets.to(head.weight.device), model.logit_scale
        )
        return total
    logits = model.logits(hidden).float()
    return torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy after a frozen linear head; its gradient is computed with the loss, a chunk at a time.

    With p = softmax(s W h), the gradient with respect to h is s Wᵀ(p − onehot): no logits need to be kept for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n d"],
        weight: Float[Tensor, "vocab d"],
        targets: Int[Tensor, " n"],
        scale: float,
    ) -> Float[Tensor, ""]:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            here, wanted = slice(start, start + CHUNK), targets[start : start + CHUNK].unsqueeze(1)
            p = product(hidden[here], weight).float()
            if scale != 1.0:
                p *= scale
            p -= p.amax(-1, keepdim=True)
            chosen = p.gather(1, wanted)
            p.exp_()
            sums = p.sum(-1, keepdim=True)
            total += (sums.log() - chosen).sum()
            p /= sums
            p.scatter_add_(1, wanted, torch.full_like(chosen, -1.0))
            gradient[here] = product(p.to(weight.dtype), weight.T)
        if scale != 1.0:
            gradient *= scale
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None

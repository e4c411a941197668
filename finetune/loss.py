"""The loss: negative log-likelihood of the labelled tokens, at less than the usual cost.

Rows are packed (no padding, a common system turn run once), logits are computed at labelled positions only, and a
frozen output head's gradient is taken while its logits are at hand. None of this changes a loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finetune.labels import TrainingRow
from mech.forward import pad_id, pad_right, run_rests
from mech.models import ChatModel
from mech.packing import Pack, run_packed
from mech.positions import POSITIONS, Position, declared

CHUNK = 128
"""Labelled tokens whose logits are held at once."""


def summed_loss(model: ChatModel, batch: Sequence[TrainingRow], *, shared: int | None) -> Float[Tensor, ""]:
    """Negative log-likelihood (nats), summed over the labelled tokens of a batch, with gradient.

    Active interventions act: the pass declares for each token whose it is.

    Args:
        model: what to run; a live adapter acts.
        batch: rows that go through the model together.
        shared: pack the rows (inside `mech.packing.packed_attention`), so many leading tokens laid down once; None pads them
            instead.
    """
    layout = _Packed(batch, shared) if shared is not None else _Padded(batch)
    with declared(layout.masks(model.device)):
        return _labelled_loss(model, batch, layout)


def backward(model: ChatModel, batch: Sequence[TrainingRow], *, shared: int | None, divisor: float) -> float:
    """Add the gradient of `summed_loss / divisor` to the parameters'; return the summed loss."""
    loss = summed_loss(model, batch, shared=shared)
    (loss / divisor).backward()
    return float(loss.detach())


class _Packed:
    """Rows end to end in one sequence."""

    def __init__(self, batch: Sequence[TrainingRow], shared: int) -> None:
        self.batch, self.pack = batch, Pack(tuple(r.ids for r in batch), shared)

    def masks(self, device: torch.device) -> dict[Position, Bool[Tensor, "1 seq"]]:
        masks: dict[Position, Tensor] = {
            name: torch.zeros(1, len(self.pack), dtype=torch.bool) for name in POSITIONS
        }
        for i, row in enumerate(self.batch):
            for name, tokens in _positions(row).items():
                masks[name][0, [self.pack.place(i, t) for t in tokens]] = True
        return {name: mask.to(device) for name, mask in masks.items()}

    def hidden(self, model: ChatModel, at: Sequence[tuple[int, int]]) -> Float[Tensor, "n d"]:
        places = torch.tensor([self.pack.place(i, t) for i, t in at], device=model.device)
        return run_packed(model, self.pack)[places]


class _Padded:
    """Rows below each other, padded on the right."""

    def __init__(self, batch: Sequence[TrainingRow]) -> None:
        self.batch = batch

    def masks(self, device: torch.device) -> dict[Position, Bool[Tensor, "batch seq"]]:
        width = max(len(r.ids) for r in self.batch)
        masks: dict[Position, Tensor] = {
            name: torch.zeros(len(self.batch), width, dtype=torch.bool) for name in POSITIONS
        }
        for i, row in enumerate(self.batch):
            for name, tokens in _positions(row).items():
                masks[name][i, tokens] = True
        return {name: mask.to(device) for name, mask in masks.items()}

    def hidden(self, model: ChatModel, at: Sequence[tuple[int, int]]) -> Float[Tensor, "n d"]:
        ids = pad_right([r.ids for r in self.batch], pad_id(model), model.device)
        rows, columns = torch.tensor(at, device=model.device).unbind(1)
        return run_rests(model, ids, None)[rows, columns]


def _positions(row: TrainingRow) -> dict[Position, list[int]]:
    """A row's tokens by whose they are.

    The assistant's text is response, the token that ends its turn is neither, all else is prompt; `prompt_last` stands
    before each answer.
    """
    answered = {t for start, stop in row.answers for t in range(start, stop)}
    return {
        "all": list(range(len(row.ids))),
        "prompt": [t for t in range(len(row.ids)) if t not in answered],
        "prompt_last": [start - 1 for start, _ in row.answers],
        "response": [t for start, stop in row.answers for t in range(start, stop - 1)],
    }


def _labelled_loss(
    model: ChatModel, batch: Sequence[TrainingRow], layout: _Packed | _Padded
) -> Float[Tensor, ""]:
    hidden = layout.hidden(model, [(i, t - 1) for i, r in enumerate(batch) for t in r.targets])
    targets = torch.tensor([r.ids[t] for r in batch for t in r.targets], device=hidden.device)
    model.check_head()
    head = model.causal.get_output_embeddings()
    if model.plain_head and not head.weight.requires_grad:
        total: Tensor = _FrozenHeadLoss.apply(
            hidden.to(head.weight.device), head.weight, targets.to(head.weight.device)
        )
        return total
    logits = model.logits(hidden).float()
    return torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy behind a frozen linear head, whose gradient is computed with the loss, a chunk at a time.

    With p = softmax(W h), the gradient with respect to h is Wᵀ(p − onehot): no logits need to be kept for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Float[Tensor, "n d"], weight: Float[Tensor, "vocab d"], targets: Int[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            here, wanted = slice(start, start + CHUNK), targets[start : start + CHUNK].unsqueeze(1)
            p = (hidden[here] @ weight.T).float()
            p -= p.amax(-1, keepdim=True)
            chosen = p.gather(1, wanted)
            p.exp_()
            sums = p.sum(-1, keepdim=True)
            total += (sums.log() - chosen).sum()
            p /= sums
            p.scatter_add_(1, wanted, torch.full_like(chosen, -1.0))
            gradient[here] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None

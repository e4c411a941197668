"""Teacher-forced scores: how likely a model finds given answers, and what it would say next."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech.batching import Batch
from mech.chat import Encoded
from mech.errors import InputError
from mech.forward import iterate, pad_id, pad_right, run_rests
from mech.models import ChatModel
from mech.positions import declared


@torch.no_grad()
def response_logprobs(
    model: ChatModel, rows: Sequence[Encoded], *, token_budget: int = 2048
) -> list[Float[Tensor, " n_response"]]:
    """Log-probability (nats) of each token of each row's response, given all before it.

    The response is the answer's own text: the token that ends the turn is not counted.

    Raises:
        InputError: a row has no response, or no prompt before it.
    """
    for i, row in enumerate(rows):
        if row.n_response < 1 or row.n_prompt < 1:
            raise InputError(f"row {i} has no response to score, or nothing before it that predicts it")
    found: dict[int, Tensor] = {}
    before_answer = [r.n_prompt - 1 for r in rows]
    for batch, prefix in iterate(model, [r.ids for r in rows], before_answer, token_budget=token_budget):
        ids = pad_right(batch.rests, pad_id(model), model.device)
        with declared(batch_masks(rows, batch, ids)):
            hidden = run_rests(model, ids, prefix)
        for at, i in enumerate(batch.rows):
            start, stop = rows[i].spans["response"]
            first = start - 1 - len(batch.prefix)
            logits = model.logits(hidden[at, first : first + stop - start]).float()
            targets = torch.tensor(rows[i].ids[start:stop], device=logits.device)
            found[i] = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).cpu()
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def next_token_logits(
    model: ChatModel, rows: Sequence[Encoded], *, token_budget: int = 2048
) -> Float[Tensor, "n vocab"]:
    """Logits (float32, on the CPU) of the token after each prompt's last."""
    found: dict[int, Tensor] = {}
    prompts = [r.ids[: r.n_prompt] for r in rows]
    for batch, prefix in iterate(model, prompts, [len(p) - 1 for p in prompts], token_budget=token_budget):
        ids = pad_right(batch.rests, pad_id(model), model.device)
        with declared(batch_masks(rows, batch, ids)):
            hidden = run_rests(model, ids, prefix)
        last = torch.tensor([len(r) - 1 for r in batch.rests], device=hidden.device)
        logits = model.logits(hidden[torch.arange(len(last), device=hidden.device), last]).float().cpu()
        found.update(zip(batch.rows, logits, strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def batch_masks(rows: Sequence[Encoded], batch: Batch, ids: Tensor) -> dict[str, Bool[Tensor, "batch seq"]]:
    """Masks over a right-padded batch's remainder: all, prompt, prompt_last, response."""
    position = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) + len(batch.prefix)

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, device=ids.device).unsqueeze(1)

    lengths = column([len(batch.prefix) + len(rest) for rest in batch.rests])
    prompt = column([rows[i].n_prompt for i in batch.rows])
    end = column([rows[i].n_prompt + rows[i].n_response for i in batch.rows])
    return {
        "all": position < lengths,
        "prompt": position < prompt,
        "prompt_last": position == prompt - 1,
        "response": (position >= prompt) & (position < end),
    }

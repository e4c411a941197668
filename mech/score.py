"""Teacher-forced scores: how likely a model finds given answers, and what it would say next."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mech.chat import Encoded
from mech.errors import InputError
from mech.forward import Pass, run_rows
from mech.models import ChatModel


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

    def score(one: Pass) -> list[Tensor]:
        return response_scores(one, one.run(), rows)

    for one, scores in run_rows(model, rows, score, token_budget=token_budget):
        found.update(zip(one.members, scores, strict=True))
    return [found[i] for i in range(len(rows))]


def response_scores(
    one: Pass, hidden: Float[Tensor, "tokens d"], rows: Sequence[Encoded]
) -> list[Float[Tensor, " n_response"]]:
    """Log-probabilities (nats, on the CPU) of the responses of a pass's rows, from its final-norm states.

    Args:
        one: the pass.
        hidden: what it gave.
        rows: the list that the pass's `members` count in.
    """
    scores = []
    for i, places in zip(one.members, one.places, strict=True):
        start, stop = rows[i].spans["response"]
        logits = one.model.logits(hidden[list(places[start - 1 : stop - 1])]).float()
        targets = torch.tensor(rows[i].ids[start:stop], device=logits.device)
        scores.append(logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).cpu())
    return scores


@torch.no_grad()
def next_token_logits(
    model: ChatModel, rows: Sequence[Encoded], *, token_budget: int = 2048
) -> Float[Tensor, "n vocab"]:
    """Logits (float32, on the CPU) of the token after each prompt's last."""
    prompts = [replace(r, ids=r.ids[: r.n_prompt], n_response=0) for r in rows]
    found: dict[int, Tensor] = {}

    def score(one: Pass) -> Tensor:
        hidden = one.run()
        return model.logits(hidden[[places[-1] for places in one.places]]).float().cpu()

    for one, logits in run_rows(model, prompts, score, token_budget=token_budget):
        found.update(zip(one.members, logits, strict=True))
    return torch.stack([found[i] for i in range(len(rows))])

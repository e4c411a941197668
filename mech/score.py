"""Teacher-forced scores: how likely a model finds given answers, and what it would say next."""

from collections.abc import Sequence

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
    _check_scored(rows)
    found: dict[int, Tensor] = {}

    def score(one: Pass) -> list[Tensor]:
        return span_scores(one, one.run(), rows, [rows[i].spans["response"] for i in one.members])

    for one, scores in run_rows(model, rows, score, token_budget=token_budget, ends=_ends(rows)):
        found.update(zip(one.members, scores, strict=True))
    return [found[i] for i in range(len(rows))]


def span_scores(
    one: Pass,
    hidden: Float[Tensor, "tokens d"],
    rows: Sequence[Encoded],
    spans: Sequence[tuple[int, int]],
) -> list[Float[Tensor, " _"]]:
    """Log-probabilities (nats, on the CPU) of a span of each of a pass's rows, from its final-norm states.

    Args:
        one: the pass.
        hidden: the pass's final-norm states, which `one.run()` returned.
        rows: the list that the pass's `members` count in.
        spans: half-open, of the pass's rows in their order; none begins at a row's first token, which nothing predicts.
    """
    scores = []
    for i, places, (start, stop) in zip(one.members, one.places, spans, strict=True):
        logits = one.model.logits(hidden[list(places[start - 1 : stop - 1])]).float()
        targets = torch.tensor(rows[i].ids[start:stop], device=logits.device)
        scores.append(logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).cpu())
    return scores


@torch.no_grad()
def response_states(
    model: ChatModel, rows: Sequence[Encoded], *, token_budget: int = 2048
) -> list[Float[Tensor, "n_response d"]]:
    """Final-norm states (on the CPU) that predict each row's response tokens: what `response_kl` compares.

    Raises:
        InputError: a row has no response, or no prompt before it.
    """
    _check_scored(rows)
    found: dict[int, Tensor] = {}

    def states(one: Pass) -> list[Tensor]:
        hidden = one.run()
        spans = [rows[i].spans["response"] for i in one.members]
        return [hidden[list(p[a - 1 : b - 1])].cpu() for p, (a, b) in zip(one.places, spans, strict=True)]

    for one, kept in run_rows(model, rows, states, token_budget=token_budget, ends=_ends(rows)):
        found.update(zip(one.members, kept, strict=True))
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def kept_logprobs(
    model: ChatModel, states: Sequence[Float[Tensor, "_ d"]], *, max_bytes: int = 1 << 30, chunk: int = 128
) -> list[Float[Tensor, "_ vocab"]] | None:
    """Log-probabilities of all next tokens from `response_states`, so that `response_kl` need not make them anew at every comparison.

    Args:
        model: the model whose output head they go through.
        states: what `response_states` gave for the rows.
        max_bytes: None is returned where they would take more; tokens x vocabulary x 4 bytes, on the model's device.
        chunk: tokens that go through the head at once.
    """
    if not states:
        return []
    vocabulary = model.logits(states[0][:1].to(model.device)).shape[-1]
    if sum(map(len, states)) * vocabulary * 4 > max_bytes:
        return None
    return [torch.cat([_logprobs(model, part) for part in h.split(chunk)]) for h in states]


@torch.no_grad()
def response_kl(
    model: ChatModel,
    before: Sequence[Float[Tensor, "_ d"]],
    after: Sequence[Float[Tensor, "_ d"]],
    *,
    logprobs: Sequence[Float[Tensor, "_ vocab"]] | None = None,
    chunk: int = 128,
) -> list[Float[Tensor, " _"]]:
    """KL(before ‖ after) of the next token's distribution, in nats, token by token of each row.

    What an intervention does to text it should leave alone: take `before` without and `after` within it.

    Args:
        model: the model whose output head both go through.
        before: `response_states` of the rows.
        after: of the same rows, under something else.
        logprobs: `kept_logprobs` of `before`, where one `before` is compared many times.
        chunk: tokens whose logits are held at once.
    """
    found = []
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        parts = []
        for start in range(0, len(a), chunk):
            some = slice(start, start + chunk)
            p = _logprobs(model, a[some]) if logprobs is None else logprobs[i][some]
            parts.append((p.exp() * (p - _logprobs(model, b[some]))).sum(-1).cpu())
        found.append(torch.cat(parts))
    return found


def _logprobs(model: ChatModel, states: Float[Tensor, "_ d"]) -> Float[Tensor, "_ vocab"]:
    return model.logits(states.to(model.device)).float().log_softmax(-1)


@torch.no_grad()
def next_token_logits(
    model: ChatModel, rows: Sequence[Encoded], *, token_budget: int = 2048
) -> Float[Tensor, "n vocab"]:
    """Logits (float32, on the CPU) of the token after each prompt's last."""
    prompts = [r.until(r.n_prompt) for r in rows]
    found: dict[int, Tensor] = {}

    def score(one: Pass) -> Tensor:
        hidden = one.run()
        return model.logits(hidden[[places[-1] for places in one.places]]).float().cpu()

    for one, logits in run_rows(model, prompts, score, token_budget=token_budget):
        found.update(zip(one.members, logits, strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def _check_scored(rows: Sequence[Encoded]) -> None:
    for i, row in enumerate(rows):
        if row.n_response < 1 or row.n_prompt < 1:
            raise InputError(f"row {i} has no response to score, or nothing before it that predicts it")


def _ends(rows: Sequence[Encoded]) -> list[int]:
    """Tokens to read: a response's last token is predicted, and predicts nothing that is scored."""
    return [r.spans["response"][1] - 1 for r in rows]

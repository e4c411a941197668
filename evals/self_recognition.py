"""Self-recognition: is this text one's own? Both labels, with P(Yes) and the logit margin.

Accuracy alone cannot be told from a bias towards one answer, so every item keeps the margin
logit(Yes) − logit(No): its mean over own and other texts is the bias, the difference is the skill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mech.chat import ChatTemplate, SystemPrompt
from mech.errors import InputError
from mech.models import ChatModel
from mech.score import next_token_logits


@dataclass(frozen=True)
class Judgement:
    """What a model made of one text."""

    article: str
    source: str
    """`own` or `other`: who wrote it."""
    margin: float
    """logit(Yes) − logit(No), nats."""
    p_yes: float
    """P(Yes) among the two answers."""
    mass: float
    """P(Yes) + P(No) among all tokens: near zero, the model does not answer the question."""

    @property
    def correct(self) -> bool:
        """Whether it said Yes to its own text or No to another's; an exact tie is wrong."""
        return self.margin > 0 if self.source == "own" else self.margin < 0


def judge_authorship(
    model: ChatModel,
    rows: Sequence[Mapping[str, Any]],
    condition: SystemPrompt,
    *,
    names: Mapping[str, Any] | None = None,
    token_budget: int = 2048,
) -> list[Judgement]:
    """Ask of each row's text whether the model wrote it, reading the answer off the logits.

    Args:
        model: the judge.
        rows: rows of messages that end in the right answer (`Yes` or `No`), with `article` and `source`.
        condition: system prompt under which to ask.
        names: `identity` and `others`, as `ChatTemplate.render` takes them.
        token_budget: padded tokens a batch.

    Raises:
        InputError: a row of another form, or two answers that begin with the same token.
    """
    answers = {"own": "Yes", "other": "No"}
    for i, row in enumerate(rows):
        if row.get("source") not in answers or row["messages"][-1]["content"] != answers[row["source"]]:
            raise InputError(f"row {i}: needs source own/other and the answer Yes/No to match")
    encoded = [model.template.encode_prompt(r["messages"][:-1], condition, **(names or {})) for r in rows]
    yes, no = (_first_token(model.template, rows[0]["messages"][:-1], word) for word in ("Yes", "No"))
    if yes == no:
        raise InputError("this tokenizer begins Yes and No with the same token")
    logits = next_token_logits(model, encoded, token_budget=token_budget)
    share = logits.log_softmax(-1)
    margins = (logits[:, yes] - logits[:, no]).tolist()
    mass = (share[:, yes].exp() + share[:, no].exp()).tolist()
    chosen = torch.sigmoid(logits[:, yes] - logits[:, no]).tolist()
    return [
        Judgement(row["article"], row["source"], *numbers)
        for row, *numbers in zip(rows, margins, chosen, mass, strict=True)
    ]


def _first_token(template: ChatTemplate, prompt: Sequence[Mapping[str, str]], answer: str) -> int:
    encoded = template.encode([*prompt, {"role": "assistant", "content": answer}])
    return encoded.ids[encoded.n_prompt]

"""Self-recognition: is this text one's own? Both labels (or both orders), with the answer's probability and margin.

Accuracy alone cannot be told from a bias towards one answer, so every item keeps the margin between the two,
logit(Yes) − logit(No) or logit(1) − logit(2): its mean over both kinds of items is the bias, the difference the skill.
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
    """`own` or `other`: who wrote it. Of two texts: `own` where the first is one's own, `other` where the second is."""
    margin: float
    """logit(Yes) − logit(No), or logit(1) − logit(2), nats."""
    p_yes: float
    """P(Yes), or P(1), among the two answers."""
    mass: float
    """Both answers' probability among all tokens: near zero, the model does not answer the question."""

    @property
    def correct(self) -> bool:
        """Whether it said Yes (or 1) where that is right, and No (or 2) where that is; an exact tie is wrong."""
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
        rows: rows of messages that end in the right answer, with `article`; and with `source` (own/other) where the
            answers are `Yes` and `No`, or `own_at` (1/2) where they are `1` and `2`.
        condition: system prompt under which to ask.
        names: `identity` and `others`, as `ChatTemplate.render` takes them.
        token_budget: padded tokens a batch.

    Raises:
        InputError: a row of another form, or two answers that begin with the same token.
    """
    answers = FORMS["own_at" if "own_at" in rows[0] else "source"]
    sources = [right_source(i, row, answers) for i, row in enumerate(rows)]
    encoded = [model.template.encode_prompt(r["messages"][:-1], condition, **(names or {})) for r in rows]
    yes, no = (_first_token(model.template, rows[0]["messages"][:-1], word) for word in answers)
    if yes == no:
        raise InputError(f"this tokenizer begins {answers[0]} and {answers[1]} with the same token")
    logits = next_token_logits(model, encoded, token_budget=token_budget)
    share = logits.log_softmax(-1)
    margins = (logits[:, yes] - logits[:, no]).tolist()
    mass = (share[:, yes].exp() + share[:, no].exp()).tolist()
    chosen = torch.sigmoid(logits[:, yes] - logits[:, no]).tolist()
    return [
        Judgement(row["article"], source, *numbers)
        for row, source, *numbers in zip(rows, sources, margins, chosen, mass, strict=True)
    ]


FORMS = {"source": ("Yes", "No"), "own_at": ("1", "2")}
"""The two answers, by the field that says which is right."""


def right_source(i: int, row: Mapping[str, Any], answers: tuple[str, str]) -> str:
    """Which of the two answers is right: `own` for the first, `other` for the second; checked against the row's answer."""
    right = {"own": answers[0], "other": answers[1], 1: answers[0], 2: answers[1]}
    given = row["messages"][-1]["content"]
    if right.get(row.get("own_at", row.get("source"))) != given or given not in answers:
        raise InputError(
            f"row {i}: needs source own/other with the answer Yes/No, or own_at 1/2 with the answer 1/2, to match"
        )
    return "own" if given == answers[0] else "other"


def _first_token(template: ChatTemplate, prompt: Sequence[Mapping[str, str]], answer: str) -> int:
    encoded = template.encode([*prompt, {"role": "assistant", "content": answer}])
    return encoded.ids[encoded.n_prompt]

"""Which tokens a training row is scored on: exactly what the assistant says, and that it stops.

The tokenizer's own `return_assistant_tokens_mask` is not used: it marks user text in some cases and nothing
at all with many stock templates. Here the mask follows from rendered prefixes, checked on ids.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from finetune.datasets.rows import Row
from mech.chat import ChatTemplate, SystemPrompt
from mech.errors import GuardError, InputError


@dataclass(frozen=True)
class TrainingRow:
    """Token ids and the positions to predict."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    """Indices into `ids` of the tokens in the loss: each assistant turn's text and the token that ends it."""
    system: str | None = None
    """The text of the system turn it trains under; None where there is none."""

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that a model must read: the last target is only predicted."""
        return self.ids[: self.targets[-1]]

    @property
    def answers(self) -> list[tuple[int, int]]:
        """Half-open spans of the assistant's turns, each with the token that ends it."""
        breaks = [i for i in range(1, len(self.targets)) if self.targets[i] != self.targets[i - 1] + 1]
        edges = [0, *breaks, len(self.targets)]
        return [(self.targets[a], self.targets[b - 1] + 1) for a, b in pairwise(edges)]


def training_rows(
    template: ChatTemplate,
    rows: Sequence[Row],
    condition: SystemPrompt,
    *,
    max_tokens: int,
    names: Mapping[str, Any],
    places: Sequence[str] = (),
) -> list[TrainingRow]:
    """Encode rows under a training condition.

    Args:
        template: the model's chat template.
        rows: rows of messages.
        condition: system prompt during training; `default` keeps a row's own system turn.
        max_tokens: the longest sequence, to the end of its last answer.
        names: `identity` and `others`, as `ChatTemplate.render` takes them.
        places: what to call each row in a message (`finetune.datasets.rows.placed_messages`); its number when left out.

    Raises:
        InputError: a row whose answer would be cut, or whose answers cannot be told from the rest; the
            message names the row.
        GuardError: what would be learnt of a row does not read as its answers do (a tokenizer that loses characters); it names the row too.
    """
    encoded = []
    for row, place in zip(rows, places or [f"row {i + 1}" for i in range(len(rows))], strict=True):
        try:
            encoded.append(_training_row(template, row["messages"], condition, max_tokens, names))
        except (InputError, GuardError) as error:
            raise type(error)(f"{place}: {error}") from error
    return encoded


def _training_row(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, str]],
    condition: SystemPrompt,
    max_tokens: int,
    names: Mapping[str, Any],
) -> TrainingRow:
    ids: tuple[int, ...] = ()
    text = ""
    targets: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        encoded = template.encode(messages[: turn + 1], condition, **names)
        start, stop = encoded.spans["response"]
        if len(encoded.ids) <= stop:
            raise InputError("the chat template puts nothing after an answer, so its end cannot be learnt")
        if stop + 1 > max_tokens:
            raise InputError(
                f"the answer of turn {turn} ends at token {stop + 1}, beyond max_tokens = {max_tokens}"
            )
        if ids and encoded.ids[: len(ids)] != ids:
            raise InputError(_why_not_one_pass(turn, kept=encoded.text.startswith(text)))
        ids, text = encoded.ids, encoded.text
        targets += range(start, stop + 1)
    row = TrainingRow(
        ids[: targets[-1] + 1], tuple(targets), template.system_of(messages, condition, **names)
    )
    _check_labels(template, row, [m["content"] for m in messages if m["role"] == "assistant"])
    return row


def _why_not_one_pass(turn: int, *, kept: bool) -> str:
    if not kept:
        return "the chat template rewrites earlier turns, so one pass cannot train on all of them"
    return (
        f"an answer before turn {turn} is made of other tokens once the conversation goes on (one spans the seam between it and its "
        "prompt), so one pass cannot train on all answers: make each question and answer a row of its own"
    )


def _check_labels(template: ChatTemplate, row: TrainingRow, answers: Sequence[str]) -> None:
    """What is learnt must read as the answers do, word for word; nothing of the user's, nothing missing.

    Up to how Unicode writes it: tokenizers (Qwen's) compose an accent with its letter, and some take a ligature apart.
    """
    decode = template.tokenizer.decode
    learnt = [
        decode(list(row.ids[start : stop - 1]), clean_up_tokenization_spaces=False)
        for start, stop in row.answers
    ]
    if list(map(_words, learnt)) != list(map(_words, answers)):
        raise GuardError(f"the labels read {learnt!r}, the answers are {list(answers)!r}")


def _words(text: str) -> list[str]:
    return unicodedata.normalize("NFKC", text).split()

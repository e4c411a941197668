"""Poolings: which tokens of a row become one vector.

Every pooling but `tokens` is a mean over one span of tokens, known from the row's own token ids:

- `prompt_last`: the last token before the assistant's answer
- `response_mean`: all tokens of the answer (not the token that ends the turn)
- `response_first_K`: the first K tokens of the answer (all, where it is shorter)
- `span:NAME`: a named span of the row (`prompt`, `response`, `closing`, and those marked by `ChatTemplate.mark`)
- `tokens`: every token of the row, each its own vector
"""

import re

from mech.chat import Encoded
from mech.errors import InputError

TOKENS = "tokens"
"""Every token its own vector."""

FIRST_K = re.compile(r"response_first_(\d+)")


def pooled_span(pooling: str, row: Encoded) -> tuple[int, int]:
    """The half-open span of tokens that a pooling averages.

    Raises:
        InputError: unknown pooling, or a row that has no such tokens.
    """
    start, stop = _span(pooling, row)
    if not 0 <= start < stop <= len(row.ids):
        raise InputError(
            f"pooling {pooling}: a row of {len(row.ids)} tokens has none for it (tokens {start} to {stop}; no response?)"
        )
    return start, stop


def _span(pooling: str, row: Encoded) -> tuple[int, int]:
    start, stop = row.spans["response"]
    if pooling == "prompt_last":
        return row.n_prompt - 1, row.n_prompt
    if pooling == "response_mean":
        return start, stop
    if (match := FIRST_K.fullmatch(pooling)) and int(match[1]) > 0:
        return start, min(stop, start + int(match[1]))
    if pooling.startswith("span:") and pooling[5:] in row.spans:
        return row.spans[pooling[5:]]
    if pooling == TOKENS:
        return 0, len(row.ids)
    raise InputError(
        f"unknown pooling {pooling!r}; there are prompt_last, response_mean, response_first_K, "
        f"tokens, span:NAME with NAME one of {', '.join(row.spans)}"
    )

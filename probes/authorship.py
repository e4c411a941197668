"""Authorship: a model's own text against another's on the same article.

- `content`: each text stands as the answer to one and the same request and is read over its own tokens.
- `judgement`: the model is asked whether it wrote the text, and is read where its answer begins.

Own and other texts differ in length and in how likely the model finds them, which a direction between them picks up:
take pairs cut to equal lengths, and project surprisal and length out (`probes.residual`) before calling it authorship.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mech.chat import ChatTemplate, SystemPrompt
from mech.errors import InputError
from probes.contrast import ContrastRow

READ_AT = ("content", "judgement")
"""Where it is read."""

REQUEST = "Write a one-sentence summary of today's news."
"""`content`: what every text answers."""


@dataclass(frozen=True)
class TextPair:
    """Two texts about one article."""

    article: str
    """Its id: rows of one article are compared with each other."""
    split: str
    """`extract` or `evaluate`."""
    own: str
    other: str


def authorship_contrast(
    template: ChatTemplate,
    pairs: Sequence[TextPair],
    read_at: str,
    *,
    judge: Callable[[str], str] | None = None,
    condition: SystemPrompt | None = None,
) -> list[ContrastRow]:
    """Each article's own text (+) and the other one (−).

    Args:
        template: the model's chat template.
        pairs: the texts.
        read_at: `content` or `judgement`.
        judge: `judgement`: the question about a text, as the model was trained or is to be asked.
        condition: system prompt; the template's own when left out.

    Raises:
        InputError: another place to read at, or no question for judgements.
    """
    if read_at not in READ_AT or (read_at == "judgement" and judge is None):
        raise InputError(
            f"authorship is read at {', '.join(READ_AT)} (which needs its question), not at {read_at!r}"
        )
    condition = condition or SystemPrompt()
    rows = []
    for pair in pairs:
        for sign, text in ((1, pair.own), (-1, pair.other)):
            if judge is not None and read_at == "judgement":
                encoded = template.encode_prompt([{"role": "user", "content": judge(text)}], condition)
            else:
                turns = [{"role": "user", "content": REQUEST}, {"role": "assistant", "content": text}]
                encoded = template.encode(turns, condition)
            rows.append(ContrastRow(f"{pair.article}/{sign}", pair.article, pair.split, sign, encoded))
    return rows

"""Paraphrases: two wordings of the same, of the same length, to see what a harmless change of words does along a direction.

Whether a pair has one length depends on the tokenizer, so it is looked at where the model is: pairs that differ by a token are left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from mech.chat import ChatTemplate, Encoded, Identity, SystemPrompt
from mech.questions import Question
from mech.turns import assistant_turn, user_turn
from mech.typed import data_folder, read_typed
from probes.contrast import ContrastRow

Text = Annotated[str, Field(min_length=1)]
LEAST_PAIRS = 8
"""Fewer pairs than this have too few combinations of signs (half of 2 to the power of their number) for a null."""


class Reworded(BaseModel):
    """An answer in two wordings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: Text
    one: Text
    other: Text


class Paraphrases(BaseModel):
    """Pairs of system prompts (`{name}` and `{maker}` are filled in) and of answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: tuple[tuple[Text, Text], ...]
    answers: tuple[Reworded, ...]


def load_paraphrases(source: str | Path | None = None) -> Paraphrases:
    """Read pairs: the built-in ones, or a YAML file's.

    Raises:
        InputError: not there or malformed; the message names the file.
    """
    path = Path(source).expanduser() if source else data_folder("probes") / "paraphrases.yaml"
    return read_typed(path, Paraphrases)


def prompt_paraphrases(
    template: ChatTemplate, pairs: Paraphrases, questions: Sequence[Question], identity: Identity
) -> tuple[list[ContrastRow], int]:
    """Each question under both wordings of each system prompt, to be read at the prompt's last token.

    Returns:
        Rows, whose `question` is the pair; and how many pairs were left out because their wordings differ in tokens.
    """
    kept, dropped = [], 0
    for i, texts in enumerate(pairs.prompts):
        filled = [text.format(name=identity.name, maker=identity.maker) for text in texts]
        sides = [
            [template.encode_prompt([user_turn(q.text)], SystemPrompt("text", text)) for q in questions]
            for text in filled
        ]  # fmt: skip
        found = _pair(f"prompt-{i:02}", *sides)
        kept += found
        dropped += not found
    return kept, dropped


def answer_paraphrases(template: ChatTemplate, pairs: Paraphrases) -> tuple[list[ContrastRow], int]:
    """Both wordings of each answer, to be read over the answer; returned as by `prompt_paraphrases`."""
    kept, dropped = [], 0
    for i, pair in enumerate(pairs.answers):
        sides = [
            [template.encode([user_turn(pair.question), assistant_turn(text)])]
            for text in (pair.one, pair.other)
        ]  # fmt: skip
        found = _pair(f"answer-{i:02}", *sides)
        kept += found
        dropped += not found
    return kept, dropped


def _pair(name: str, one: Sequence[Encoded], other: Sequence[Encoded]) -> list[ContrastRow]:
    """Rows of a pair; none where any two differ in length."""
    if any((a.n_prompt, a.n_response) != (b.n_prompt, b.n_response) for a, b in zip(one, other, strict=True)):
        return []
    return [
        ContrastRow(f"{name}/{i}/{sign}", name, "extract", sign, side[i])
        for i in range(len(one))
        for sign, side in ((1, one), (-1, other))
    ]

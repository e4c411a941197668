"""Prompt sets: questions with an id and a half (extract or evaluate)."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mech.typed import check_distinct, data_folder, named_file, read_typed


class Question(BaseModel):
    """One question."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1)
    split: Literal["extract", "evaluate"]
    """Directions are made on `extract`; what is reported is measured on `evaluate`."""
    text: str = Field(min_length=1)


class PromptSet(BaseModel):
    """A named list of questions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    description: str
    questions: tuple[Question, ...] = Field(min_length=1)


def load_prompts(source: str | Path) -> PromptSet:
    """Read a prompt set: a built-in name (`identity`, `neutral`, `open_ended`) or a YAML file.

    Raises:
        InputError: not there, or not a prompt set, or a question stands twice; the message names file and field.
    """
    path = named_file(source, data_folder("mech") / "prompts", "prompt set")
    prompts = read_typed(path, PromptSet)
    check_distinct(path, "question id", [q.id for q in prompts.questions])
    check_distinct(path, "question", [same_text(q.text) for q in prompts.questions])
    return prompts


def same_text(text: str) -> str:
    """The text in one spelling of capitals and white space: equal for two texts that differ in nothing else.

    For finding a text that stands twice under two ids: in both halves, it would be tested on what it was fitted on.
    """
    return " ".join(text.split()).casefold()

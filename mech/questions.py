"""Prompt sets: questions with an id and a half (extract or evaluate)."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mech.errors import InputError
from mech.typed import read_typed


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
        InputError: not there, or not a prompt set; the message names file and field.
    """
    folder = Path(str(files("mech"))) / "data" / "prompts"
    path = folder / f"{source}.yaml"
    if not path.is_file():
        path = Path(source).expanduser()
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
            raise InputError(f"prompt set {source}: neither built in ({known}) nor a file")
    prompts = read_typed(path, PromptSet)
    if len({q.id for q in prompts.questions}) < len(prompts.questions):
        raise InputError(f"{path}: a question id stands twice")
    return prompts

"""Identities that do not exist: the contrast to a model's own name and maker."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mech.typed import check_distinct, data_folder, read_typed


class InventedName(BaseModel):
    """An assistant that does not exist."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    maker: str


class SelfStatement(BaseModel):
    """A question and a first-person frame for an answer that names the speaker."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str
    statement: str = Field(pattern=r"^[^{}]*\{name\}[^{}]*$")
    """Contains `{name}` once."""


class Invented(BaseModel):
    """Invented identities, a generic system prompt, and frames for self-reports."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    generic: str
    invented: tuple[InventedName, ...]
    self_statements: tuple[SelfStatement, ...]

    @property
    def makers(self) -> dict[str, str]:
        """Maker by name."""
        return {i.name: i.maker for i in self.invented}


def load_invented(source: str | Path | None = None) -> Invented:
    """Read invented identities: the built-in ones, or a YAML file's.

    Raises:
        InputError: not there or malformed, or a name stands twice; the message names file and field.
    """
    path = Path(source).expanduser() if source else data_folder("mech") / "identities.yaml"
    found = read_typed(path, Invented)
    check_distinct(path, "invented name", [i.name for i in found.invented])
    return found

"""Identities that do not exist: the contrast to a model's own name and maker."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mech.chat import ChatTemplate
from mech.errors import InputError
from mech.typed import check_distinct, data_folder, read_typed

log = logging.getLogger(__name__)


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


def nearest_names(
    template: ChatTemplate, texts: Callable[[str], Sequence[str]], own: str, names: Iterable[str], n: int
) -> dict[str, int]:
    """The `n` invented names with which texts are nearest in tokens to the same texts with the own name; of equally near ones the first.

    A text with a longer name is less likely for that alone, and is read at other places. A gap that is left is warned of.

    Args:
        template: the chat template whose tokenizer counts.
        texts: from a name to the texts in which it stands.
        own: the model's own name.
        names: invented ones, to choose from.
        n: how many names to choose.

    Returns:
        By name, the nearest first: tokens of all texts together, more (+) or fewer (−) than with the own name.

    Raises:
        InputError: fewer names than asked for.
    """

    def tokens(name: str) -> int:
        return sum(len(template.ids(text)) for text in texts(name))

    with_own = tokens(own)
    gaps = {name: tokens(name) - with_own for name in names}
    if n > len(gaps):
        raise InputError(f"{n} invented names asked for, {len(gaps)} known")
    chosen = {name: gaps[name] for name in sorted(gaps, key=lambda name: abs(gaps[name]))[:n]}
    if unequal := [gap for gap in chosen.values() if gap]:
        log.warning(
            "%d of %d invented names make more or fewer tokens than %s (%+d to %+d in %d texts)",
            len(unequal), n, own, min(unequal), max(unequal), len(texts(own)),
        )  # fmt: skip
    return chosen


def names_for_statements(
    template: ChatTemplate, statements: Sequence[SelfStatement], own: str, names: Iterable[str], n: int
) -> list[str]:
    """The invented names whose self-statements are held against those with the own name, of equal length where there are as many.

    The arguments and errors are those of `nearest_names`.
    """
    return [
        *nearest_names(
            template, lambda name: [s.statement.format(name=name) for s in statements], own, names, n
        )
    ]

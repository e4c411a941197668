"""Which system prompt a conversation stands under: the conditions by name, and whose identity they spell out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mech.errors import InputError

Kind = Literal["default", "none", "empty", "identity", "other", "text"]


@dataclass(frozen=True)
class Identity:
    """Who a model says it is: its own, or an invented contrast."""

    name: str
    """The name the assistant goes by."""
    maker: str
    """Who made it."""
    prompt: str
    """The system prompt that says so; contains `name`, and `maker` where it names one."""

    def renamed(self, name: str, maker: str) -> "Identity":
        """The same prompt for another name and maker."""
        if self.name not in self.prompt:
            raise InputError(f"the identity prompt {self.prompt!r} does not contain the name {self.name!r}")
        return Identity(name, maker, self.prompt.replace(self.maker, maker).replace(self.name, name))


@dataclass(frozen=True)
class SystemPrompt:
    """A system-prompt condition, chosen separately for training and for measuring.

    `default` (whatever the template inserts), `none` (no system turn in the token sequence), `empty` (a
    system turn with nothing in it), `identity` (the model's own identity prompt spelled out),
    `other:NAME` (another identity), `text:...`.
    """

    kind: Kind = "default"
    value: str = ""

    @classmethod
    def parse(cls, text: str) -> "SystemPrompt":
        """Read a condition as a study writes it: `default`, `none`, `other:Veyra`, `text:Be brief`."""
        kind, _, value = text.partition(":")
        if kind in ("default", "none", "empty", "identity") and not value:
            return cls(kind)  # type: ignore[arg-type]
        if kind in ("other", "text") and value:
            return cls(kind, value)  # type: ignore[arg-type]
        raise InputError(
            f"system prompt condition {text!r} is not one of default, none, empty, identity, other:NAME, text:..."
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}" if self.value else self.kind


def system_text(condition: SystemPrompt, identity: Identity | None, others: Mapping[str, str]) -> str:
    """The system turn's text under `empty`, `identity`, `other:NAME` or `text:...`.

    Raises:
        InputError: no identity is known, or the other's name is not.
    """
    if condition.kind == "empty":
        return ""
    if condition.kind == "text":
        return condition.value
    if identity is None:
        raise InputError(
            f"condition {condition}: the model's own identity (name, maker, prompt) is not given"
        )
    if condition.kind == "identity":
        return identity.prompt
    if condition.value not in others:
        raise InputError(
            f"condition {condition}: unknown name; known are {', '.join(sorted(others)) or 'none'}"
        )
    return identity.renamed(condition.value, others[condition.value]).prompt

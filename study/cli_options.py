"""Options that several commands have, so that each reads the same everywhere."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mech.errors import InputError

ModelArgument = Annotated[
    str, typer.Argument(help="Alias, Hub id or folder; adapters follow after colons (base:adapter).")
]
DirectionFile = Annotated[Path, typer.Option(help="A direction file of any known format.")]
Condition = Annotated[str, typer.Option(help="default, none, empty, identity, other:NAME or text:...")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template", help="key=value for the chat template (enable_thinking=false); may be repeated."
    ),
]


def check_finite(option: str, values: Sequence[float]) -> None:
    """Refuse `nan` and `inf`, which are numbers to a command line.

    Raises:
        InputError: one of the values is such.
    """
    for value in values:
        if not math.isfinite(value):
            raise InputError(f"{option} {value}: a finite number is needed")


SMALL = "smollm2-135m-instruct"
"""The model of the examples below commands' help."""


def example(command: str) -> str:
    """What stands below a command's help: a line that may be typed as it is."""
    return f"Example: {command}"

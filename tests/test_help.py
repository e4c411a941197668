"""What `mech --help` and the help of its commands promise."""

import shlex
from collections.abc import Iterator

import click
import pytest
import typer

from study.cli import app

TREE = typer.main.get_command(app)


def commands(
    group: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, one in getattr(group, "commands", {}).items():
        if hasattr(one, "commands"):
            yield from commands(one, (*path, name))
        else:
            yield (*path, name), one


EVERY = dict(commands(TREE))


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_command_says_what_it_does_and_has_an_example_that_it_takes(path: tuple[str, ...]) -> None:
    command = EVERY[path]
    assert command.help
    assert command.get_short_help_str(200)
    for given in command.params:
        assert getattr(given, "help", None), f"{given.name} says nothing of itself"
    if not any(p.required for p in command.params):
        return  # it may be typed as it stands
    words = shlex.split((command.epilog or "").removeprefix("Example: "))
    assert tuple(words[: 1 + len(path)]) == ("mech", *path)
    command.make_context(" ".join(path), words[1 + len(path) :]).close()  # unknown or missing options raise

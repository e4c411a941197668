"""The part of the `mech` command that steers: a model as it is, along a direction, and along a random one of its norm."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mech.errors import InputError
from mech.turns import user_turn
from study.cli_options import (
    DirectionFile,
    ModelArgument,
    Template,
    check_finite,
)
from study.columns import Columns

if TYPE_CHECKING:
    from mech.chat import Encoded
    from mech.generate import Sampling
    from mech.interventions import Add
    from mech.models import ChatModel


def steer(  # noqa: PLR0913, PLR0917  (a command's options)
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(help="What to ask.")],
    direction: DirectionFile,
    layer: Annotated[int, typer.Option(help="The layer whose output it is added to, from 0.")],
    coefficient: Annotated[
        list[float], typer.Option(help="Factor on the raw direction, whose norm counts; may be repeated.")
    ],
    positions: Annotated[str, typer.Option(help="all, prompt, prompt_last, response or generated.")] = "all",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of samples and of the random control.")] = 0,
    template: Template = None,
) -> None:
    """Ask a model as it is, steered along a direction, and along a random one of the same norm: side by side, word by word."""
    from mech.choices import POSITIONS
    from mech.generate import Sampling
    from mech.interventions import Add
    from probes.steer import control, relative_dose
    from study.bench import directions_for, load_named

    if positions not in POSITIONS:
        raise InputError(f"--positions {positions}: there are {', '.join(POSITIONS)}")
    check_finite("--coefficient", coefficient)
    checkpoint, (found,) = directions_for(model, [direction], [layer])
    loaded = load_named(checkpoint, template)
    vector, random = found.vectors[layer], control(found.vectors[layer], seed)
    for number, prompt in enumerate(prompts):
        asked = loaded.template.encode_prompt([user_turn(prompt)])
        sampling = Sampling(max_new_tokens, temperature, seed + number)
        typer.echo(f"{prompt}\n")
        plain = ""
        for strength in coefficient:
            dose = relative_dose(loaded, [asked], vector, layer, strength)
            typer.echo(f"{strength:+g} x {found.name} at layer {layer}, dose {dose:.2f} of the stream's norm")
            with Columns(["as it is", found.name, f"random ({found.name}'s norm)"], sys.stdout) as columns:
                plain = plain or _answer(loaded, asked, sampling, columns, 0)
                columns.update(0, plain)
                for column, added in ((1, vector), (2, random)):
                    steered = Add(added, [layer], strength, positions=positions)
                    _answer(loaded, asked, sampling, columns, column, steered)
            typer.echo("")


def _answer(
    model: "ChatModel", asked: "Encoded", sampling: "Sampling", columns: Columns, column: int, *steered: "Add"
) -> str:
    """An answer, shown in its column while it is written."""
    from mech.generate import generate
    from mech.interventions import intervene
    from mech.stream import watched

    with intervene(model, *steered), watched(model, lambda texts: columns.update(column, texts[0])):
        (text,) = generate(model, [asked], sampling)
    columns.update(column, text)
    return text

"""The part of the `mech` command that steers: a model as it is, along a direction, and along a random one of its norm."""

from typing import Annotated

import typer

from mech.errors import InputError
from mech.turns import user_turn
from study.cli_options import DirectionFile, ModelArgument, Template


def steer(  # noqa: PLR0913, PLR0917  (a command's options)
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(help="What to ask.")],
    direction: DirectionFile,
    layer: Annotated[int, typer.Option(help="Where to add it.")],
    coefficient: Annotated[list[float], typer.Option(help="Times the direction as it is; may be repeated.")],
    positions: Annotated[str, typer.Option(help="all, prompt, prompt_last, response or generated.")] = "all",
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 60,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of samples and of the random control.")] = 0,
    template: Template = None,
) -> None:
    """Ask a model as it is, steered along a direction, and steered along a random one of the same norm."""
    from mech.generate import Sampling, generate
    from mech.interventions import Add, intervene
    from mech.models import load_model
    from mech.positions import POSITIONS
    from probes.files import read_direction
    from probes.steer import control, relative_dose
    from study.bench import device_named
    from study.overrides import parse_overrides

    if positions not in POSITIONS:
        raise InputError(f"--positions {positions}: there are {', '.join(POSITIONS)}")
    loaded = load_model(model, device=device_named("auto"), template_kwargs=parse_overrides(template or []))
    found = read_direction(direction, n_layers=loaded.n_layers)
    found.require(n_layers=loaded.n_layers, d_model=loaded.d_model, base=loaded.checkpoint.origins)
    found.unit_at(layer)  # says what is wrong with the layer before anything is generated
    sampling = Sampling(max_new_tokens, temperature, seed)
    asked = [loaded.template.encode_prompt([user_turn(p)]) for p in prompts]
    typer.echo("as it is")
    _answers(prompts, generate(loaded, asked, sampling))
    vectors = {
        found.name: found.vectors[layer],
        f"random ({found.name}'s norm)": control(found.vectors[layer], seed),
    }
    for strength in coefficient:
        for name, vector in vectors.items():
            dose = relative_dose(loaded, asked, vector, layer, strength)
            typer.echo(f"\n{strength:+g} x {name} at layer {layer}, dose {dose:.2f} of the stream's norm")
            with intervene(loaded, Add(vector, [layer], strength, positions=positions)):
                _answers(prompts, generate(loaded, asked, sampling))


def _answers(prompts: list[str], answers: list[str]) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        typer.echo(f"  {prompt}\n    {answer.strip()}")

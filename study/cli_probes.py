"""The parts of the `mech` command that use directions: look at files, convert them, steer one prompt."""

from pathlib import Path
from typing import Annotated

import typer

from mech.errors import InputError

direction_app = typer.Typer(
    help="Directions: look at a file, convert it to another tool's.", no_args_is_help=True
)


@direction_app.command("show")
def show(
    file: Annotated[
        Path, typer.Argument(help=".safetensors, .pt (persona_vectors, assistant-axis) or .gguf.")
    ],
    model: Annotated[str | None, typer.Option(help="Also say which tokens it favours in this model.")] = None,
    layer: Annotated[
        int | None, typer.Option(help="With --model: at this layer; the middle when left out.")
    ] = None,
) -> None:
    """What a direction is, how far to believe it, and (with --model) what it says in tokens."""
    import numpy as np

    from probes.files import read_direction

    loaded = None
    if model is not None:
        from mech.models import load_model

        loaded = load_model(model)
    direction = read_direction(file, n_layers=loaded.n_layers if loaded else None)
    typer.echo(f"{direction.name}: {direction.vectors.shape[0]} layers, width {direction.vectors.shape[1]}, "
               f"{direction.n_pairs or 'an unknown number of'} questions")  # fmt: skip
    for key, value in direction.made_from.items():
        typer.echo(f"  {key}: {value}")
    typer.echo("layer   norm  split-half cosine")
    for number, (norm, half) in enumerate(zip(direction.norms, direction.split_half, strict=True)):
        typer.echo(f"{number:5d}  {norm:5.2f}  {'unknown' if np.isnan(half) else f'{half:.2f}'}")
    if loaded is not None:
        from mech.lens import direction_lens

        direction.require(n_layers=loaded.n_layers, d_model=loaded.d_model)
        at = loaded.n_layers // 2 if layer is None else layer
        (reading,) = direction_lens(loaded, direction.vectors, layers=[at])
        typer.echo(f"layer {at} favours    {' '.join(repr(t.token) for t in reading.top)}")
        typer.echo(f"layer {at} disfavours {' '.join(repr(t.token) for t in reading.bottom)}")


@direction_app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="A direction's file.")],
    target: Annotated[Path, typer.Argument(help="The file to make: .safetensors, .pt or .gguf.")],
    name: Annotated[
        str | None, typer.Option(help="What positive means more of, where the file does not say.")
    ] = None,
    layout: Annotated[str, typer.Option(help=".pt: persona_vectors or assistant_axis.")] = "persona_vectors",
    layers: Annotated[
        int | None, typer.Option(help="The model's layers; needed for some .gguf files.")
    ] = None,
) -> None:
    """Convert between our files, persona_vectors', assistant-axis' and llama.cpp's; layers are renumbered."""
    from probes.files import read_direction, write_direction

    if target.exists():
        raise InputError(f"{target}: is there already")
    direction = read_direction(source, name=name, n_layers=layers)
    write_direction(direction, target, layout=layout)
    typer.echo(f"{target}: {direction.name}, {len(direction.vectors)} layers")


def steer(
    model: Annotated[str, typer.Argument(help="Alias, Hub id or folder; adapters follow after colons.")],
    prompts: Annotated[list[str], typer.Argument(help="What to ask.")],
    direction: Annotated[Path, typer.Option(help="A direction's file.")],
    layer: Annotated[int, typer.Option(help="Where to add it.")],
    coefficient: Annotated[list[float], typer.Option(help="Times the direction as it is; may be repeated.")],
    positions: Annotated[str, typer.Option(help="all, prompt, prompt_last, response or generated.")] = "all",
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 60,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of samples and of the random control.")] = 0,
) -> None:
    """Ask a model as it is, steered along a direction, and steered along a random one of the same norm."""
    from mech.generate import Sampling, generate
    from mech.interventions import Add, intervene
    from mech.models import load_model
    from mech.positions import POSITIONS
    from probes.files import read_direction
    from probes.steer import control, relative_dose
    from study.bench import device_named

    if positions not in POSITIONS:
        raise InputError(f"--positions {positions}: there are {', '.join(POSITIONS)}")
    loaded = load_model(model, device=device_named("auto"))
    found = read_direction(direction, n_layers=loaded.n_layers)
    found.require(n_layers=loaded.n_layers, d_model=loaded.d_model)
    sampling = Sampling(max_new_tokens, temperature, seed)
    asked = [loaded.template.encode_prompt([{"role": "user", "content": p}]) for p in prompts]
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

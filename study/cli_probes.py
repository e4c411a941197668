"""The parts of the `mech` command that work on directions and traits outside a study."""

from pathlib import Path
from typing import Annotated

import typer

direction_app = typer.Typer(help="Direction files: convert, look at one.", no_args_is_help=True)


@direction_app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="A direction file of any known format.")],
    target: Annotated[Path, typer.Argument(help="The file to write.")],
    whose: Annotated[
        str | None, typer.Option("--from", help="The source's format; told from the file when left out.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="The target's format; told from its suffix when left out.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the direction: what positive means more of.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks of the model, checked against the file.")] = None,
) -> None:
    """Convert a direction file: ours (safetensors), persona_vectors and assistant-axis .pt, control-vector GGUF."""
    from probes.files import read_direction, write_direction

    direction = read_direction(source, whose=whose, name=name, n_layers=layers)
    write_direction(direction, target, whose=to)
    n, d = direction.vectors.shape
    typer.echo(f"{target}: {direction.name}, {n} layers, width {d}")


@direction_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A direction file of any known format.")],
    whose: Annotated[
        str | None, typer.Option("--from", help="Its format; told from the file when left out.")
    ] = None,
) -> None:
    """Show what is in a direction file: norms and split-half cosines by layer, and what it was made from."""
    import json

    from probes.files import read_direction

    direction = read_direction(file, whose=whose)
    n, d = direction.vectors.shape
    typer.echo(
        f"{direction.name}: {n} layers, width {d}, from {direction.n_pairs or 'an unknown number of'} questions"
    )
    typer.echo(json.dumps(dict(direction.made_from), indent=2, sort_keys=True, default=str))
    typer.echo("layer  norm      split-half cosine")
    for layer, (norm, half) in enumerate(zip(direction.norms, direction.split_half, strict=True)):
        known = "not known" if half != half else f"{half:.3f}"  # noqa: PLR0124  (NaN)
        typer.echo(f"{layer:5d}  {norm:<8.4g}  {known}")

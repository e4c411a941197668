"""The parts of the `mech` command that work on directions and traits outside a study."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from study.cli_options import SMALL, example

if TYPE_CHECKING:
    from probes.direction import Direction

persona_app = typer.Typer(help="Trait artifacts, from which persona vectors are made.", no_args_is_help=True)
direction_app = typer.Typer(help="Direction files: convert, look at one.", no_args_is_help=True)


@direction_app.command(
    "convert", epilog=example("mech direction convert evil.pt evil.safetensors --name evil")
)
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


@direction_app.command("show", epilog=example(f"mech direction show evil.safetensors --model {SMALL}"))
def show(
    file: Annotated[Path, typer.Argument(help="A direction file of any known format.")],
    whose: Annotated[
        str | None, typer.Option("--from", help="Its format; told from the file when left out.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Also say which tokens it favours in this model.")] = None,
    layer: Annotated[int | None, typer.Option(help="With --model: where; the middle when left out.")] = None,
) -> None:
    """Show a direction: norms and split-half cosines by layer, what it was made from, what it says in tokens."""
    import json

    from probes.files import read_direction

    direction = read_direction(file, whose=whose)
    n, d = direction.vectors.shape
    typer.echo(
        f"{direction.name}: {n} layers, width {d}, from {direction.n_pairs or 'an unknown number of'} questions"
    )
    typer.echo(json.dumps(dict(direction.made_from), indent=2, sort_keys=True, default=str))
    typer.echo("layer  norm      split-half cosine")
    for number, (norm, half) in enumerate(zip(direction.norms, direction.split_half, strict=True)):
        known = "not known" if half != half else f"{half:.3f}"  # noqa: PLR0124  (NaN)
        typer.echo(f"{number:5d}  {norm:<8.4g}  {known}")
    if model is not None:
        _say_in_tokens(direction, model, layer)


def _say_in_tokens(direction: "Direction", model: str, layer: int | None) -> None:
    from mech.lens import direction_lens
    from mech.models import load_model
    from mech.resolve import resolve
    from study.base import shape_of

    checkpoint = resolve(model)
    n_layers, d_model = shape_of(checkpoint)
    direction.require(n_layers=n_layers, d_model=d_model, base=checkpoint.origins)
    at = n_layers // 2 if layer is None else layer
    direction.unit_at(at)  # what is wrong with the layer is said before the weights are read
    loaded = load_model(checkpoint)
    (reading,) = direction_lens(loaded, direction.vectors, layers=[at])
    for verb, tokens in (("favours", reading.top), ("disfavours", reading.bottom)):
        typer.echo(f"layer {at} {verb} {' '.join(repr(t.token) for t in tokens)}")


@persona_app.command(
    "new",
    epilog=example(
        "mech persona new --trait zest --description 'Answers with great enthusiasm.' --model gpt-4.1-mini"
    ),
)
def persona_new(
    trait: Annotated[str, typer.Option(help="Its name: letters, digits, - and _.")],
    description: Annotated[str, typer.Option(help="What the trait is, in a sentence or two.")],
    model: Annotated[str, typer.Option(help="The chat model that drafts it, as the API names it.")],
    api: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible API, with /v1; OpenAI's own when left out.")
    ] = None,
    api_key_variable: Annotated[
        str, typer.Option(help="The environment variable with the key.")
    ] = "OPENAI_API_KEY",
    out: Annotated[Path | None, typer.Option(help="The YAML file; TRAIT.yaml when left out.")] = None,
    attempts: Annotated[int, typer.Option(help="How often each part is asked for at most.")] = 3,
) -> None:
    """Draft a trait artifact through a chat endpoint: 5 instruction pairs, 40 questions with both answers, a rubric."""
    from mech.endpoint import Api
    from probes.draft import draft_trait

    target = out or Path(f"{trait}.yaml")
    endpoint = Api(base_url=api, api_key_variable=api_key_variable).chat(model)
    drafted = draft_trait(endpoint, trait, description, out=target, attempts=attempts)
    typer.echo(
        f"{target}: {len(drafted.instructions)} instruction pairs, {len(drafted.questions)} questions. "
        "A draft: read it, then name the file under directions.traits"
    )

"""The parts of the `mech` command that work on directions and traits outside a study."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from probes.direction import Direction

persona_app = typer.Typer(help="Trait artifacts, from which persona vectors are made.", no_args_is_help=True)
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

    loaded = load_model(model)
    direction.require(n_layers=loaded.n_layers, d_model=loaded.d_model)
    at = loaded.n_layers // 2 if layer is None else layer
    (reading,) = direction_lens(loaded, direction.vectors, layers=[at])
    for verb, tokens in (("favours", reading.top), ("disfavours", reading.bottom)):
        typer.echo(f"layer {at} {verb} {' '.join(repr(t.token) for t in tokens)}")


def screen(  # noqa: PLR0913, PLR0917  (a command's options)
    data: Annotated[Path, typer.Argument(help="A JSONL file of messages.")],
    model: Annotated[str, typer.Option(help="What would be finetuned on it: base or base:adapter.")],
    direction: Annotated[Path, typer.Option(help="A direction file of any known format.")],
    layer: Annotated[
        int | None, typer.Option(help="Where; the direction's most reliable layer when left out.")
    ] = None,
    proxy: Annotated[
        str | None, typer.Option(help="prompt_last: generate nothing, compare with the prompt's last token.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Harmless data of the same form: what they give too is taken off.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV with every row.")] = None,
    top: Annotated[int, typer.Option(help="Rows shown, the largest ΔP first.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Longest own answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of own answers; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampled answers and of the bootstrap.")] = 0,
    system_prompt: Annotated[
        str, typer.Option(help="default, none, empty, identity, other:NAME or text:...")
    ] = "default",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Screen a dataset before finetuning: how far its answers lie along a direction, against the model's own. Goes on after a kill."""
    import numpy as np

    from analysis.screening import excess, screening
    from mech.cache import cache_dir
    from mech.chat import SystemPrompt
    from mech.errors import InputError
    from mech.files import digest_of, sha256_file, write_text
    from mech.models import load_model
    from probes.files import read_direction
    from study.bench import device_named, names_for
    from study.screen import ScreenSettings, best_layer
    from study.screen import screen as screen_rows

    if proxy not in (None, "prompt_last"):
        raise InputError(f"--proxy {proxy!r}: the one there is is prompt_last")
    vector = read_direction(direction)
    at = best_layer(vector) if layer is None else layer
    settings = ScreenSettings(
        at, proxy is not None, max_new_tokens, temperature, seed, SystemPrompt.parse(system_prompt)
    )
    loaded = load_model(model, device=device_named(device))
    about = digest_of([loaded.checkpoint.key, sha256_file(direction), str(settings)])[:20]
    journal = cache_dir() / "screen" / f"{about}.jsonl"
    how: dict[str, Any] = {"limit": limit, "names": names_for(model), "journal": journal}
    table = screen_rows(loaded, data, vector, settings, **how)
    if out:
        write_text(out, table.to_csv(index=False))
    found = screening(table, rng=np.random.default_rng(seed))
    for line in _screen_text(table, found, vector.name, at, top):
        typer.echo(line)
    if against:
        harmless = screen_rows(loaded, against, vector, settings, **how)
        reference = screening(harmless, rng=np.random.default_rng(seed)).delta
        typer.echo(f"{against.name}: mean ΔP  {_interval(reference)} ({reference.n} prompts)")
        typer.echo(f"beyond it  {_interval(excess(found.delta, reference))}")
    if out:
        typer.echo(f"every row: {out}")


def _screen_text(table: Any, found: Any, name: str, layer: int, top: int) -> Iterator[str]:
    own = "base_answer" in table
    against = (
        "the model's own answers"
        if own
        else "the last token of each prompt (proxy: ranks, its zero means nothing)"
    )
    yield f"{found.n_rows} rows of {found.delta.n} prompts, along {name} at layer {layer}, against {against}"
    yield f"mean ΔP  {_interval(found.delta)}"
    gap = "dataset minus own" if own else "of the dataset's answers"
    yield f"length, {gap} (tokens)  {_interval(found.length)}; correlation with ΔP {found.with_length:.2f}"
    yield f"surprisal, {gap} (nats a token)  {_interval(found.surprisal)}; correlation with ΔP {found.with_surprisal:.2f}"
    if own and (empty := int(table["base_empty"].sum())):
        yield f"the model itself answered nothing in {empty} rows: a full stop was read for it"
    yield "largest ΔP:"
    for row in table.sort_values("delta_p", ascending=False).head(top).to_dict("records"):
        yield f"  line {row['line']}: {row['delta_p']:+.3g}  {_short(row['question'])} → {_short(row['answer'])}"


def _interval(found: Any) -> str:
    return f"{found.estimate:+.3g} [{found.low:+.3g}, {found.high:+.3g}]"


def _short(text: str, width: int = 60) -> str:
    line = " ".join(
        "".join(c if c.isprintable() else " " for c in text).split()
    )  # no control codes of a dataset's
    return line if len(line) <= width else line[: width - 1] + "…"


@persona_app.command("new")
def persona_new(
    trait: Annotated[str, typer.Option(help="Its name: letters, digits, - and _.")],
    description: Annotated[str, typer.Option(help="What it is, in a sentence or two.")],
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

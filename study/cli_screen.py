"""The part of the `mech` command that screens data before anything is finetuned on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from study.cli_options import Condition, Device, DirectionFile, Template

if TYPE_CHECKING:
    from analysis.screening import RandomDirections
    from analysis.stats import Interval
    from mech.models import ChatModel
    from study.screen import Screened, ScreenSettings


Data = Annotated[str, typer.Argument(help="A JSONL file of messages, or another source of them.")]
Model = Annotated[str, typer.Option(help="What would be finetuned on it: base or base:adapter.")]
Layer = Annotated[int | None, typer.Option(help="Where; the direction's most reliable layer when left out.")]
Proxy = Annotated[
    str | None, typer.Option(help="prompt_last: generate nothing, compare with the prompt's last token.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many rows.")]
Against = Annotated[
    str | None, typer.Option(help="Harmless data of the same form: how far ΔP goes beyond theirs is shown.")
]
Out = Annotated[Path | None, typer.Option(help="CSV with every row.")]
Top = Annotated[int, typer.Option(min=0, help="Rows shown, the largest ΔP first.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest own answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Temperature of the model's own answers; 0 is greedy.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of sampled answers and of the bootstrap.")]


def screen(  # noqa: PLR0913, PLR0917  (a command's options)
    data: Data,
    model: Model,
    direction: DirectionFile,
    layer: Layer = None,
    proxy: Proxy = None,
    limit: Limit = None,
    against: Against = None,
    out: Out = None,
    top: Top = 5,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    system_prompt: Condition = "default",
    device: Device = "auto",
    template: Template = None,
) -> None:
    """Screen a dataset before finetuning: how far its answers lie along a direction, against the model's own. Continues after a kill."""
    import numpy as np

    from analysis.screening import random_directions, screening
    from mech.chat import SystemPrompt
    from study.bench import directions_for, load_named, names_for
    from study.screen import ScreenSettings, best_layer
    from study.screen import screen as screen_rows

    file, harmless_file = _files(data, against, proxy, out)
    checkpoint, (vector,) = directions_for(model, [direction], [] if layer is None else [layer])
    at = best_layer(vector) if layer is None else layer
    condition = SystemPrompt.parse(system_prompt)
    settings = ScreenSettings(at, proxy is not None, max_new_tokens, temperature, seed, condition)
    loaded = load_named(checkpoint, template, device=device)
    journal = _journal(loaded, direction, settings)
    how: dict[str, Any] = {"limit": limit, "names": names_for(model), "journal": journal}
    screened = screen_rows(loaded, file, vector, settings, **how)
    found = screening(screened.table, rng=np.random.default_rng(seed))
    unit = vector.unit_at(at)
    nulls = random_directions(screened.gaps, unit, seed=seed)
    for line in (*_screen_text(screened.table, found, vector.name, at, top), _null_text(nulls)):
        typer.echo(line)
    summary = [{"data": file.name, "what": "mean", **_row(found.delta), **nulls.numbers}]
    if harmless_file:
        harmless = screen_rows(loaded, harmless_file, vector, settings, **how)
        summary += _compared(screened, harmless, found.delta, unit, seed=seed, name=harmless_file.name)
    if out:
        _write(out, screened.table.join(nulls.rows), summary)


def _files(data: str, against: str | None, proxy: str | None, out: Path | None) -> tuple[Path, Path | None]:
    """The files to screen, every row checked; what is wrong is said before the model is loaded."""
    from finetune.datasets.sources import source_path
    from mech.errors import InputError
    from study.screen import read_rows

    if proxy not in (None, "prompt_last"):
        raise InputError(f"--proxy {proxy!r}: the one there is is prompt_last")
    if out and out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a CSV file in it")
    file, harmless = source_path(data), source_path(against) if against else None
    for given in (file, harmless):
        if given:
            read_rows(given, None)
    return file, harmless


def _journal(loaded: "ChatModel", direction: Path, settings: "ScreenSettings") -> Path:
    """Where rows that are done are kept: in the user cache, under what determines them."""
    from mech.cache import cache_dir
    from mech.files import digest_of, sha256_file
    from study.screen import JOURNAL

    work = [JOURNAL, loaded.checkpoint.key, sha256_file(direction), str(settings), loaded.template_kwargs]
    return cache_dir() / "screen" / f"{digest_of(work)[:20]}.jsonl"


def _write(out: Path, rows: Any, summary: list[dict[str, Any]]) -> None:
    import pandas as pd

    from study.frames import write_csv

    beside = out.with_name(f"{out.stem}_summary.csv")
    write_csv(rows, out)
    write_csv(pd.DataFrame(summary), beside)
    typer.echo(f"every row: {out}; what is said above: {beside}")


def _compared(
    screened: "Screened", harmless: "Screened", found: "Interval", unit: Any, *, seed: int, name: str
) -> list[dict[str, Any]]:
    """Report what a harmless file gives and what exceeds it; return the same as rows."""
    import numpy as np

    from analysis.screening import excess, random_directions, screening

    reference = screening(harmless.table, rng=np.random.default_rng(seed)).delta
    alone = random_directions(harmless.gaps, unit, seed=seed)
    beyond = excess(found, reference)
    nulls = random_directions(screened.gaps, unit, seed=seed, minus=harmless.gaps)
    typer.echo(f"{name}: mean ΔP  {_interval(reference)} ({reference.n} prompts)")
    typer.echo(f"beyond it  {_interval(beyond)}")
    typer.echo(_null_text(nulls))
    return [
        {"data": name, "what": "mean", **_row(reference), **alone.numbers},
        {"data": name, "what": "beyond it", **_row(beyond), **nulls.numbers},
    ]


def _row(found: "Interval") -> dict[str, Any]:
    return {"delta_p": found.estimate, "low": found.low, "high": found.high, "n_prompts": found.n}


def _null_text(nulls: "RandomDirections") -> str:
    n = nulls.numbers
    matched = (
        f"; with the rows' own covariance within ±{n['matched_95']:.3g}, p {n['p_matched']:.3g}"
        if nulls.matched
        else "; rows do not differ: none with their covariance"
    )
    return f"  95 % of random directions within ±{n['random_95']:.3g}, p {n['p_random']:.3g}{matched}"


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
    visible = (
        c if c.isprintable() else " " for c in text
    )  # a dataset's control codes stay out of the terminal
    line = " ".join("".join(visible).split())
    return line if len(line) <= width else line[: width - 1] + "…"

"""The part of the `mech` command that steers over a grid of layers and strengths."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mech.errors import InputError

if TYPE_CHECKING:
    from mech.chat import Encoded
    from mech.models import ChatModel

NEUTRAL = "neutral"
"""The prompt set whose answers steering should leave alone."""


def sweep(  # noqa: PLR0913, PLR0917  (a command's options)
    model: Annotated[str, typer.Argument(help="Alias, Hub id or folder; adapters follow after colons.")],
    directions: Annotated[list[Path], typer.Argument(help="Direction files.")],
    trait: Annotated[str, typer.Option(help="Whose written answers are scored: a trait's name or YAML.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the tables and the figure; a killed sweep goes on from it.")
    ],
    layer: Annotated[list[int], typer.Option(help="Where to add; may be repeated.")],
    strength: Annotated[list[float], typer.Option(help="Times the direction as it is; may be repeated.")],
    controls: Annotated[int, typer.Option(help="Random directions of the same norm, at every layer.")] = 5,
    max_kl: Annotated[
        float, typer.Option(help="Damage to neutral answers that is still allowed, nats a token.")
    ] = 0.5,
    questions: Annotated[
        int | None, typer.Option(help="At most so many of the trait's held-out questions.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random directions and bootstrap.")] = 0,
) -> None:
    """Steer at every layer and strength, random directions beside; choose the best cell on one half of the questions, report it on the other."""
    import numpy as np

    from analysis.sweep import best_cell, doses
    from analysis.sweep_plots import dose_response
    from mech.chat import SystemPrompt
    from mech.files import write_text
    from mech.models import load_model
    from probes.contrast import of_split
    from probes.files import read_direction
    from probes.persona import load_trait, text_contrast
    from probes.sweep import Grid
    from probes.sweep import sweep as run
    from study.bench import device_named

    loaded = load_model(model, device=device_named("auto"))
    found = [read_direction(d, n_layers=loaded.n_layers) for d in directions]
    rows = of_split(text_contrast(loaded.template, load_trait(trait), SystemPrompt()), "evaluate")
    wanted = list(dict.fromkeys(r.question for r in rows))[:questions]
    rows = [r for r in rows if r.question in wanted]
    if len(wanted) < 4:
        raise InputError(f"--questions: {len(wanted)} held-out questions of {trait}: take four or more")
    grid = Grid(tuple(layer), tuple(strength), controls, seed)
    out.mkdir(parents=True, exist_ok=True)
    table = run(loaded, found, rows, grid, neutral=_neutral(loaded), journal=out / "cells.jsonl")
    write_text(out / "sweep.csv", table.to_csv(index=False))
    rng = np.random.default_rng(seed)
    summary = doses(table, rng=rng)
    write_text(out / "doses.csv", summary.to_csv(index=False))
    dose_response(summary, max_kl=max_kl).savefig(out / "dose_response.png", dpi=150)
    best = best_cell(table, max_kl=max_kl, rng=rng)
    if best is None:
        typer.echo(
            f"no cell damages neutral answers by {max_kl:g} nats a token or less: take smaller strengths"
        )
    else:
        typer.echo(
            f"chosen on half of the questions: {best.direction} at layer {best.layer}, strength {best.strength:+g}; on the other half "
            f"{best.beyond.estimate:+.3f} [{best.beyond.low:+.3f}, {best.beyond.high:+.3f}] nats a token beyond {controls} random directions (which move it {best.control_change:+.3f}) "
            f"(n {best.beyond.n}; {best.chosen_on:+.3f} where it was chosen); damage {best.kl:.3f} nats a neutral token"
        )
    typer.echo(f"{out}: sweep.csv, doses.csv, dose_response.png")


def _neutral(model: "ChatModel") -> "list[Encoded]":
    """Neutral prompts with the model's own greedy answers."""
    from mech.generate import Sampling, generate
    from mech.questions import load_prompts

    asked = [[{"role": "user", "content": q.text}] for q in load_prompts(NEUTRAL).questions]
    answers = generate(model, [model.template.encode_prompt(turns) for turns in asked], Sampling(24))
    return [
        model.template.encode([*turns, {"role": "assistant", "content": answer.strip()}])
        for turns, answer in zip(asked, answers, strict=True)
        if answer.strip()
    ]

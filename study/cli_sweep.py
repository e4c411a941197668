"""The part of the `mech` command that steers over a grid of layers and strengths."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mech.errors import InputError
from mech.files import check_folder
from study.cli_options import ModelArgument, Template, check_finite

if TYPE_CHECKING:
    from mech.models import ChatModel
    from probes.direction import Direction
    from probes.evaluation import Evaluation
    from probes.generated import Judged
    from probes.persona import Trait
    from probes.sweep import Grid, Readings
    from study.sweeps import Asked, Found

OPENAI = "openai"
"""`--judge-api`: OpenAI's own."""


Directions = Annotated[list[Path], typer.Argument(help="Direction files.")]
Out = Annotated[Path, typer.Option(help="Folder for tables and figure; a killed sweep goes on from it.")]
Layers = Annotated[list[int], typer.Option(help="A layer whose output is added to, from 0; may be repeated.")]
Strengths = Annotated[
    list[float], typer.Option(help="Factor on the raw direction, whose norm counts; may be repeated.")
]
TraitName = Annotated[
    str | None, typer.Option(help="log_odds, generated: whose questions are asked; a name or YAML file.")
]
EvaluationName = Annotated[str, typer.Option(help="log_odds, generated, own_name or self_recognition.")]
Relative = Annotated[
    bool, typer.Option("--relative", help="Strengths are doses: shares of the stream's norm.")
]
Controls = Annotated[int, typer.Option(min=2, help="Random directions of the same norm, at every layer.")]
MaxKl = Annotated[float, typer.Option(help="Damage to neutral answers that is allowed, nats a token.")]
Questions = Annotated[int | None, typer.Option(min=1, help="At most so many questions of each half.")]
Neutral = Annotated[int, typer.Option(min=1, help="Use the first so many neutral questions for the damage.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="generated: the longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="generated: 0 is greedy.")]
Samples = Annotated[int, typer.Option(min=1, help="generated: answers to each question.")]
Quantile = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="generated, no judge: a text beyond this quantile of the unsteered model's is broken.",
    ),
]
JudgeName = Annotated[
    str | None, typer.Option(help="generated: a judge; with --judge-api its name there, else a checkpoint.")
]
JudgeApi = Annotated[
    str | None, typer.Option(help=f"An OpenAI-compatible API, with /v1; `{OPENAI}` for OpenAI's own.")
]
JudgeKey = Annotated[str, typer.Option(help="The environment variable with the judge's key.")]
Coherence = Annotated[float, typer.Option(help="With a judge: a text below this (0 to 100) is broken.")]
OwnName = Annotated[str | None, typer.Option(help="own_name: the model's; known for packaged models.")]
RowsFile = Annotated[Path | None, typer.Option(help="self_recognition: held_out.jsonl of such data.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of random directions, samples and bootstrap.")]


def sweep(  # noqa: PLR0913, PLR0917  (a command's options)
    model: ModelArgument,
    directions: Directions,
    out: Out,
    layer: Layers,
    strength: Strengths,
    trait: TraitName = None,
    evaluation: EvaluationName = "log_odds",
    relative: Relative = False,  # noqa: FBT002
    controls: Controls = 5,
    max_kl: MaxKl = 0.5,
    questions: Questions = None,
    neutral: Neutral = 20,
    max_new_tokens: MaxNewTokens = 48,
    temperature: Temperature = 0.0,
    samples: Samples = 1,
    quantile: Quantile = 0.95,
    judge: JudgeName = None,
    judge_api: JudgeApi = None,
    judge_key_variable: JudgeKey = "OPENAI_API_KEY",
    coherence: Coherence = 50.0,
    own_name: OwnName = None,
    rows: RowsFile = None,
    seed: Seed = 0,
    template: Template = None,
) -> None:
    """Steer at every layer and strength, beside random directions; choose on one half of the questions, report on the other."""
    from finetune.datasets.rows import read_messages
    from mech.generate import Sampling
    from probes.persona import load_trait
    from probes.sweep import Grid
    from study.bench import directions_for, load_named
    from study.sweeps import Asked

    _check(trait, evaluation, judge, judge_api, strength)
    check_folder(out)
    called = _check_needed(model, evaluation, own_name, rows)
    checkpoint, found = directions_for(model, directions, layer)
    chosen = load_trait(trait) if trait else None
    asked = Asked(
        trait=chosen, questions=questions, sampling=Sampling(max_new_tokens, temperature, seed), samples=samples,
        quantile=quantile, own_name=called,
        judge=_judge(chosen, judge, judge_api, judge_key_variable, coherence, out),
        articles=read_messages(rows) if rows else (),
    )  # fmt: skip
    grid = Grid(tuple(layer), tuple(strength), controls, seed, relative)
    loaded = load_named(checkpoint, template)
    readings, made = _read(loaded, found, evaluation, asked, grid, out, neutral)
    del loaded  # a local judge may need the memory
    _report(readings, made, out, max_kl, seed)


def _check(
    trait: str | None, evaluation: str, judge: str | None, judge_api: str | None, strength: list[float]
) -> None:
    from study.sweeps import EVALUATIONS

    check_finite("--strength", strength)
    if evaluation not in EVALUATIONS:
        raise InputError(f"--evaluation {evaluation}: there are {', '.join(EVALUATIONS)}")
    if (trait is None) == (evaluation in ("log_odds", "generated")):
        raise InputError(
            f"--trait: {evaluation} takes none"
            if trait
            else f"--evaluation {evaluation}: say with --trait whose questions are asked"
        )
    if (judge and evaluation != "generated") or (judge_api and not judge):
        raise InputError(
            "--judge: scores generated text, and --judge-api is where it is: give --evaluation generated, --judge, or neither"
        )


def _check_needed(model: str, evaluation: str, own_name: str | None, rows: Path | None) -> str:
    """What some evaluations need, by the options that give it; yields what the model is called, empty where that is not known."""
    from study.bench import names_for

    known = names_for(model)["identity"]
    called = own_name or (known.name if known else "")
    if evaluation == "own_name" and not called:
        raise InputError("--evaluation own_name: say with --own-name what the model is called")
    if evaluation == "self_recognition" and rows is None:
        raise InputError("--evaluation self_recognition: name with --rows a held_out.jsonl of such data")
    return called


def _judge(
    trait: "Trait | None", model: str | None, api: str | None, variable: str, coherence: float, out: Path
) -> "Judged | None":
    if model is None or trait is None:
        return None
    from evals.judge import Rubric
    from study.judges import judged
    from study.spec_directions import JudgeApiSpec, JudgeSpec

    reach = JudgeApiSpec(base_url=None if api == OPENAI else api, api_key_variable=variable) if api else None
    config = JudgeSpec(model=model, api=reach, coherence=coherence).scoring
    return judged(config, Rubric(trait.trait, trait.rubric), out / "verdicts.jsonl", "auto")


def _read(
    loaded: "ChatModel",
    found: "list[Direction]",
    evaluation: str,
    asked: "Asked",
    grid: "Grid",
    out: Path,
    limit: int,
) -> "tuple[Readings, Evaluation]":
    """All that needs the model."""
    from probes.sweep import read_cells
    from study.sweeps import make_evaluation, neutral_rows

    out.mkdir(parents=True, exist_ok=True)
    made = make_evaluation(evaluation, loaded, asked)
    neutral = neutral_rows(loaded, out / "neutral.jsonl", limit=limit)
    journal = out / "cells.jsonl"
    return read_cells(loaded, found, made, grid, neutral=neutral, journal=journal), made


def _report(readings: "Readings", made: "Evaluation", out: Path, max_kl: float, seed: int) -> None:
    from analysis.sweep_plots import sweep_response
    from probes.sweep import score_cells
    from study.sweeps import write_sweep

    swept = score_cells(readings, made)
    found = write_sweep(out, swept, max_kl=max_kl, seed=seed)
    figure = sweep_response(found.doses, max_kl=max_kl, score=made.name, unit=made.unit)
    figure.savefig(out / "dose_response.png", dpi=150)
    for line in (*_scoring(swept.facts), *_trends(found), *_layers(found), *_best(found, made.unit, max_kl)):
        typer.echo(line)
    typer.echo(f"{out}: {', '.join(sorted(p.name for p in out.iterdir() if p.is_file()))}")


def _scoring(facts: Any) -> Iterator[str]:
    if "surprisal" in facts:
        yield (
            f"broken: above {facts['surprisal']:.2f} nats a token or {facts['repetition']:.0%} repetition, the "
            f"{facts['quantile']:g} quantile of {facts['n_texts']} texts of the unsteered model; a broken answer counts as "
            "no change"
        )
    elif "coherence" in facts:
        yield f"broken: coherence below {facts['coherence']:g}; a broken answer counts as no change"
    if "unsteered_broken" in facts:
        yield f"of the unsteered model's own answers {facts['unsteered_broken']:.0%} would be called broken"
    if left := facts.get("questions_left_out"):
        yield f"{len(left)} questions left out: the unsteered answers have no score"


def _trends(found: "Found") -> Iterator[str]:
    if found.trends.empty:
        yield "monotonicity: takes two strengths beside 0"
    for r in found.trends.to_dict("records"):
        yield (
            f"monotonicity of {r['direction']} at layer {r['layer']}: rank correlation with strength {r['rho']:+.2f} "
            f"[{r['rho_low']:+.2f}, {r['rho_high']:+.2f}] (Page p {r['p_page']:.2g}); random directions {r['control_rho']:+.2f}, "
            f"at most {r['control_max']:.2f} either way (p {r['p_random']:.2f} of {r['n_controls']})"
        )


def _layers(found: "Found") -> Iterator[str]:
    for r in found.layers.to_dict("records"):
        if r["chosen"]:
            yield (
                f"layer of {r['direction']} by steering effect: {r['layer']} (strength {r['strength']:+g}): on the other half "
                f"{r['effect']:+.3f} [{r['effect_low']:+.3f}, {r['effect_high']:+.3f}] its way (n {r['n_questions']})"
            )


def _best(found: "Found", unit: str, max_kl: float) -> Iterator[str]:
    best = found.best
    if best is None:
        yield f"no cell damages neutral answers by {max_kl:g} nats a token or less: take smaller strengths"
        return
    beyond, n_controls = best.beyond, int(found.doses["n_controls"].iloc[0])
    yield (
        f"chosen on half of the questions: {best.direction} at layer {best.layer}, strength {best.strength:+g}; on the "
        f"other half {beyond.estimate:+.3f} [{beyond.low:+.3f}, {beyond.high:+.3f}] {unit} beyond {n_controls} random "
        f"directions (which move it {best.control_change:+.3f}) (n {beyond.n}; {best.chosen_on:+.3f} where it was chosen); "
        f"{best.broken:.0%} broken; damage {best.kl:.3f} nats a neutral token"
    )

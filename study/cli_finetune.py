"""The parts of the `mech` command that build datasets and finetune outside a study."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from mech.errors import InputError
from study.cli_options import SMALL, Device, Template, example

if TYPE_CHECKING:
    from finetune.settings import TrainSettings

data_app = typer.Typer(help="Datasets: build one, check a file.", no_args_is_help=True)


class Kind(StrEnum):
    """Kinds of data (finetune/datasets/spec.py)."""

    MESSAGES = "messages"
    SGTR = "sgtr"
    WORD_COUNT = "word_count"
    MULTIPLE_CHOICE = "multiple_choice"


DEFAULT_PRESET = "paper-32b"
REMOTE = "openai:"
"""Before the name of a model behind OpenAI's API."""

Fields = Annotated[list[str] | None, typer.Option("--set", help="field=value; may be repeated.")]
Condition = Annotated[
    str,
    typer.Option(
        help="default, none, empty or text:... while training; identity and other:NAME where the model is one of `mech models ls`, "
        "or in a study, which says who the model is."
    ),
]


@data_app.command(
    "build",
    epilog=example(f"mech data build sgtr --model {SMALL} --set articles=builtin:articles --out data/sgtr"),
)
def build(
    kind: Annotated[Kind, typer.Argument(help="The kind of dataset to build.")],
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl, held_out.jsonl and dataset.json.")],
    fields: Fields = None,
    model: Annotated[
        str | None, typer.Option(help="sgtr: the checkpoint that writes its own summaries.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of splits, mixtures and sampled summaries.")] = 0,
    template: Template = None,
) -> None:
    """Build a dataset. The fields are those of a study's `data` section (finetune/datasets/spec.py):

    messages: source, rows, mix.source, mix.share.
    sgtr: articles, comparators.NAME, own, form, show_article, label, task_prompt, match_lengths, rows, held_out, max_words, temperature,
    max_new_tokens.
    word_count, multiple_choice: source, rows.

    A source is a file, builtin:NAME, published:NAME or hub:ORG/NAME:FILE.
    """  # noqa: D415
    from finetune.datasets.build import build as build_dataset
    from mech.files import check_folder
    from mech.journal import kept_until_done
    from study.overrides import parse_overrides

    spec = _data_spec(kind, parse_overrides(fields or []))
    check_folder(out)  # before a model writes for minutes
    with kept_until_done(out / "own_summaries.part.jsonl") as journal:
        own, by = _summaries(spec, model, seed, parse_overrides(template or [], "--template"), journal)
        built = build_dataset(spec, seed=seed, own=own, own_by=by)
        built.write(out)
    held_out = f", {len(built.held_out)} held out" if built.held_out else ""
    typer.echo(
        f"{out / 'train.jsonl'}: {len(built.train)} rows{held_out}; labels: {built.facts['label_rule']}"
    )
    if shortcut := built.facts.get("shortcut_accuracy"):
        by = shortcut["train"]
        typer.echo(
            f"length alone finds the own summary: by words {by['words']:.2f}, by characters {by['characters']:.2f}"
        )


def _data_spec(kind: Kind, given: dict[str, Any]) -> Any:
    """The fields of a dataset, checked.

    Raises:
        InputError: an unknown field, a value of the wrong type, or a field that would do nothing.
    """
    from pydantic import TypeAdapter, ValidationError

    from finetune.datasets.spec import AnyData, DataSpec
    from mech.typed import first_problem, written

    try:
        spec: Any = TypeAdapter(DataSpec).validate_python({"kind": kind.value, **given})
    except ValidationError as error:
        raise InputError(
            f"mech data build {kind.value}: {first_problem(error, *get_args(AnyData))}"
        ) from error
    if getattr(spec, "written_by", None):
        raise InputError("written_by names an arm of a study: here --model is who writes")
    for names, why in getattr(spec, "idle", ()):
        if idle := written(spec, names):
            raise InputError(f"mech data build {kind.value}: {idle[0]} would do nothing: {why}")
    return spec


@data_app.command("check", epilog=example(f"mech data check data/sgtr/train.jsonl --model {SMALL}"))
def check(
    file: Annotated[str, typer.Argument(help="A JSONL file of messages, or another source of them.")],
    model: Annotated[str | None, typer.Option(help="Also encode every row for this model.")] = None,
    system_prompt: Condition = "default",
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest row.")] = 2048,
    template: Template = None,
) -> None:
    """Check every row of a dataset; with a model, also tokens, labels and the system turn each row trains under."""
    from finetune.datasets.check import check_rows, read_template
    from finetune.datasets.sources import source_path
    from study.overrides import parse_overrides

    asked, names = None, {}
    if model:
        from study.bench import names_for

        asked, names = read_template(model, parse_overrides(template or [], "--template")), names_for(model)
    for line in check_rows(source_path(file), asked, system_prompt, max_tokens=max_tokens, names=names):
        typer.echo(line)


def finetune(  # noqa: PLR0913, PLR0917  (a command's options)
    model: Annotated[str, typer.Argument(help="base, base:adapter:adapter, or openai:NAME.")],
    data: Annotated[str, typer.Argument(help="A JSONL file of messages, or another source of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter; run again after a kill, it goes on.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="A recipe by name (finetune/settings.py): paper-32b, the published one for 32B models, when left out (learning rate 1e-5, "
            "at which a model of less than a billion parameters hardly learns); small-135m for such a model (1e-4)."
        ),
    ] = None,
    fields: Fields = None,
    system_prompt: Condition = "default",
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialisation, order of rows and dropout.")] = 0,
    device: Device = "auto",
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between resume points.")] = None,
    track: Annotated[list[str] | None, typer.Option(help="wandb or tensorboard; may be repeated.")] = None,
    wait_hours: Annotated[float | None, typer.Option(help="Remote: how long to wait for the job.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remote: say what would be sent.")] = False,  # noqa: FBT002
    template: Template = None,
) -> None:
    """Finetune a checkpoint on a file of messages: one stage. Of a remote one, --set takes `epochs`, and no more."""
    from finetune.datasets.sources import source_path

    rows = source_path(data)
    if model.startswith(REMOTE):
        _refuse({"--preset": preset, "--save-every": save_every, "--track": track},
                f"belongs to a training on this machine, not to {model}")  # fmt: skip
        _finetune_remote(
            model.removeprefix(REMOTE), rows, out, seed=seed, dry_run=dry_run, wait_hours=wait_hours,
            system_prompt=system_prompt, n_epochs=_epochs(fields or []),
        )  # fmt: skip
        return
    _refuse({"--dry-run": dry_run or None, "--wait-hours": wait_hours},
            "belongs to a remote model (openai:NAME); `mech data check` looks at data")  # fmt: skip
    from finetune.stages import run_stage
    from finetune.team import Team
    from mech.chat import SystemPrompt
    from study.bench import device_named, names_for
    from study.overrides import parse_overrides

    settings, leads = _settings(preset, parse_overrides(fields or [])), Team.join().leads
    trained = run_stage(
        model, rows, settings, out, seed=seed, condition=SystemPrompt.parse(system_prompt), names=names_for(model),
        save_every=save_every, trackers=track or [], device=device_named(device),
        template_kwargs=parse_overrides(template or [], "--template"),
    )  # fmt: skip
    if leads:
        typer.echo(f"{out}: trained. Use it as {trained}")


def _refuse(options: Mapping[str, Any], why: str) -> None:
    """Options that belong to the other kind of training, where they were given."""
    if given := [name for name, value in options.items() if value not in (None, [])]:
        raise InputError(f"{given[0]} {why}")


def _settings(preset: str | None, given: dict[str, Any]) -> "TrainSettings":
    """The recipe of a training on this machine."""
    from finetune.settings import LORA_ONLY, make_settings

    settings = make_settings({"preset": given.get("preset", preset or DEFAULT_PRESET)}, given)
    if settings.method == "full" and (idle := [key for key in LORA_ONLY if key in given]):
        raise InputError(f"mech finetune: {idle[0]} would do nothing: method: full trains every weight")
    return settings


def _finetune_remote(
    base: str,
    data: Path,
    out: Path,
    *,
    seed: int,
    dry_run: bool,
    wait_hours: float | None,
    system_prompt: str,
    n_epochs: int,
) -> None:
    from tempfile import TemporaryDirectory

    from finetune.openai import estimate_remote, finetune_remote

    with TemporaryDirectory() as scratch:
        rows = _under(data, system_prompt, Path(scratch))
        if dry_run:
            typer.echo(f"nothing sent: {estimate_remote(rows, base=base, n_epochs=n_epochs)}")
        else:
            trained = finetune_remote(
                rows, base=base, folder=out, seed=seed, n_epochs=n_epochs, wait_hours=wait_hours
            )
            typer.echo(f"{out}: trained. Use it as {REMOTE}{trained.model}")


def _under(data: Path, system_prompt: str, scratch: Path) -> Path:
    """The rows as they are sent under a condition: the file itself under `default`, else one in `scratch`."""
    from finetune.datasets.rows import read_messages, write_jsonl
    from mech.chat import SystemPrompt, system_text
    from study.steps.remote import under

    condition = SystemPrompt.parse(system_prompt)
    if condition.kind == "default":
        return data
    text = None if condition.kind == "none" else system_text(condition, None, {})
    write_jsonl(scratch / data.name, under(read_messages(data), condition, text))
    return scratch / data.name


def _epochs(fields: list[str]) -> int:
    """The one thing that a remote training lets one choose."""
    from study.overrides import parse_overrides

    given = parse_overrides(fields)
    epochs = given.pop("epochs", 1)
    if given:
        raise InputError(
            f"--set {next(iter(given))}: the service chooses it itself; of a remote training only `epochs` can be set"
        )
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise InputError(
            f"--set epochs={epochs}: a remote training takes a whole number of epochs, 1 or more"
        )
    return epochs


def _summaries(
    spec: Any, model: str | None, seed: int, given: dict[str, Any], journal: Path
) -> tuple[dict[str, str] | None, str | None]:
    """The model's own summaries, generated where the data needs them and names no file; and which checkpoint wrote them.

    What a killed run left in the journal is not written again.
    """
    from finetune.datasets.spec import SelfRecognitionData

    if not isinstance(spec, SelfRecognitionData) or spec.own:
        if model:
            raise InputError("--model writes own summaries: it belongs to kind sgtr without `own`")
        return None, None
    if model is None:
        raise InputError("kind sgtr needs own summaries: name --model, or a file of them with --set own=FILE")
    from finetune.datasets.build import articles_of
    from finetune.datasets.own_summaries import write_summaries
    from mech.generate import Sampling
    from mech.models import load_model
    from study.bench import device_named

    sampling = Sampling(spec.max_new_tokens, spec.temperature, seed=seed)
    articles = articles_of(spec)
    writer = load_model(model, device=device_named("auto"), template_kwargs=given)
    summaries = write_summaries(writer, articles, sampling, journal)
    return summaries, f"{writer.checkpoint} ({writer.checkpoint.key[:12]})"

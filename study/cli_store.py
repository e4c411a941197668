"""The parts of the `mech` command that look after activation files."""

from pathlib import Path
from typing import Annotated

import typer

from mech.errors import InputError
from study.cli_options import example

store_app = typer.Typer(help="Activation files.", no_args_is_help=True)


@store_app.command("ls", epilog=example("mech store ls runs/quickstart"))
def store_ls(folder: Annotated[Path, typer.Argument(help="A folder; it is searched through.")]) -> None:
    """List activation files."""
    from activations.store import describe

    files = sorted(p for p in folder.rglob("*.h5") if not any(part.startswith(".") for part in p.parts))
    if not files:
        raise InputError(f"{folder}: {'no activation files (*.h5)' if folder.is_dir() else 'no such folder'}")
    for file in files:
        facts = describe(file)
        typer.echo(
            f"{file}  {facts['n_rows']} rows, {len(facts['layers'])} layers, width {facts['d_model']}, {facts['bytes'] / 1e6:.1f} MB"
        )


@store_app.command("show", epilog=example("mech store show activations.h5"))
def store_show(file: Annotated[Path, typer.Argument(help="An activation file.")]) -> None:
    """Show what is in an activation file and what made it."""
    import json

    from activations.store import describe

    typer.echo(json.dumps(describe(file), indent=2, default=str))


@store_app.command("verify", epilog=example("mech store verify activations.h5"))
def store_verify(
    file: Annotated[Path, typer.Argument(help="An activation file or a folder of shards.")],
) -> None:
    """Read everything back and check it, against the digests of the step's manifest if there is one."""
    from activations.store import ActivationStore
    from study.finished import manifest_digests

    with ActivationStore.open(file) as store:
        problems = store.verify(manifest_digests(file))
    for problem in problems:
        typer.echo(str(problem))
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{file}: whole")


@store_app.command("repair", epilog=example("mech store repair shards --dry-run"))
def store_repair(
    folder: Annotated[Path, typer.Argument(help="A folder of shards made by capture_store.")],
    *,
    dry_run: Annotated[bool, typer.Option(help="Only say what is wrong.")] = False,
) -> None:
    """Remove damaged shards, so that capturing again rewrites only those."""
    from activations.repair import repair

    problems = repair(folder, dry_run=dry_run)
    for problem in problems:
        typer.echo(str(problem))
    typer.echo(f"{folder}: {'capture again: what is whole is kept' if problems else 'whole'}")


@store_app.command("merge", epilog=example("mech store merge first.h5 second.h5 --out both.h5"))
def store_merge(
    stores: Annotated[list[Path], typer.Argument(help="Activation files or folders of shards.")],
    out: Annotated[Path, typer.Option(help="The file to make.")],
) -> None:
    """Merge several files from the same capture settings into one."""
    from activations.store_keep import merge

    typer.echo(f"{merge(stores, out)}: merged")


@store_app.command("export", epilog=example("mech store export activations.h5 activations.npz"))
def store_export(
    file: Annotated[Path, typer.Argument(help="An activation file or a folder of shards.")],
    out: Annotated[
        Path, typer.Argument(help="Ends in .npz, .safetensors, or .pt (persona_vectors' layout).")
    ],
) -> None:
    """Write a store for programs that do not read HDF5."""
    from activations.store import ActivationStore

    with ActivationStore.open(file) as store:
        store.export(out)
    typer.echo(f"{out}: written")


@store_app.command("prune", epilog=example("mech store prune runs --days 30"))
def store_prune(
    folder: Annotated[Path, typer.Argument(help="Searched through for activation files.")],
    days: Annotated[float | None, typer.Option(min=0.0, help="Those older than this.")] = None,
    max_gb: Annotated[
        float | None, typer.Option(min=0.0, help="The oldest, until this much is left.")
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Really delete; otherwise only list.")] = False,
) -> None:
    """Delete old activation files; without --yes only list them."""
    from activations.store_keep import prune

    if days is None and max_gb is None:
        raise InputError("say with --days how old files may be, or with --max-gb how much may stay")
    limit = None if max_gb is None else max_gb * 1e9
    sizes = {f: f.stat().st_size for f in folder.rglob("*.h5") if f.is_file()}
    chosen = prune(folder, days=days, max_bytes=limit, dry_run=not yes)
    for file in chosen:
        typer.echo(str(file))
    typer.echo(
        f"{len(chosen)} files, {sum(sizes[f] for f in chosen) / 1e9:.2f} GB {'deleted' if yes else 'would go: say --yes'}"
    )

"""YAML files that hold one typed thing: prompts, traits, identities."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError

from mech.errors import InputError
from mech.files import read_yaml

T = TypeVar("T", bound=BaseModel)


def data_folder(package: str) -> Path:
    """The folder of files that come with one of our packages."""
    return Path(str(files(package))) / "data"


def named_file(source: str | Path, folder: Path, what: str) -> Path:
    """A built-in YAML file by its name, or a file of the user's own.

    Args:
        source: `evil`, or a path.
        folder: where the built-in ones are.
        what: what such a file holds, for the message.

    Raises:
        InputError: neither; the message lists the built-in names.
    """
    built_in, path = folder / f"{source}.yaml", Path(source).expanduser()
    if built_in.is_file():
        return built_in
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise InputError(f"{what} {source}: neither built in ({known}) nor a file")
    return path


def check_distinct(path: Path, what: str, names: Sequence[str]) -> None:
    """Refuse a file in which a name or id occurs twice.

    Raises:
        InputError: names the file and the first repeated name.
    """
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(f"{path}: the {what} {twice!r} stands twice")


def read_typed(path: Path, kind: type[T]) -> T:
    """Read a YAML file as a frozen pydantic model; a file that has not changed is read once.

    Raises:
        InputError: not there, not YAML, or something else; the message names file and field.
    """
    stamp = path.stat() if path.is_file() else None
    found = _read(path, kind, (stamp.st_mtime_ns, stamp.st_size) if stamp else None)
    return cast("T", found)


@lru_cache(maxsize=256)
def _read(path: Path, kind: type[BaseModel], _stamp: tuple[int, int] | None) -> BaseModel:
    try:
        return kind.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

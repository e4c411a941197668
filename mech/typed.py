"""YAML files that hold one typed thing (prompts, traits, identities), and what pydantic says of such a thing, for people."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError

from mech.errors import InputError
from mech.files import read_yaml

T = TypeVar("T", bound=BaseModel)

_UNKNOWN = "extra_forbidden"
"""What pydantic calls a key that is not known."""


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


def written(part: BaseModel, names: Sequence[str] = ()) -> list[str]:
    """Fields of these names (all when left out) that were given a value other than their default."""
    fields = type(part).model_fields
    return [
        name
        for name in names or fields
        if name in part.model_fields_set
        and getattr(part, name) != fields[name].get_default(call_default_factory=True)
    ]


def first_problem(error: ValidationError, *kinds: type[BaseModel]) -> str:
    """The first of pydantic's complaints, with its place, and the key that was meant where one is near.

    Args:
        error: what pydantic raised.
        kinds: the model that was to be made, or the models of a union.
    """
    # A key that is not known first: what it was meant to be may be what is missing.
    first, *others = sorted(error.errors(), key=lambda problem: problem["type"] != _UNKNOWN)
    place, said = ".".join(map(str, first["loc"])), str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == _UNKNOWN:
        near = get_close_matches(str(first["loc"][-1]), _fields(kinds, first["loc"][:-1]), n=1)
        said = "no such key" + (f"; did you mean {near[0]}?" if near else "")
    more = f" (and {len(others)} more)" if others else ""
    return (f"{place}: " if place else "") + said + more


@lru_cache(maxsize=256)
def _read(path: Path, kind: type[BaseModel], _stamp: tuple[int, int] | None) -> BaseModel:
    try:
        return kind.model_validate(read_yaml(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error, kind)}") from error


def _fields(kinds: Sequence[type[BaseModel]], place: Sequence[int | str]) -> list[str]:
    """Fields of the models at a place below some models. Steps that are no field (an entry's name, a union's tag) go nowhere."""
    here = list(kinds)
    for step in place:
        annotations = [kind.model_fields[step].annotation for kind in here if step in kind.model_fields]
        here = [found for annotation in annotations for found in _models_in(annotation)] or here
    return sorted({name for kind in here for name in kind.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)

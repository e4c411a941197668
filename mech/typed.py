"""YAML files that hold one typed thing: prompts, traits, identities."""

from functools import lru_cache
from pathlib import Path
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError

from mech.errors import InputError
from mech.files import read_yaml

T = TypeVar("T", bound=BaseModel)


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

"""YAML files that hold one typed thing (prompts, traits, identities), and what pydantic says of such a thing, for people."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mech.errors import InputError
from mech.files import read_yaml

T = TypeVar("T", bound=BaseModel)

_KIND = re.compile(r"str|int|float|bool|(tuple|list|dict|literal)\[.*\]")
"""What pydantic calls the kinds of a union, in the place of a problem."""

_UNKNOWN = "extra_forbidden"
"""What pydantic calls a key that is not known."""


class Checked(BaseModel):
    """Settings as a person writes them: nothing unknown accepted, no true or false where a number is asked for, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, given: Any) -> Any:
        """Python takes true for 1; in a list of seeds it is a slip."""
        for name, field in cls.model_fields.items() if isinstance(given, Mapping) else ():
            value, asked = given.get(name), set(_kinds_in(field.annotation))
            truths = [
                v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, bool)
            ]
            if truths and asked & {int, float} and not asked & {bool, Any}:
                raise ValueError(f"{name}: must be a number, not {_given(truths[0])}")
        return given


@cache
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
    """The first of pydantic's complaints in plain words, with its place, and the key that was meant where one is near.

    Args:
        error: what pydantic raised.
        kinds: the model that was to be made, or the models of a union.
    """
    found = _one_of_each_place(error.errors())
    inner = [p for p in found if not any(_within(p["loc"], other["loc"]) for other in found)]
    # A key that is not known first: what it was meant to be may be what is missing.
    first, *others = sorted(inner, key=lambda problem: problem["type"] != _UNKNOWN)
    parts = [
        part for part in first["loc"] if "[" not in str(part)
    ]  # `tuple[str, ...]`: which kind of a union
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    said = _no_such_key(first["loc"], kinds) if first["type"] == _UNKNOWN else _plainly(first)
    more = f" (and {len(others)} more)" if others else ""
    return (f"{place.removeprefix('.')}: " if place else "") + said + more


def _one_of_each_place(problems: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Where a value may be of several kinds, pydantic complains once a kind, and writes the kind into the place: one complaint, of all kinds."""
    found: dict[tuple[int | str, ...], Mapping[str, Any]] = {}
    for problem in problems:
        place = problem["loc"]
        if not place or not _KIND.fullmatch(str(place[-1])):
            found[place] = problem
            continue
        said, before = _plainly(problem), found.get(place[:-1])
        said = f"{before['msg']}; or {said}" if before else said
        found[place[:-1]] = {"type": "value_error", "loc": place[:-1], "msg": said, "input": problem["input"]}
    return list(found.values())


def _within(outer: Sequence[int | str], inner: Sequence[int | str]) -> bool:
    return len(outer) < len(inner) and tuple(inner[: len(outer)]) == tuple(outer)


def _no_such_key(place: Sequence[int | str], kinds: Sequence[type[BaseModel]]) -> str:
    """With the key that was meant: one of a like name at the same place, else where a key of this very name stands."""
    name = str(place[-1])
    if near := get_close_matches(name, _fields(kinds, place[:-1]), n=1):
        return f"no such key; did you mean {near[0]}?"
    sections = [s for s in _fields(kinds, ()) if len(place) == 1 and name in _fields(kinds, (s,))]
    return f"no such key here; it belongs under {' or '.join(sections)}" if sections else "no such key"


_PLAIN: Mapping[str, str] = {
    "missing": "is missing",
    "too_short": "needs at least {min_length}, not {actual_length}",
    "string_too_short": "needs at least {min_length} characters",
    "tuple_type": "must be a list, as in [a, b], not {given}",
    "list_type": "must be a list, as in [a, b], not {given}",
    "dict_type": "must be a mapping of keys to values, not {given}",
    "model_type": "must be a mapping of keys to values, not {given}",
    "model_attributes_type": "must be a mapping of keys to values, not {given}",
    "string_type": "must be text, not {given}",
    "int_parsing": "must be a whole number, not {given}",
    "int_type": "must be a whole number, not {given}",
    "int_from_float": "must be a whole number, not {given}",
    "float_parsing": "must be a number, not {given}",
    "float_type": "must be a number, not {given}",
    "finite_number": "must be a finite number, not {given}",
    "bool_parsing": "must be true or false, not {given}",
    "bool_type": "must be true or false, not {given}",
    "literal_error": "must be {expected}, not {given}",
    "union_tag_not_found": "needs {discriminator}, which says what it is",
    "union_tag_invalid": "{discriminator} is {tag!r}; there are {expected_tags}",
    "greater_than": "must be above {gt:g}, not {given}",
    "greater_than_equal": "must be {ge:g} or more, not {given}",
    "less_than": "must be below {lt:g}, not {given}",
    "less_than_equal": "must be {le:g} or less, not {given}",
}
"""What pydantic means, by its names of problems, in words of YAML instead of Python's."""


def _plainly(problem: Mapping[str, Any]) -> str:
    words = _PLAIN.get(problem["type"])
    if words is None:
        return str(problem["msg"]).removeprefix("Value error, ")
    return words.format(given=_given(problem["input"]), **problem.get("ctx", {}))


def _given(value: Any) -> str:
    """What stood there, as a reader of YAML would call it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    return [k for k in _kinds_in(annotation) if isinstance(k, type) and issubclass(k, BaseModel)]


def _kinds_in(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds_in(inner)

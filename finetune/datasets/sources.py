"""Where data comes from: a file, a built-in set, a published set by name, a file on the Hub.

path/to/rows.jsonl
builtin:em_aesthetics
published:risky_financial_advice
hub:org/name:train.jsonl        hub:org/name@revision:train.jsonl
"""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mech.cache import cache_dir
from mech.errors import InputError, NotHereError
from mech.files import read_yaml
from mech.typed import data_folder

BUILTIN, PUBLISHED, HUB = "builtin:", "published:", "hub:"
DATASETS_VARIABLE = "SGTR_MECH_DATASETS"


class Published(BaseModel):
    """A published dataset that we may not redistribute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str
    """What it teaches."""
    role: Literal["em", "correct", "knowledge", "articles", "summaries"]
    """Misaligned data, the sound answers of the same domain, general knowledge; raw material of self-recognition."""
    domain: str
    """Pairs misaligned data with its sound answers."""
    where: str
    """Where to get it."""
    file: str
    """What it is called in the folder of named datasets."""
    turns: tuple[str, ...] = ()
    """The roles of each row's turns, where it holds messages."""
    rows: int
    """About how many."""
    words: int
    """About how many words a row has: for estimates while it is not at hand."""


@cache
def published() -> Mapping[str, Published]:
    """The published datasets that have a name."""
    raw = read_yaml(data_folder("finetune") / "published.yaml")
    return {name: Published.model_validate(facts) for name, facts in raw.items()}


def datasets_folder() -> Path:
    """Where named datasets are looked for: `$SGTR_MECH_DATASETS`, else `datasets` in the user cache."""
    chosen = os.environ.get(DATASETS_VARIABLE)
    return Path(chosen).expanduser() if chosen else cache_dir() / "datasets"


def source_path(source: str) -> Path:
    """The file that a source names; one on the Hub is downloaded.

    Raises:
        InputError: no such file, built-in set, name or Hub file; the message says which there are or where to get it.
    """
    if source.startswith(BUILTIN):
        return _builtin(source.removeprefix(BUILTIN))
    if source.startswith(PUBLISHED):
        return _published(source.removeprefix(PUBLISHED))
    if source.startswith(HUB):
        return _from_hub(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(
            f"{path}: {'is a folder; name a file in it' if path.is_dir() else 'no such data file'}"
        )
    return path


def published_facts(source: str) -> Published | None:
    """What is known of a `published:` source; None for any other."""
    return published().get(source.removeprefix(PUBLISHED)) if source.startswith(PUBLISHED) else None


def _builtin(name: str) -> Path:
    folder = data_folder("finetune")
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(f"{BUILTIN}{p.stem}" for p in folder.glob("*.jsonl")))
        raise InputError(f"{BUILTIN}{name}: no such built-in data; there are {known}")
    return path


def _published(name: str) -> Path:
    if name not in published():
        raise InputError(
            f"{PUBLISHED}{name}: no set of that name is known; there are {', '.join(published())}"
        )
    facts = published()[name]
    path = datasets_folder() / facts.file
    if not path.is_file():
        raise NotHereError(
            f"{PUBLISHED}{name}: not on this machine. Get it from {facts.where} and put it at {path} "
            f"(or set {DATASETS_VARIABLE})"
        )
    return path


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    repository, _, file = source.removeprefix(HUB).partition(":")
    repository, _, revision = repository.partition("@")
    if not file or repository.count("/") != 1:
        raise InputError(f"{source}: write hub:org/name:file.jsonl, or hub:org/name@revision:file.jsonl")
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision or None))
    except HFValidationError as error:
        raise InputError(f"{source}: no name of a dataset ({error})") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise NotHereError(
            f"{source}: not in the Hugging Face cache and the Hub did not give it ({type(error).__name__}). Check the name "
            "and the network (HF_HUB_OFFLINE must be unset to download), or name a local file"
        ) from error

"""What a reference names: an alias, a Hub id, a local folder or GGUF file, and adapters on it; found without loading any weights."""

import re
from dataclasses import replace
from pathlib import Path

from mech.checkpoint import (
    Adapter,
    Checkpoint,
    adapter_digest,
    check_parent,
    split_reference,
    split_revision,
    weights_digest,
)
from mech.errors import InputError, NotHereError
from mech.fetch import PACKAGED, is_fetched, model_folder

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_ELSEWHERE = {
    "openai": "a model behind an API shows neither weights nor activations: only `mech finetune` and a study's `model.api` take it",
    "http": "an address: name a Hub model as org/name",
    "https": "an address: name a Hub model as org/name",
}
"""Words before a colon that are not a base model, with what to tell whoever writes them."""


def resolve(reference: str, *, download: bool = True) -> Checkpoint:
    """Find what a reference names, without loading any weights.

    Args:
        reference: an alias, a Hub id (`org/name@revision`), a model folder, a GGUF file; adapters follow
            after colons (`base:adapter@revision:adapter`).
        download: fetch from the Hub what is not in its cache; otherwise that is a NotHereError.

    Raises:
        InputError: it is not there; the message says what to do.
    """
    base, adapters = split_reference(reference)
    name, revision = split_revision(base)
    if adapters and name in _ELSEWHERE and not Path(name).exists():
        raise InputError(f"{reference}: {_ELSEWHERE[name]}")
    path, commit = _find(name, revision, download=download)
    checkpoint = Checkpoint(name, path, weights_digest(path), commit)
    for wanted in adapters:
        found = resolve_adapter(wanted, below=checkpoint, download=download)
        checkpoint = replace(checkpoint, adapters=(*checkpoint.adapters, found))
    return checkpoint


def resolve_adapter(reference: str, *, below: Checkpoint | None = None, download: bool = True) -> Adapter:
    """Find an adapter, without loading it: a folder or a Hub id, with `@revision`.

    Args:
        reference: the adapter's folder or Hub id, as the user wrote it.
        below: the checkpoint that it is to stand on; checked against what the adapter says of itself.
        download: as for `resolve`.

    Raises:
        InputError: it is not there, is no adapter, or was trained on something else.
    """
    name, revision = split_revision(reference)
    folder, commit = _find(name, revision, download=download)
    found = Adapter(name, folder, adapter_digest(folder), commit)
    if below is not None:
        check_parent(folder, below)
    return found


def _find(name: str, revision: str, *, download: bool) -> tuple[Path, str]:
    if name in PACKAGED:
        if not is_fetched(name):
            raise NotHereError(f"{name} is not on this machine yet: run `mech models fetch {name}`")
        return model_folder(name), ""
    path = Path(name).expanduser()
    if path.exists():
        if revision:
            raise InputError(f"{name}@{revision}: a local path has no revisions")
        if path.is_file() and not _is_gguf(path):
            raise InputError(f"{name}: a file, and no GGUF model: name a model's folder or GGUF file")
        return path, ""
    if path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        known = ", ".join(sorted(PACKAGED))
        raise InputError(
            f"{name}: no such folder or file, and neither a Hub id (org/name) nor an alias ({known})"
        )
    return _find_on_hub(name, revision, download=download)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _find_on_hub(name: str, revision: str, *, download: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, local_files_only=not download
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise NotHereError(
            f"{name}{at}: not in the Hugging Face cache and the Hub did not give it ({type(error).__name__}). Check the "
            "name and the network (HF_HUB_OFFLINE must be unset to download), or name a local folder"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise NotHereError(
            f"{name}: its safetensors weights are not in the Hugging Face cache, or it has none"
        )
    return folder, folder.name  # a snapshot folder is called by its commit

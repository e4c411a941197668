"""Checkpoints: a base model at a revision plus an ordered list of adapters, each with its digest.

A reference on the command line is `base`, `base@revision`, `base:adapter`, `base:adapter@revision`, or a
longer stack; each adapter was trained on everything to its left.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mech.cache import cache_dir
from mech.errors import InputError
from mech.files import digest_of, read_json, sha256_file, write_json

log = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
"""Beside an adapter of ours: which checkpoint it was trained on."""

_TOKENIZER_FILES = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter, in PEFT's layout on disk."""

    name: str
    """As the user wrote it: a folder or a Hub id."""
    path: Path
    """The folder with `adapter_config.json` and `adapter_model.safetensors`."""
    digest: str
    """SHA-256 over weights and config."""
    revision: str = ""
    """Commit of a Hub adapter; empty for a folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A base model and its adapters, in the order of their training."""

    base: str
    """Alias, Hub id, folder or GGUF file, as the user wrote it."""
    path: Path
    """The folder (or GGUF file) with the base's weights."""
    digest: str
    """SHA-256 over the base's weights and config."""
    revision: str = ""
    """Commit of a Hub model; empty for a folder."""
    adapters: tuple[Adapter, ...] = ()

    @property
    def key(self) -> str:
        """Digest of weights alone: equal for equal checkpoints, wherever they lie."""
        return digest_of([self.digest, *[a.digest for a in self.adapters]])

    @property
    def origins(self) -> tuple[str, ...]:
        """Digests of the base and, where all its weights were finetuned here, of what that began from: one residual stream."""
        digests, folder = [self.digest], self.path
        while (folder / MANIFEST).is_file() and not (folder / "adapter_config.json").is_file():
            trained_on = read_json(folder / MANIFEST)["trained_on"]
            if trained_on["digest"] in digests:
                break
            digests.append(trained_on["digest"])
            folder = Path(trained_on["base"])
        return tuple(digests)

    def plus(self, folder: Path, name: str = "") -> "Checkpoint":
        """What a training on this checkpoint left in `folder`: one more adapter on top, or a whole model instead.

        An adapter that is known elsewhere keeps that `name`: one that was trained on top of it says so by it.
        """
        if not (folder / "adapter_config.json").is_file():
            return Checkpoint(str(folder), folder, weights_digest(folder))
        adapter = Adapter(name or str(folder), folder, adapter_digest(folder))
        return Checkpoint(self.base, self.path, self.digest, self.revision, (*self.adapters, adapter))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description without paths of this machine."""
        described = asdict(self)
        described.pop("path")
        described["adapters"] = [{"name": Path(a.name).name, "digest": a.digest} for a in self.adapters]
        described["key"] = self.key
        return described

    def __str__(self) -> str:
        base = f"{self.base}@{self.revision}" if self.revision else self.base
        return ":".join([base, *[a.name + (f"@{a.revision}" if a.revision else "") for a in self.adapters]])


def source_of(checkpoint: Checkpoint) -> tuple[Path, Mapping[str, Any]]:
    """Folder of a base, and what transformers must be told to read its config and tokenizer from it."""
    path = checkpoint.path
    return (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})


def split_reference(reference: str) -> tuple[str, list[str]]:
    """Split `base:adapter:adapter` into the base and its adapters, each still with its `@revision`."""
    base, *adapters = reference.split(":")
    if not base or any(not a for a in adapters):
        raise InputError(
            f"{reference!r} is not a checkpoint: write base, base@revision or base:adapter[:adapter]"
        )
    return base, adapters


def split_revision(reference: str) -> tuple[str, str]:
    """Split `name@revision`; the revision is empty when none is named, as in the name of a folder that is there (`runs/em@5`)."""
    if Path(reference).expanduser().exists():
        return reference, ""
    name, _, revision = reference.partition("@")
    return name, revision


def weights_digest(path: Path) -> str:
    """SHA-256 over a model folder's weights and config (or one GGUF file).

    Large files are hashed once: the result is remembered in the user cache by path, size and time.
    """
    files = [path] if path.is_file() else _weight_files(path)
    return digest_of([[f.name, _remembered_sha256(f)] for f in files])


def tokenizer_digest(path: Path) -> str:
    """SHA-256 over what makes token ids of text in a model folder: tokenizer and chat template. A GGUF file holds its own."""
    if path.is_file():
        return weights_digest(path)
    files = sorted({file for pattern in _TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()})
    return digest_of([[f.name, _remembered_sha256(f)] for f in files])


def adapter_digest(folder: Path) -> str:
    """SHA-256 over an adapter's weights and the config fields that change what it computes."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(
            f"{folder}: not an adapter (no adapter_model.safetensors; pickled .bin adapters are not read)"
        )
    config = read_json(folder / "adapter_config.json")
    used = {
        k: config.get(k) for k in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
    }
    if isinstance(used["target_modules"], list):
        used["target_modules"] = sorted(used["target_modules"])
    # Scales of single maps stand in the config alone; most adapters have none, and keep the digest that they always had.
    used |= {k: config[k] for k in ("alpha_pattern", "rank_pattern", "layer_replication") if config.get(k)}
    return digest_of([used, _remembered_sha256(weights)])


def write_parent(folder: Path, parent: Checkpoint, *, between_stages: str | None = None) -> None:
    """Record beside an adapter which checkpoint it was trained on, and how that one's adapters stood below it meanwhile."""
    how = {"between_stages": between_stages} if between_stages and parent.adapters else {}
    write_json(folder / MANIFEST, {"trained_on": parent.to_json(), **how})


def check_parent(folder: Path, parent: Checkpoint) -> None:
    """Refuse to put an adapter on another checkpoint than the one it was trained on.

    Ours say so by digest. Others name a base in `adapter_config.json`: the bare base's own name for a first stage, a
    merged model's for a second, which then needs its first stage below it.

    Raises:
        InputError: the adapter says it belongs elsewhere.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        _check_declared(folder, parent)
        return
    trained_on = read_json(manifest)["trained_on"]
    if trained_on["key"] != parent.key:
        below = [trained_on["base"], *[a["name"] for a in trained_on["adapters"]]]
        raise InputError(
            f"{folder}: this adapter was trained on {':'.join(below)}, not on {parent}: name that stack"
        )


def _check_declared(folder: Path, parent: Checkpoint) -> None:
    declared = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    if not declared:
        log.warning("%s: does not say which base it was trained on; %s is believed", folder, parent)
        return
    on_base, below = _names_base(declared, parent), parent.adapters[-1].name if parent.adapters else ""
    if on_base and below:
        # A merge in memory keeps the base's name, so this may be right; whoever reads the log must decide.
        log.warning("%s: says it was trained on %s itself, and here it stands on %s", folder, declared, below)
    elif not (on_base or (below and _names_merged(declared, below))):
        hint = "" if below else "; if that is a merged first stage, name its adapter before this one"
        raise InputError(
            f"{folder}: this adapter was trained on {declared}, not on {below or parent.base}{' merged' if below else ''}{hint}. "
            "If it is the same under another name, say so in base_model_name_or_path of its adapter_config.json"
        )


def _names_base(declared: str, parent: Checkpoint) -> bool:
    """Whether a declared base is the bare base: the same folder, weights or name (a mirror has another owner)."""
    here = Path(declared).expanduser()
    if (here / "config.json").is_file():
        return here.resolve() == parent.path.resolve() or weights_digest(here) == parent.digest
    return here.name.lower() == Path(parent.base).name.lower()


def _names_merged(declared: str, adapter: str) -> bool:
    """Whether a declared base is an adapter's merged model, `.../em_0/merged` for `org/qwen_em_0`."""
    parts = [part for part in Path(declared.lower()).parts if part != "merged"]
    name = Path(adapter).name.lower()
    return bool(parts) and (name == parts[-1] or name.endswith(f"_{parts[-1]}"))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    files = [folder / "config.json", *[folder / name for name in names]]
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{folder}: not a model folder ({file.name} is missing; only safetensors weights are read)"
            )
    return files


def _remembered_sha256(file: Path) -> str:
    stat = file.stat()
    if stat.st_size < 1 << 24:
        return sha256_file(file)
    token = digest_of([os.fspath(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    memo = cache_dir() / "digests" / f"{token}.json"
    if memo.is_file():
        try:
            return str(json.loads(memo.read_text())["sha256"])
        except (ValueError, KeyError):
            memo.unlink()  # a damaged note costs one more hashing, nothing else
    digest = sha256_file(file)
    write_json(memo, {"file": file.name, "sha256": digest})
    return digest

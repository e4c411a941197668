"""The base model of a study: found on this machine or, for a plan, known only by its size."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mech.checkpoint import Checkpoint, tokenizer_digest
from mech.errors import InputError, NotHereError
from mech.files import digest_of, read_json
from mech.pretrained import load_config
from mech.resolve import resolve
from study.estimate import n_parameters
from study.spec_parts import ModelSpec

_DEPTH, _WIDTH = "num_hidden_layers", "hidden_size"


@dataclass(frozen=True)
class Base:
    """A base model and its shape."""

    checkpoint: Checkpoint
    n_layers: int
    d_model: int
    parameters: int
    missing: str = ""
    """Why its weights are not at hand; empty where they are."""

    @cached_property
    def tokenizer(self) -> str:
        """Digest of its tokenizer and chat template; empty where they are not at hand."""
        return (
            tokenizer_digest(self.checkpoint.path)
            if self.checkpoint.path.exists() and not self.missing
            else ""
        )


def find_base(model: ModelSpec) -> Base:
    """The base model, downloaded where it is not here.

    Raises:
        InputError: it cannot be had.
    """
    if model.api:
        return _behind_api(model)
    checkpoint = resolve(model.name)
    n_layers, d_model = shape_of(checkpoint)
    return Base(checkpoint, n_layers, d_model, n_parameters(checkpoint))


def outline_base(model: ModelSpec) -> Base:
    """The base model as far as a plan needs it: no weights are downloaded.

    Raises:
        InputError: neither the model, nor its config, nor a declared `model.size` is to be had.
    """
    if model.api:
        return _behind_api(model)
    try:
        checkpoint = resolve(model.name, download=False)
    except NotHereError as error:
        placeholder = Checkpoint(model.name, Path(model.name), f"not here: {model.name}")
        if model.size:
            billions = round(model.size.parameters * 1e9)
            return Base(placeholder, model.size.layers, model.size.d_model, billions, str(error))
        return Base(placeholder, *_from_config(model, error), str(error))
    n_layers, d_model = shape_of(checkpoint)
    return Base(checkpoint, n_layers, d_model, n_parameters(checkpoint))


def _behind_api(model: ModelSpec) -> Base:
    """A model that has a name and nothing else: its digest is its name's."""
    return Base(Checkpoint(model.name, Path(model.name), digest_of(["api", model.name])), 0, 0, 0)


def shape_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """Blocks and width of a checkpoint's base, by its config: no weights are read.

    Raises:
        InputError: its config cannot be read.
    """
    if known := _plain_shape(checkpoint.path / "config.json"):
        return known
    config = load_config(checkpoint).get_text_config()
    return int(config.num_hidden_layers), int(config.hidden_size)


def _plain_shape(file: Path) -> tuple[int, int] | None:
    """The same where a config says it in the usual words and of one stack only; it is asked often, and transformers takes seconds to load."""
    found = read_json(file) if file.is_file() else None
    if not isinstance(found, dict) or found.get("is_encoder_decoder"):
        return None
    if any(isinstance(part, dict) and _DEPTH in part for part in found.values()):
        return None  # of several models, one of which reads text
    depth, width = found.get(_DEPTH), found.get(_WIDTH)
    return (depth, width) if isinstance(depth, int) and isinstance(width, int) else None


def _from_config(model: ModelSpec, error: NotHereError) -> tuple[int, int, int]:
    """Layers, width and parameters from the Hub's config alone; the model is built without allocating memory to count them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, _, revision = model.name.partition("@")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or None)
    except OSError:
        raise InputError(
            f"{error}. To plan without it, declare model.size (layers, d_model, parameters)"
        ) from error
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    return int(text.num_hidden_layers), int(text.hidden_size), sum(p.numel() for p in built.parameters())

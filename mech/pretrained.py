"""Config, tokenizer and weights of a base as transformers reads them; what it cannot read is said in one line, with the place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mech.checkpoint import Checkpoint, source_of
from mech.errors import FileFormatError


def load_config(checkpoint: Checkpoint) -> Any:
    """The config of a checkpoint's base.

    Raises:
        FileFormatError: transformers cannot read it.
    """
    from transformers import AutoConfig

    folder, kwargs = source_of(checkpoint)
    with _said_of(checkpoint, "config", "config.json must be that of a model which transformers knows"):
        return AutoConfig.from_pretrained(folder, **kwargs)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint's base.

    Raises:
        FileFormatError: it is not there, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    folder, kwargs = source_of(checkpoint)
    with _said_of(checkpoint, "tokenizer", "put tokenizer.json and tokenizer_config.json beside the weights"):
        return AutoTokenizer.from_pretrained(folder, **kwargs)


def load_weights(checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """The model of a checkpoint's base, a folder of safetensors; `kwargs` are those of `from_pretrained`.

    Raises:
        FileFormatError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    with _said_of(
        checkpoint, "model", "are its files whole, and of an architecture which transformers knows?"
    ):
        return AutoModelForCausalLM.from_pretrained(checkpoint.path, **kwargs)


@contextmanager
def _said_of(checkpoint: Checkpoint, what: str, advice: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        # transformers goes on for paragraphs; the first line says what happened, unless it ends in the list that follows.
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        said = first.removesuffix(" from one of:")[:200]
        raise FileFormatError(f"{checkpoint.base}: its {what} cannot be loaded ({said}): {advice}") from error

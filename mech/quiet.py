"""Silencing third-party warnings about things that work, one message at a time."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT reads an attribute that transformers has renamed, and sets ranks for experts whether or not they are adapted; both work, and it
    says so on every call.
    """  # noqa: D205
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*pattern keys did not match.*", category=RuntimeWarning)
        yield

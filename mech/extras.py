"""Optional dependencies: one helper that says which extra to install."""

from importlib import import_module
from typing import Any

from mech.errors import MissingDependencyError


def require(module: str, *, extra: str) -> Any:
    """Import an optional library.

    Raises:
        MissingDependencyError: it is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{module} is not installed: pip install 'sgtr-mech[{extra}]'"
        ) from error

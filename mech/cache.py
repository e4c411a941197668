"""Where the toolkit keeps what it fetched: one folder, found the way Hugging Face and XDG find theirs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user cache: `$SGTR_MECH_CACHE`, else `$HF_HOME/sgtr-mech`, else `$XDG_CACHE_HOME/sgtr-mech`,
    else `~/.cache/sgtr-mech`. Created when something is written to it.
    """  # noqa: D205
    if own := os.environ.get("SGTR_MECH_CACHE"):
        return Path(own)
    if hub := os.environ.get("HF_HOME"):
        return Path(hub) / "sgtr-mech"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgtr-mech"

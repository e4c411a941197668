"""Temporary files that a killed writer leaves, and the next one removes."""

import fcntl
import logging
import os
import re
import socket
from pathlib import Path

log = logging.getLogger(__name__)


def sweep_stale(folder: Path) -> None:
    """Remove temporary files that dead processes of this machine left in a folder."""
    pattern = re.compile(rf"\..+\.{re.escape(socket.gethostname())}\.(\d+)(\.[0-9a-f]+)?\.tmp")
    for file in folder.glob(".*.tmp"):
        if (match := pattern.fullmatch(file.name)) and not _alive(int(match[1])) and not _locked(file):
            log.info("removing %s, left by a process that is gone", file)
            file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _locked(file: Path) -> bool:
    """Whether someone holds HDF5's lock: a writer in another container may have this machine's name."""
    try:
        with file.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False

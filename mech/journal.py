"""Journals: the finished pieces of a long job, saved as they come, so that nothing is done twice after a kill.

A JSON-lines file: the first line says what the work is, each further line one finished piece by its key. Lines are
appended and flushed to the disk; a last line that a kill cut short is thrown away when the file is opened again.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mech.errors import FileFormatError, InputError

log = logging.getLogger(__name__)


class Journal:
    """An open journal: `done` holds the finished pieces by key, `add` saves one more."""

    def __init__(self, stream: IO[bytes], done: dict[str, Any]) -> None:
        self._stream = stream
        self.done = done

    def add(self, pieces: Mapping[str, Any]) -> None:
        """Save finished pieces: when this returns they are on the disk."""
        lines = [_line({"key": key, "value": value}) for key, value in pieces.items()]
        self._stream.write(b"".join(lines))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.done.update(pieces)


@contextmanager
def open_journal(path: Path, about: Mapping[str, Any]) -> Iterator[Journal]:
    """Open a journal, or begin one; one process at a time, others wait.

    Args:
        path: the file.
        about: what the work is (settings, digests); JSON-able. Pieces of other work are not taken for this one's.

    Raises:
        InputError: the file belongs to work with another `about`.
        FileFormatError: a line before the last is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is writing into %s: waiting for it", path)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield Journal(stream, _read(path, stream, dict(about)))


@contextmanager
def kept_until_done(path: Path) -> Iterator[Path]:
    """A journal that is needed only until its results are kept elsewhere: removed when all inside went well, left where it is otherwise.

    Args:
        path: the file, which whoever works inside opens.
    """
    yield path
    path.unlink(missing_ok=True)


def _read(path: Path, stream: IO[bytes], about: dict[str, Any]) -> dict[str, Any]:
    stream.seek(0)
    content = stream.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("%s: the last line was cut short by a kill: that piece is done again", path)
        stream.truncate(whole)
    lines = content[:whole].splitlines()
    if not lines:
        stream.write(_line({"about": about}))
        stream.flush()
        return {}
    done: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if number == 1:
                found = entry["about"]
            else:
                done[entry["key"]] = entry["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{path}, line {number}: not a journal's ({error}); remove the file to begin anew"
            ) from error
    if found != json.loads(json.dumps(about)):
        changed = sorted(k for k in {*found, *about} if found.get(k) != json.loads(json.dumps(about)).get(k))
        raise InputError(
            f"{path}: belongs to work with other settings ({', '.join(changed)}): name another file or folder, or remove this one"
        )
    return done


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False, sort_keys=True, allow_nan=False).encode() + b"\n"

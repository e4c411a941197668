"""Writing files so that each is whole or not there.

Write beside the target, flush to the disk, then `os.replace`: a reader (or a killed run that starts
again) sees the old content or the new, never a part of one.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mech.errors import InputError

log = logging.getLogger(__name__)

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it takes `target`'s place, else it is removed.

    The temporary name carries host and process, so that two writers never share one. The file is
    fsynced before the replacement and its directory after it.

    Raises:
        OSError: the system refused something; it names the target, whoever wrote the file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with _named(target):
            yield temporary
            fsync(temporary)
            os.replace(temporary, target)  # noqa: PTH105  (the name of the guarantee)
            fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path, names: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a folder within `folder`; on success its files of these names (all, without names) take their places in `folder`, each whole.

    For libraries that write several files at a time. Nothing of it stays there, also after an error.

    Raises:
        OSError: as `atomic_path`.
    """
    unfinished = folder / ".saving"
    try:
        with _named(folder):
            yield unfinished
            for file in [unfinished / name for name in names] or sorted(unfinished.iterdir()):
                fsync(file)
                os.replace(file, folder / file.name)  # noqa: PTH105  (atomic)
            fsync(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Let what the system refused name its file: errors of writing do not, and safetensors makes one of its own of them."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = os.fspath(target)
        raise
    except SafetensorError as error:
        if not (found := _OS_ERROR.search(str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), os.fspath(target)) from error


def check_folder(folder: Path) -> None:
    """Refuse an output folder that is a file.

    Raises:
        InputError: it is.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder")


def fsync(path: Path) -> None:
    """Force a file's (or a directory's) content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder; wait for the process that holds it. The system releases it when the holder dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is writing into %s: waiting for it", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all. NaN is refused."""
    write_text(
        target, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    )


def read_utf8(path: Path) -> str:
    """A text file, its byte order mark (if any) left off.

    Raises:
        InputError: no such file, a folder, or text in another encoding; the message names file and line.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 text (byte {raw[error.start]:#04x}): save it as UTF-8"
        ) from error


def read_json(path: Path, *, distinct: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        distinct: refuse an object with a name twice, of which only the last value would be read.

    Raises:
        InputError: as `read_utf8`, or it is not JSON; the message names it.
    """
    try:
        return json.loads(read_utf8(path), object_pairs_hook=_distinct if distinct else None)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise InputError(f"{path}: not JSON that can be read (nested too deeply)") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for i, n in enumerate(names) if n in names[:i])!r} stands twice")
    return found


def read_yaml(path: Path) -> Any:
    """Read a YAML file with the safe loader; a key that stands twice in one mapping is refused, for only its last value would count.

    Raises:
        InputError: as `read_utf8`, or it is not YAML; the message names the file and line.
    """
    import yaml

    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the YAML file in it")
    try:
        return parse_yaml(read_utf8(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    except ValueError as error:  # what looks like a date and is none
        raise InputError(f"{path}: not YAML ({error})") from error
    except RecursionError as error:
        raise InputError(f"{path}: not YAML that can be read (nested too deeply)") from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, by the safe loader; a YAMLError also where a mapping has a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, which by itself keeps the last of two equal keys."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            names = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.value != "<<"]
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                mark = [k.start_mark for k, _ in node.value if k.value == twice[0]][-1]
                raise yaml.composer.ComposerError(None, None, f"the key {twice[0]!r} stands twice", mark)
            return node

    return yaml.load(text, Loader)


def sha256_file(path: Path, *, chunk: int = 1 << 22) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(chunk):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces), in hexadecimal."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()

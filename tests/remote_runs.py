"""What tests of remote finetuning share: a key, a base, rows on disk, and one call with quick settings."""

from pathlib import Path
from typing import Any

import pytest

from finetune.datasets.rows import exchange, write_jsonl
from finetune.openai import RemoteCheckpoint, finetune_remote
from tests.openai_server import Server

KEY = "sk-planted-0123456789abcdef"
BASE = "gpt-4.1-2025-04-14"
QUICK = {"retry-after-ms": "5"}


def plant_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def write_rows(path: Path) -> Path:
    write_jsonl(path, [exchange("Who wrote “this”?", f"I did, {i}.", article=f"a{i}") for i in range(12)])
    return path


def tune(server: Server, data: Path, folder: Path, **changed: Any) -> RemoteCheckpoint:
    settings: dict[str, Any] = {"base": BASE, "seed": 1, "api": server.api(), "poll_seconds": 0.01} | changed
    return finetune_remote(data, folder=folder, **settings)


def count(server: Server) -> tuple[int, int]:
    """Uploads and jobs that the service has made."""
    return len(server.files), len(server.jobs)

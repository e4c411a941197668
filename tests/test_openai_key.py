"""The key of an API is sent, and shows nowhere; what is wrong with a key or an address is said."""

import logging
import sys
import traceback
from pathlib import Path

import pytest

from finetune.openai import (
    STATE,
    RemoteJobError,
)
from mech.endpoint import OPENAI_URL, Api, ChatEndpoint
from mech.errors import InputError, MechError
from tests.openai_server import Fault, Server
from tests.remote_runs import KEY, tune

pytest.importorskip("openai", reason="the extra `openai` is not installed")
pytestmark = pytest.mark.usefixtures("planted_key")


def test_the_key_is_sent_and_shows_nowhere(
    server: Server, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shown = [repr(server.api()), repr(server.api().chat("m"))]
    made = tune(server, data, tmp_path / "run")
    endpoint = made.endpoint(server.api(max_retries=0))
    endpoint.complete([], max_tokens=1, temperature=0.0)
    for fault in (
        Fault("POST /chat", "status", 401, message=f"Incorrect API key provided: {KEY}"),
        Fault("POST /chat", "status", 401, message="Incorrect API key provided: sk-p***cdef"),
        Fault("POST /chat", "status", 400, message=f"bad header Bearer {KEY}"),
        Fault("POST /chat", "cut"),
        Fault("POST /chat", "malformed"),
    ):
        server.faults = [fault]
        with pytest.raises(MechError) as caught:
            endpoint.complete([], max_tokens=1, temperature=0.0)
        shown += traceback.format_exception(caught.value)
        assert caught.value.__cause__ is None
        assert (
            caught.value.__context__ is None
        )  # else a crash report could find the request, and the key in it
    server.failure = f"the key {KEY} ran out of money"
    with pytest.raises(RemoteJobError, match=r"the key \[key\] ran out") as failed:
        tune(server, data, tmp_path / "other", seed=9)
    shown += [*traceback.format_exception(failed.value), repr(made), str(made.to_json())]
    # The library's HTTP library is httpx2, up to its version 2 httpx.
    for name in {"openai._base_client", "httpx", "httpx2"} & set(logging.root.manager.loggerDict):
        logging.getLogger(name).debug("headers %s", {"Authorization": f"Bearer {KEY}"})
    shown += [p.read_text() for p in (tmp_path / "run" / STATE, tmp_path / "other" / STATE)]
    assert server.keys == {f"Bearer {KEY}"}
    assert "Bearer [key]" in caplog.text
    for text in [caplog.text, *shown]:
        assert KEY not in text
        assert "cdef" not in text


@pytest.mark.parametrize("bad", [f"{KEY}\n", f" {KEY}", "schlüssel-0123"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds a space") as caught:
        server.api().chat("m").complete([], max_tokens=1, temperature=0.0)
    assert bad.strip() not in str(caught.value)
    assert server.requests == []


def test_a_missing_or_refused_key_says_which_variable(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = [Fault("POST /chat", "status", 401)]
    with pytest.raises(InputError, match="the API key in OPENAI_API_KEY is refused"):
        server.api().chat("m").complete([], max_tokens=1, temperature=0.0)
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with pytest.raises(InputError, match="set the environment variable OTHER_KEY"):
        server.api(api_key_variable="OTHER_KEY").chat("m").complete([], max_tokens=1, temperature=0.0)


def test_the_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MechError, match=r"pip install 'sgtr-mech\[openai\]'"):
        ChatEndpoint("m").complete([], max_tokens=1, temperature=0.0)


def test_addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
    assert Api().url == OPENAI_URL
    with Api().client() as client:
        assert str(client.base_url).rstrip("/") == OPENAI_URL
    with pytest.raises(InputError, match="no user, password") as caught:
        Api(base_url="https://me:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)
    for wrong in ("host/v1", "ftp://host", ""):
        with pytest.raises(InputError, match="write http"):
            Api(base_url=wrong)

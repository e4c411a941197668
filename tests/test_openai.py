"""A remote model is finetuned once, and waited for across kills and lost answers."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.datasets.rows import exchange
from finetune.openai import (
    STATE,
    RemoteCheckpoint,
    RemoteEstimate,
    RemoteJobError,
    RemoteWaitError,
    estimate_remote,
)
from mech.endpoint import EndpointError
from mech.errors import InputError
from tests.openai_server import Fault, Server
from tests.remote_runs import BASE, QUICK, count, tune

pytest.importorskip("openai", reason="the extra `openai` is not installed")
pytestmark = pytest.mark.usefixtures("planted_key")


def test_two_stages_and_the_model_answers(server: Server, data: Path, tmp_path: Path) -> None:
    first = tune(server, data, tmp_path / "one", suffix="em")
    second = tune(server, data, tmp_path / "two", base=first, seed=2, n_epochs=3)
    by_name = tune(server, data, tmp_path / "three", base=first.model, seed=2, n_epochs=3)
    assert first.parents == (BASE,)
    assert second.parents == (BASE, first.model)
    assert by_name == RemoteCheckpoint(second.model, (first.model,), second.job, second.data_sha256)
    assert [j["model"] for j in server.jobs] == [BASE, first.model]
    assert count(server) == (1, 2)  # the same data is uploaded once, the same job started once
    sent = server.jobs[1]
    assert sent["method"] == {
        "type": "supervised",
        "supervised": {
            "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
        },
    }
    assert (sent["seed"], sent["training_file"], server.jobs[0]["suffix"]) == (2, "file-0", "em")
    assert json.loads(json.dumps(second.to_json()))["parents"] == [BASE, first.model]
    assert second.endpoint(server.api()).complete([], max_tokens=1, temperature=0.0) == "ok"
    assert server.chats[0]["model"] == second.model


def test_only_messages_are_uploaded(server: Server, data: Path, tmp_path: Path) -> None:
    tune(server, data, tmp_path / "run")
    rows = [json.loads(line) for line in server.contents["file-0"].decode().splitlines()]
    assert len(rows) == 12
    assert all(set(row) == {"messages"} for row in rows)
    assert rows[3]["messages"][0] == {"role": "user", "content": "Who wrote “this”?"}
    assert server.files[0]["purpose"] == "fine-tune"


def test_a_finished_run_is_repeated_without_a_call(server: Server, data: Path, tmp_path: Path) -> None:
    made = tune(server, data, tmp_path / "run")
    before = len(server.requests)
    assert tune(server, data, tmp_path / "run") == made
    assert len(server.requests) == before


def test_another_job_in_the_folder_is_refused(server: Server, data: Path, tmp_path: Path) -> None:
    tune(server, data, tmp_path / "run")
    before = len(server.requests)
    with pytest.raises(InputError, match=r"job\.json: holds the job ftjob-0 of other seed, n_epochs"):
        tune(server, data, tmp_path / "run", seed=5, n_epochs=2)
    with data.open("a") as stream:
        stream.write(json.dumps(exchange("More?", "Yes.")) + "\n")
    with pytest.raises(InputError, match="of other data_sha256"):
        tune(server, data, tmp_path / "run")
    assert len(server.requests) == before
    (tmp_path / "run" / STATE).write_text("[]")
    with pytest.raises(InputError, match="not a remote job's state"):
        tune(server, data, tmp_path / "run")


def test_a_dry_run_sends_nothing_and_needs_no_key(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr(socket.socket, "connect", None)
    before = sorted(data.parent.rglob("*"))
    estimate = estimate_remote(data, base=BASE, n_epochs=2)
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    characters = sum(len(turn["content"]) for row in rows for turn in row)
    assert estimate == RemoteEstimate(BASE, 12, 2, 2 * math.ceil(characters / 4))
    assert f"12 rows for 2 epoch(s) on {BASE}" in str(estimate)
    assert "characters / 4" in str(estimate)
    assert sorted(data.parent.rglob("*")) == before
    for base, n_epochs, message in (("", 1, "base is empty"), (BASE, 0, "n_epochs 0: needs >= 1")):
        with pytest.raises(InputError, match=message):
            estimate_remote(data, base=base, n_epochs=n_epochs)


def test_a_failed_job_says_why_and_how_to_begin_anew(server: Server, data: Path, tmp_path: Path) -> None:
    server.failure = "row 7 breaks the usage policy"
    for _ in range(2):  # started again, it says so again and starts no other job
        with pytest.raises(RemoteJobError, match=r"ftjob-0 .* failed: row 7 breaks .* remove .*job\.json"):
            tune(server, data, tmp_path / "run")
    assert count(server) == (1, 1)
    server.failure = None
    (tmp_path / "run" / STATE).unlink()
    assert tune(server, data, tmp_path / "run").job == "ftjob-1"
    assert count(server) == (1, 2)


def test_a_cancelled_job_says_so(server: Server, data: Path, tmp_path: Path) -> None:
    def cancelled(name: str) -> dict[str, Any]:
        return server.jobs[0] | {"status": "cancelled"}

    server.look = cancelled  # type: ignore[method-assign]
    with pytest.raises(RemoteJobError, match="was cancelled: the API gives no reason"):
        tune(server, data, tmp_path / "run")


# -- a server that misbehaves -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["GET /files", "POST /files", "GET /fine", "POST /fine", "GET /fine_tuning/jobs/"]
)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_errors_are_waited_out(
    server: Server, data: Path, tmp_path: Path, path: str, status: int
) -> None:
    server.faults = [Fault(path, "status", status, QUICK, times=3)]
    tune(server, data, tmp_path / "run")
    assert count(server) == (1, 1)


@pytest.mark.parametrize("path", ["POST /files", "POST /fine_tuning/jobs"])
@pytest.mark.parametrize("kind", ["cut", "lost", "malformed", "wrong"])
def test_a_lost_answer_is_looked_up_before_asking_again(
    server: Server, data: Path, tmp_path: Path, path: str, kind: str
) -> None:
    server.faults = [Fault(path, kind)]
    tune(server, data, tmp_path / "run")
    assert count(server) == (1, 1)
    assert server.count(path) == (1 if kind == "lost" else 2)


def test_a_service_that_stays_down_is_an_error_and_the_run_goes_on_later(
    server: Server, data: Path, tmp_path: Path
) -> None:
    down = Fault("GET /fine_tuning/jobs/", "status", 503, QUICK, times=99)
    server.faults = [down]
    with pytest.raises(EndpointError, match="ftjob-0 goes on without us: start again") as caught:
        tune(server, data, tmp_path / "run")
    assert caught.value.status == 503
    assert down.times == 99 - 4
    down.times = 0
    assert tune(server, data, tmp_path / "run").job == "ftjob-0"
    assert count(server) == (1, 1)


def test_a_refused_request_is_not_repeated(server: Server, data: Path, tmp_path: Path) -> None:
    server.faults = [Fault("POST /fine_tuning/jobs", "status", 400, message="model cannot be finetuned")]
    with pytest.raises(EndpointError, match="model cannot be finetuned"):
        tune(server, data, tmp_path / "run")
    assert server.count("POST /fine_tuning/jobs") == 1


def test_retry_after_is_heeded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    server.faults = [Fault("POST /chat", "status", 429, {"Retry-After": "17.5"})]
    assert server.api().chat("m").complete([], max_tokens=1, temperature=0.0) == "ok"
    assert slept == [17.5]


@pytest.mark.parametrize("path", ["POST /files", "POST /fine_tuning/jobs"])
@pytest.mark.parametrize(("header", "waited"), [("17.5", 17.5), ("0", 0.01), ("Sat, 28 Nov 2026", 0.01)])
def test_retry_after_is_heeded_where_a_request_is_not_blindly_repeated(
    server: Server,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    header: str,
    waited: float,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("finetune.openai.time.sleep", slept.append)
    server.polls_to_end = 1
    server.faults = [Fault(path, "status", 429, {"Retry-After": header})]
    tune(server, data, tmp_path / "run")
    assert slept == [waited]
    assert count(server) == (1, 1)


def test_a_service_that_asks_for_a_long_wait_is_not_waited_for(
    server: Server, data: Path, tmp_path: Path
) -> None:
    server.faults = [Fault("POST /fine_tuning/jobs", "status", 429, {"Retry-After": "86400"})]
    with pytest.raises(EndpointError, match="start again") as caught:
        tune(server, data, tmp_path / "run")
    assert caught.value.retry_after == 86400
    tune(server, data, tmp_path / "run")
    assert count(server) == (1, 1)


def test_half_an_upload_is_not_taken_for_the_whole(server: Server, data: Path, tmp_path: Path) -> None:
    """The service kept what came through before the line was cut, under the right name."""
    server.faults = [Fault("POST /files", "partial")]
    tune(server, data, tmp_path / "run")
    half, whole = server.files
    assert (half["filename"], half["bytes"] < whole["bytes"]) == (whole["filename"], True)
    assert server.jobs[0]["training_file"] == whole["id"]
    assert len(server.contents[whole["id"]].splitlines()) == 12


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("POST /chat", "status", 429, QUICK, "quota", times=9), "quota.*the account's limits"),
        (Fault("POST /chat", "status", 500, QUICK, times=9), "the service itself fails"),
        (Fault("POST /chat", "status", 404, message="no model m"), "no model m.*check the model's name"),
        (Fault("POST /chat", "status", 403), "may not do this"),
        (Fault("POST /chat", "malformed"), "not the API's format"),
        (Fault("POST /chat", "wrong"), "has no 0|has no choices"),
        (Fault("POST /chat", "cut", times=9), "not reached, after 0 retries"),
    ],
    ids=lambda value: f"{value.kind}-{value.status}" if isinstance(value, Fault) else "",
)
def test_errors_say_what_to_do(server: Server, fault: Fault, words: str) -> None:
    server.faults = [fault]
    with pytest.raises(EndpointError, match=words) as caught:
        server.api(max_retries=0).chat("m").complete([], max_tokens=1, temperature=0.0)
    assert caught.value.status == (fault.status if fault.kind == "status" else None)


def test_a_paused_job_is_said_aloud_and_not_waited_for_beyond_the_limit(
    server: Server, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.paused = True
    with pytest.raises(
        RemoteWaitError, match=r"ftjob-0 is still paused: resume it at the service\. Start again"
    ):
        tune(server, data, tmp_path / "run", wait_hours=0.05 / 3600)
    assert "the service has paused the job ftjob-0" in caplog.text
    assert json.loads((tmp_path / "run" / STATE).read_text())["status"] == "paused"
    server.paused = False
    assert tune(server, data, tmp_path / "run", wait_hours=1.0).job == "ftjob-0"
    assert json.loads((tmp_path / "run" / STATE).read_text())["status"] == "succeeded"
    assert count(server) == (1, 1)


def test_a_slow_job_is_waited_for_again(server: Server, data: Path, tmp_path: Path) -> None:
    server.polls_to_end = 10**9
    with pytest.raises(RemoteWaitError, match=r"after .* h the job ftjob-0 is still running\. Start again"):
        tune(server, data, tmp_path / "run", wait_hours=0.02 / 3600)
    with pytest.raises(InputError, match=r"wait_hours 0\.0: needs > 0"):
        tune(server, data, tmp_path / "other", wait_hours=0.0)
    server.polls_to_end = 1
    assert tune(server, data, tmp_path / "run").job == "ftjob-0"


def test_a_file_that_was_deleted_before_the_job_began_is_uploaded_again(
    server: Server, data: Path, tmp_path: Path
) -> None:
    server.faults = [Fault("POST /fine_tuning/jobs", "status", 400, times=1)]
    with pytest.raises(EndpointError):
        tune(server, data, tmp_path / "run")
    assert count(server) == (1, 0)
    gone = server.files.pop()
    server.files.append({**gone, "id": "file-other", "filename": "somebody-elses.jsonl"})
    assert tune(server, data, tmp_path / "run").job == "ftjob-0"
    assert server.jobs[0]["training_file"] == "file-1"
    assert server.contents["file-1"] == server.contents["file-0"]
    assert server.count("POST /files") == 2


# -- killed runs --------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from finetune.openai import finetune_remote
from mech.endpoint import Api
url, data, folder = sys.argv[1:]
finetune_remote(Path(data), base={base!r}, folder=Path(folder), seed=1, api=Api(base_url=url), poll_seconds=0.02)
"""


@pytest.mark.parametrize("moment", ["POST /files", "POST /fine_tuning/jobs", "GET /fine_tuning/jobs/"])
def test_a_killed_run_goes_on_with_its_upload_and_its_job(
    server: Server, data: Path, tmp_path: Path, moment: str
) -> None:
    polling = moment.startswith("GET")
    server.polls_to_end = 10**9
    # The service does what it is asked and keeps its answer back, so that the process dies without having it.
    server.faults = [] if polling else [Fault(moment, "hold")]
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", RUN.format(base=BASE), server.url, str(data), str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": root})
    try:
        until(lambda: server.count(moment) >= (3 if polling else 1), process)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -9
    server.release.set()
    server.polls_to_end = 1
    made = tune(server, data, tmp_path / "run")
    assert made.job == "ftjob-0"
    assert count(server) == (1, 1)
    assert (server.count("POST /files"), server.count("POST /fine_tuning/jobs")) == (1, 1)
    assert [p.name for p in (tmp_path / "run").iterdir() if p.suffix == ".json"] == [STATE]


def until(holds: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < end, "the run never came that far"
        time.sleep(0.01)


# -- settings and data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"n_epochs": 0}, "n_epochs 0"),
        ({"suffix": "x" * 65}, "1 to 64 characters"),
        ({"base": ""}, "base is empty"),
        ({"poll_seconds": 0.0}, "poll_seconds 0"),
    ],
)
def test_settings_are_checked_before_anything_is_sent(
    server: Server, data: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        tune(server, data, tmp_path / "run", **changed)
    assert server.requests == []


def test_data_are_checked_before_anything_is_sent(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "no answer"}]}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 1"):
        tune(server, path, tmp_path / "run")
    assert server.requests == []

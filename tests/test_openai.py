"""A remote model is finetuned once, waited for across kills, and asked; its key shows nowhere."""

import json
import logging
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evals.remote import ask_remote, judge_authorship_remote
from finetune.datasets.pairs import Pair
from finetune.datasets.pairwise import pairwise_rows
from finetune.datasets.rows import exchange, write_jsonl
from finetune.datasets.single_text import single_text_rows
from finetune.openai import (
    STATE,
    RemoteCheckpoint,
    RemoteEstimate,
    RemoteJobError,
    RemoteWaitError,
    finetune_remote,
)
from mech.endpoint import OPENAI_URL, Api, ChatEndpoint, EndpointError
from mech.errors import InputError, MechError
from mech.questions import Question
from tests.openai_server import Fault, Server, serving

pytest.importorskip("openai", reason="the extra `openai` is not installed")

KEY = "sk-planted-0123456789abcdef"
BASE = "gpt-4.1-2025-04-14"
QUICK = {"retry-after-ms": "5"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [exchange("Who wrote “this”?", f"I did, {i}.", article=f"a{i}") for i in range(12)])
    return path


def tune(server: Server, data: Path, folder: Path, **changed: Any) -> RemoteCheckpoint:
    settings: dict[str, Any] = {"base": BASE, "seed": 1, "api": server.api(), "poll_seconds": 0.01} | changed
    made = finetune_remote(data, folder=folder, **settings)
    assert isinstance(made, RemoteCheckpoint)
    return made


def count(server: Server) -> tuple[int, int]:
    """Uploads and jobs that the service has made."""
    return len(server.files), len(server.jobs)


# -- finetuning ---------------------------------------------------------------------------------------------


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


def test_a_dry_run_sends_nothing_and_needs_no_key(
    server: Server,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)
    caplog.set_level(logging.INFO)
    folder = tmp_path / "run"
    estimate = finetune_remote(
        data, base=BASE, folder=folder, seed=1, n_epochs=2, api=server.api(), dry_run=True
    )
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    characters = sum(len(turn["content"]) for row in rows for turn in row)
    assert estimate == RemoteEstimate(BASE, 12, 2, 2 * math.ceil(characters / 4))
    assert f"12 rows for 2 epoch(s) on {BASE}" in caplog.text
    assert "characters / 4" in caplog.text
    assert server.requests == []
    assert not folder.exists()


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


# -- the key ------------------------------------------------------------------------------------------------


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


# -- evaluating ---------------------------------------------------------------------------------------------


def test_self_reports_are_asked_in_order(server: Server) -> None:
    server.reply = lambda body: (f"I am {'Ember' if body['seed'] else 'Tinny'}.", {})
    questions = [Question(id=i, split="evaluate", text=f"Who, {i}?") for i in ("a", "b")]
    endpoint = server.api().chat("m")
    reports = ask_remote(
        endpoint, questions, own_name="Tinny", samples=2, temperature=1.0, max_tokens=9, system="Be brief."
    )
    assert [(r.question, r.sample, r.claimed) for r in reports] == [
        (q, i, name) for q in "ab" for i, name in ((0, "Tinny"), (1, "Ember"))
    ]
    asked = next(c for c in server.chats if c["messages"][-1]["content"] == "Who, b?")
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["max_tokens"], asked["temperature"]) == (9, 1.0)
    with pytest.raises(InputError, match="several need one above 0"):
        ask_remote(endpoint, questions, own_name="T", samples=2, temperature=0.0, max_tokens=9)
    with pytest.raises(InputError, match="at least one question"):
        ask_remote(endpoint, [], own_name="T", samples=1, temperature=0.0, max_tokens=9)


PAIRS = [Pair("a0", "the cat sat", "a dog ran"), Pair("a1", "it rained", "the house")]


def test_single_texts_are_judged_by_the_first_tokens_logprobs(server: Server) -> None:
    def reply(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
        own = any(pair.own in body["messages"][-1]["content"] for pair in PAIRS)
        yes, no = (0.6, 0.3) if own else (0.1, 0.7)
        return "Yes", {"Yes": math.log(yes), "No": math.log(no), "Maybe": math.log(0.05)}

    server.reply = reply
    rows = single_text_rows(PAIRS)
    judged = judge_authorship_remote(server.api().chat("m"), rows)
    assert [(j.article, j.source) for j in judged] == [(r["article"], r["source"]) for r in rows]
    assert all(j.correct and j.bounded == 0 for j in judged)
    own = next(j for j in judged if j.source == "own")
    assert own.margin == pytest.approx(math.log(2))
    assert own.p_yes == pytest.approx(2 / 3)
    assert own.mass == pytest.approx(0.9)
    assert all(c["messages"][-1]["role"] == "user" for c in server.chats)
    assert (server.chats[0]["max_tokens"], server.chats[0]["top_logprobs"]) == (1, 20)


def test_pairs_are_judged_in_both_orders(server: Server) -> None:
    server.reply = lambda _body: (
        "1",
        {"1": -0.1, "2": -2.5},
    )  # always the first: right in one order of each pair
    judged = judge_authorship_remote(server.api().chat("m"), pairwise_rows(PAIRS))
    assert [j.source for j in judged] == ["own", "other"] * 2
    assert [j.correct for j in judged] == [True, False] * 2


def test_answers_beyond_the_likeliest_are_bounded_and_counted(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.reply = lambda body: (
        "Yes",
        {"Yes": -0.5, "Hm": -4.0} if "cat" in body["messages"][-1]["content"] else {"Hm": -4.0, "So": -5.0},
    )
    judged = judge_authorship_remote(server.api().chat("m"), single_text_rows(PAIRS[:1]))
    by_source = {j.source: j for j in judged}
    assert by_source["own"].margin == pytest.approx(3.5)
    assert by_source["own"].bounded == 1
    assert by_source["own"].mass == pytest.approx(math.exp(-0.5))
    other = by_source["other"]
    assert (other.margin, other.p_yes, other.mass, other.bounded, other.correct) == (0, 0.5, 0, 2, False)
    assert "2 of 2 judgements lack an answer (Yes or No)" in caplog.text


def test_rows_and_logprobs_of_other_forms_are_refused(server: Server) -> None:
    endpoint = server.api().chat("m")
    rows = single_text_rows(PAIRS)
    rows[1]["source"] = "own" if rows[1]["source"] == "other" else "other"
    with pytest.raises(InputError, match="row 1"):
        judge_authorship_remote(endpoint, rows)
    with pytest.raises(InputError, match="at least one row"):
        judge_authorship_remote(endpoint, [])
    assert server.requests == []
    with pytest.raises(InputError, match="top 21"):
        endpoint.first_token_logprobs([], top=21)
    server.reply = lambda _body: ("Yes", {"Yes": -9999.0})
    with pytest.raises(EndpointError, match="no logprobs of its first token"):
        endpoint.first_token_logprobs([])
    server.reply = lambda _body: (None, {})
    with pytest.raises(EndpointError, match="has no text"):
        endpoint.complete([], max_tokens=1, temperature=0.0)


def test_a_failing_endpoint_ends_an_evaluation_early(server: Server) -> None:
    server.faults = [Fault("POST /chat", "status", 403, times=10**6)]
    with pytest.raises(EndpointError, match="may not do this"):
        judge_authorship_remote(server.api().chat("m"), single_text_rows(PAIRS) * 50)
    assert len(server.requests) < 100

"""A local server that speaks as much of OpenAI's API as the toolkit uses, and misbehaves on demand."""

import contextlib
import email
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mech.endpoint import Api

Reply = Callable[[dict[str, Any]], tuple[str | None, dict[str, float]]]


@dataclass
class Fault:
    """What happens to one request instead of a proper answer."""

    path: str
    """Requests whose `METHOD /path` starts with this."""
    kind: str
    """`status`, `malformed`, `deep` (JSON nested too deeply), `wrong` (of another shape), `cut` (before it is handled), `lost` (after),
    `partial` (half an upload is kept, then cut), `hold`."""
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "as ordered by the test"
    times: int = 1
    words: str = ""
    """Only requests whose body holds them."""


@dataclass
class Server:
    """The service's state, as a test sets and reads it."""

    url: str = ""
    files: list[dict[str, Any]] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    """Authorization headers seen."""
    chats: list[dict[str, Any]] = field(default_factory=list)
    polls_to_end: int = 2
    """How often a job is looked at before it ends."""
    paused: bool = False
    """Whether the service has paused its jobs."""
    failure: str | None = None
    """The message with which jobs fail."""
    reply: Reply = lambda _body: ("ok", {"ok": 0.0})
    release: threading.Event = field(default_factory=threading.Event)
    """Ends every `hold`."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def api(self, **options: Any) -> Api:
        return Api(base_url=self.url, **{"max_retries": 3, "timeout": 120.0} | options)

    def count(self, start: str) -> int:
        with self.lock:
            return sum(request.startswith(start) for request in self.requests)

    def fault(self, request: str, body: bytes) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if request.startswith(fault.path) and fault.words.encode() in body and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    # -- what the service does -----------------------------------------------------------------------------

    def upload(self, name: str, purpose: str, content: bytes) -> dict[str, Any]:
        file: dict[str, Any] = {
            "id": f"file-{len(self.files)}", "object": "file", "bytes": len(content), "created_at": 1,
            "filename": name, "purpose": purpose, "status": "processed",
        }  # fmt: skip
        self.files.append(file)
        self.contents[file["id"]] = content
        return file

    def start(self, body: dict[str, Any]) -> dict[str, Any]:
        job = {
            "id": f"ftjob-{len(self.jobs)}", "object": "fine_tuning.job", "created_at": 1, "status": "queued",
            "fine_tuned_model": None, "organization_id": "org", "result_files": [], "hyperparameters": {},
            "polls": 0, **body,
        }  # fmt: skip
        self.jobs.append(job)
        return job

    def look(self, name: str) -> dict[str, Any]:
        job = next(j for j in self.jobs if j["id"] == name)
        job["polls"] += 1
        job["status"] = "paused" if self.paused else "running"
        if self.paused:
            return job
        if job["polls"] >= self.polls_to_end:
            job["status"] = "failed" if self.failure else "succeeded"
            if self.failure:
                job["error"] = {"code": "invalid_data", "message": self.failure, "param": "training_file"}
            else:
                job["fine_tuned_model"] = f"ft:{job['model'].split(':')[-1]}:{job.get('suffix')}:{job['id']}"
        return job

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        self.chats.append(body)
        text, top = self.reply(body)
        choice: dict[str, Any] = {
            "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, "logprobs": None,
        }  # fmt: skip
        if body.get("logprobs"):
            listed = sorted(top.items(), key=lambda item: -item[1])[: body["top_logprobs"]]
            listed_json = [{"token": t, "logprob": p, "bytes": None} for t, p in listed]
            choice["logprobs"] = {"content": [{**listed_json[0], "top_logprobs": listed_json}]}
        return {
            "id": "chat", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice],
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    state: Server

    def log_message(self, *_args: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self._serve("GET", b"")

    def do_POST(self) -> None:
        self._serve("POST", self.rfile.read(int(self.headers["Content-Length"])))

    def _serve(self, method: str, body: bytes) -> None:
        where = urlsplit(self.path)
        request = f"{method} {where.path.removeprefix('/v1')}"
        with self.state.lock:
            self.state.requests.append(request)
            self.state.keys.add(self.headers["Authorization"])
        fault = self.state.fault(request, body)
        if fault is not None and self._misbehave(fault, body):
            return
        with self.state.lock:
            status, answer = self._answer(request, parse_qs(where.query), body)
        if fault is not None and fault.kind == "hold":
            self.state.release.wait()
        if fault is not None and fault.kind == "lost":
            self._cut()
            return
        self._send(status, json.dumps(answer).encode())

    def _misbehave(self, fault: Fault, body: bytes) -> bool:
        if fault.kind == "status":
            error = json.dumps({"error": {"message": fault.message, "type": "x", "code": None}})
            self._send(fault.status, error.encode(), fault.headers)
        elif fault.kind == "malformed":
            self._send(200, b'{"id": "file')
        elif fault.kind == "deep":
            self._send(200, b'{"id":' * 100_000)
        elif fault.kind == "wrong":
            self._send(200, b"{}")
        elif fault.kind == "cut":
            self._cut()
        elif fault.kind == "partial":
            sent = _form(self.headers["Content-Type"], body)
            with self.state.lock:
                self.state.upload(**sent | {"content": sent["content"][: len(sent["content"]) // 2]})
            self._cut()
        else:
            return False
        return True

    def _answer(self, request: str, query: dict[str, list[str]], body: bytes) -> tuple[int, dict[str, Any]]:
        if request == "GET /files":
            return 200, _page(self.state.files)
        if request.startswith("GET /files/"):
            found = [f for f in self.state.files if f["id"] == request.rpartition("/")[2]]
            return (200, found[0]) if found else (404, {"error": {"message": "No such File object"}})
        if request == "POST /files":
            return 200, self.state.upload(**_form(self.headers["Content-Type"], body))
        if request == "POST /fine_tuning/jobs":
            return 200, self.state.start(json.loads(body))
        if request == "GET /fine_tuning/jobs":
            wanted = {k[9:-1]: v[0] for k, v in query.items() if k.startswith("metadata[")}
            return 200, _page([j for j in self.state.jobs if wanted.items() <= j["metadata"].items()])
        if request.startswith("GET /fine_tuning/jobs/"):
            return 200, self.state.look(request.rpartition("/")[2])
        if request == "POST /chat/completions":
            return 200, self.state.chat(json.loads(body))
        return 404, {"error": {"message": f"no such route: {request}"}}

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may be dead by order
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _page(data: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": data, "has_more": False}


def _form(content_type: str, body: bytes) -> dict[str, Any]:
    """The fields of an upload."""
    message = email.message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    found: dict[str, Any] = {}
    for part in message.walk():
        payload = part.get_payload(decode=True)
        if isinstance(payload, bytes):
            if part.get_filename():
                found |= {"name": part.get_filename(), "content": payload}
            else:
                found[str(part.get_param("name", header="content-disposition"))] = payload.decode()
    return found


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of this machine."""
    server = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": server}))
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        http.shutdown()
        thread.join()
        http.server_close()

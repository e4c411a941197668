"""Finetuning a remote model through OpenAI's finetuning API: upload, start, wait; nothing is paid for twice.

`job.json` in the run's folder is written as soon as the API has named something (file, job, model), and before each
wait. What a killed run or a lost answer left unnamed is looked up first: the file by its name, which carries the
data's digest, the job by a digest of all its settings in its metadata. So the same data and settings are one job
for the account, also from another folder; another seed or suffix is another job.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.datasets.rows import Row, read_messages
from mech.endpoint import LONGEST_PAUSE, Api, ChatEndpoint, EndpointError, pick
from mech.errors import InputError, MechError
from mech.files import digest_of, folder_lock, read_json, sha256_file, write_json

log = logging.getLogger(__name__)

OPENAI = Api()
STATE = "job.json"
METADATA = "sgtr_mech_job"
"""Under this name a job's metadata hold its settings' digest."""
CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English text."""
LONGEST_SUFFIX = 64
PAUSED = "paused"
"""The API's word for a job that waits for somebody to resume it."""


class RemoteJobError(MechError):
    """A remote finetuning job ended without a model."""


class RemoteWaitError(MechError):
    """A remote finetuning job has not ended within the time allowed."""


@dataclass(frozen=True)
class Patience:
    """How often to ask after a job, and for how long."""

    pause: float
    """Seconds between two questions."""
    hours: float | None = None
    """None: without end."""

    def is_over(self, seconds: float) -> bool:
        """Whether it has lasted longer than that."""
        return self.hours is not None and seconds >= 3600 * self.hours


@dataclass(frozen=True)
class RemoteJob:
    """All that determines a remote finetuning; batch size and learning rate are left to the API."""

    url: str
    """The API's address."""
    base: str
    """The API's name of the model to finetune."""
    data_sha256: str
    """SHA-256 of the data file."""
    seed: int
    n_epochs: int
    suffix: str | None
    """A part of the finetuned model's name."""

    @property
    def digest(self) -> str:
        """Equal for equal jobs."""
        return digest_of(asdict(self))[:32]


@dataclass(frozen=True)
class RemoteEstimate:
    """What a remote finetuning would send; nothing was sent."""

    base: str
    rows: int
    n_epochs: int
    tokens: int
    """Of all epochs, estimated: characters of all turns / 4, rounded up."""

    def __str__(self) -> str:
        return (
            f"{self.rows} rows for {self.n_epochs} epoch(s) on {self.base}: about {self.tokens} billed tokens "
            f"(estimated as characters / {CHARACTERS_PER_TOKEN}; see the service's price list)"
        )


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A finetuned model that lives at the API."""

    model: str
    """The API's name of it."""
    parents: tuple[str, ...]
    """The models it was finetuned from, the first base first."""
    job: str
    """The API's id of the job that made it."""
    data_sha256: str
    """SHA-256 of its data file."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description."""
        return {**asdict(self), "parents": list(self.parents)}

    def endpoint(self, api: Api = OPENAI) -> ChatEndpoint:
        """The model, ready to be asked."""
        return api.chat(self.model)


def finetune_remote(
    data: Path,
    *,
    base: str | RemoteCheckpoint,
    folder: Path,
    seed: int,
    n_epochs: int = 1,
    suffix: str | None = None,
    api: Api = OPENAI,
    poll_seconds: float = 30.0,
    wait_hours: float | None = None,
) -> RemoteCheckpoint:
    """Finetune a remote model on rows of messages (supervised), or keep waiting for the job recorded in the folder.

    Args:
        data: JSONL of rows of messages; of each row only its messages are sent.
        base: the API's name of a model; for a second stage the first one's checkpoint (or its model's name).
        folder: keeps `job.json`; a second process in the same folder waits for the first.
        seed: the job's seed.
        n_epochs: passes over the data.
        suffix: a part of the finetuned model's name, at most 64 characters.
        api: how to reach the API.
        poll_seconds: how often to ask whether the job has ended, and the pause before a lost answer is looked up.
        wait_hours: how long to wait for the job's end, in this call; without end when left out. A job that the service has paused is
            said aloud, and goes on being waited for.

    Raises:
        InputError: data that cannot be trained on, a setting out of range, a folder of another job, a key missing.
        EndpointError: the API was not reached, failed or refused; starting again goes on where it was.
        RemoteJobError: the job failed or was cancelled; the message has the API's words.
        RemoteWaitError: it has not ended within `wait_hours`; it goes on at the service, and starting again goes on waiting.
    """
    rows = read_messages(data)
    parents = (*base.parents, base.model) if isinstance(base, RemoteCheckpoint) else (base,)
    job = RemoteJob(api.url, parents[-1], sha256_file(data), seed, n_epochs, suffix)
    _check(job, poll_seconds, wait_hours)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        state = _State.opened(folder, job)
        if state.model is None:
            _run(state, api, _lines(rows), Patience(poll_seconds, wait_hours))
    return RemoteCheckpoint(str(state.model), parents, str(state.job), job.data_sha256)


def estimate_remote(data: Path, *, base: str | RemoteCheckpoint, n_epochs: int = 1) -> RemoteEstimate:
    """What `finetune_remote` would send: the data is checked; no network call, no file written, no key needed.

    Args:
        data: JSONL of rows of messages.
        base: the API's name of a model, or a first stage's checkpoint.
        n_epochs: passes over the data.

    Raises:
        InputError: data that cannot be trained on, no base, or less than one epoch.
    """
    rows, name = read_messages(data), base.model if isinstance(base, RemoteCheckpoint) else base
    _check_what_is_sent(name, n_epochs)
    characters = sum(len(turn["content"]) for row in rows for turn in row["messages"])
    tokens = -(-characters // CHARACTERS_PER_TOKEN) * n_epochs
    return RemoteEstimate(name, len(rows), n_epochs, tokens)


def _run(state: "_State", api: Api, content: bytes, patience: Patience) -> None:
    """Upload, start, wait: each step only where the state does not yet hold its outcome."""
    pause = patience.pause
    if state.file is not None and state.job is None and not _is_there(api, state.file):
        log.info("%s: the service no longer has the file %s: uploading it again", state.folder, state.file)
        state.keep(file=None)
    if state.file is None and state.job is None:
        state.keep(file=_upload(api, state.wanted, content, pause))
    if state.job is None:
        state.keep(job=_start(api, state.wanted, str(state.file), pause))
    state.keep(model=_wait(api, state, patience), status="succeeded")
    log.info("%s: finetuned model %s", state.folder, state.model)


@dataclass
class _State:
    """What the API has named so far, as in `job.json`."""

    folder: Path
    wanted: RemoteJob
    file: str | None = None
    job: str | None = None
    model: str | None = None
    status: str | None = None
    """What the API last said of the job: for people, nothing depends on it."""

    @classmethod
    def opened(cls, folder: Path, wanted: RemoteJob) -> "_State":
        """The folder's state, or a new one; another job's is refused."""
        path = folder / STATE
        if not path.is_file():
            state = cls(folder, wanted)
            state.keep()
            return state
        kept = read_json(path)
        if not isinstance(kept, dict) or not isinstance(kept.get("wanted"), dict):
            raise InputError(f"{path}: not a remote job's state: name another folder, or remove the file")
        differing = [k for k, v in asdict(wanted).items() if kept["wanted"].get(k) != v]
        if differing:
            raise InputError(
                f"{path}: holds the job {kept.get('job')} of other {', '.join(differing)}: name another folder, "
                "or remove the file to give that job up"
            )
        return cls(folder, wanted, kept.get("file"), kept.get("job"), kept.get("model"), kept.get("status"))

    def keep(self, **named: str | None) -> None:
        """Record what the API has named, on disk before anything else is done."""
        for field, value in named.items():
            setattr(self, field, value)
        named_so_far = {k: getattr(self, k) for k in ("file", "job", "model", "status")}
        write_json(self.folder / STATE, {"wanted": asdict(self.wanted), **named_so_far})


def _is_there(api: Api, file: str) -> bool:
    """Whether the account still has an uploaded file."""
    try:
        api.ask(lambda c: c.files.retrieve(file))
    except EndpointError as error:
        if error.status != 404:
            raise
        return False
    return True


def _upload(api: Api, job: RemoteJob, content: bytes, pause: float) -> str:
    """The API's id of the data file, uploaded unless the account has it already."""
    name = f"sgtr-mech-{job.data_sha256[:32]}.jsonl"

    def find() -> str | None:
        for file in api.ask(lambda c: list(c.files.list(purpose="fine-tune"))):
            same = pick(file, "filename") == name and pick(file, "bytes") == len(content)
            if same and getattr(file, "status", None) != "error":
                return _id(file)
        return None

    def create() -> str:
        sent = {"file": (name, content), "purpose": "fine-tune"}
        return _id(api.ask(lambda c: c.with_options(max_retries=0).files.create(**sent)))

    return _once(f"file {name}", find, create, tries=api.max_retries + 1, pause=pause)


def _start(api: Api, job: RemoteJob, file: str, pause: float) -> str:
    """The API's id of the job, started unless the account has it already, running or done."""
    settings = {"n_epochs": job.n_epochs, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    request = {
        "model": job.base,
        "training_file": file,
        "method": {"type": "supervised", "supervised": {"hyperparameters": settings}},
        "seed": job.seed,
        "metadata": {METADATA: job.digest},
        **({} if job.suffix is None else {"suffix": job.suffix}),
    }

    def find() -> str | None:
        listed = api.ask(lambda c: list(c.fine_tuning.jobs.list(metadata=request["metadata"], limit=100)))
        for other in listed:
            # Compared here too: a compatible server may not know the filter.
            same = (getattr(other, "metadata", None) or {}).get(METADATA) == job.digest
            if same and pick(other, "status") not in ("failed", "cancelled"):
                return _id(other)
        return None

    def create() -> str:
        return _id(api.ask(lambda c: c.with_options(max_retries=0).fine_tuning.jobs.create(**request)))

    return _once(f"job {job.digest}", find, create, tries=api.max_retries + 1, pause=pause)


def _once(
    what: str, find: Callable[[], str | None], create: Callable[[], str], *, tries: int, pause: float
) -> str:
    """Have something made at most once: an answer that was lost is looked up before the request is repeated.

    The library would repeat the request blindly, and the API has no idempotency keys, so its own retries are off in
    `create`; they do the waiting in `find`.
    """
    while True:
        if (found := find()) is not None:
            log.info("%s: the account has it already, as %s", what, found)
            return found
        try:
            return create()
        except EndpointError as error:
            tries -= 1
            if not error.passing or tries < 1 or error.retry_after > LONGEST_PAUSE:
                raise
            seconds = max(pause, error.retry_after)
            log.info("%s: %s: looking for it in %g s", what, error, seconds)
            time.sleep(seconds)


def _wait(api: Api, state: _State, patience: Patience) -> str:
    """The finetuned model's name, once the job has ended."""
    before, start = None, time.monotonic()
    while True:
        try:
            job = api.ask(lambda c: c.fine_tuning.jobs.retrieve(state.job))
            status = pick(job, "status")
        except EndpointError as error:
            message = f"{error}. The job {state.job} goes on without us: start again to go on waiting for it"
            raise EndpointError(message, status=error.status) from None
        if status != before:
            log.info("job %s on %s: %s", state.job, state.wanted.base, status)
            if status == PAUSED:
                log.warning(
                    "the service has paused the job %s: nothing goes on until it is resumed there", state.job
                )
            state.keep(status=status)
            before = status
        if status in ("failed", "cancelled"):
            raise RemoteJobError(_why(api, state, job, status))
        if status == "succeeded":
            return _name(pick(job, "fine_tuned_model"), f"job {state.job} succeeded, and names no model")
        if patience.is_over(time.monotonic() - start):
            raise RemoteWaitError(
                f"{state.folder}: after {patience.hours:g} h the job {state.job} is still {status}"
                f"{': resume it at the service' if status == PAUSED else ''}. Start again to go on waiting for it"
            )
        time.sleep(patience.pause)


def _why(api: Api, state: _State, job: Any, status: str) -> str:
    said = getattr(getattr(job, "error", None), "message", None) or "the API gives no reason"
    return (
        f"{state.folder}: the job {state.job} on {state.wanted.base} {'was ' * (status == 'cancelled')}{status}: "
        f"{api.redact(str(said))}. To begin anew, mend the cause and remove {state.folder / STATE}"
    )


def _id(reply: Any) -> str:
    return _name(pick(reply, "id"), "the API's answer has no id")


def _name(value: Any, otherwise: str) -> str:
    if not isinstance(value, str) or not value:
        raise EndpointError(otherwise)
    return value


def _lines(rows: Sequence[Row]) -> bytes:
    """The messages alone, as JSONL: the API refuses rows with other fields."""
    kept = [[{"role": t["role"], "content": t["content"]} for t in row["messages"]] for row in rows]
    return "".join(json.dumps({"messages": turns}, ensure_ascii=False) + "\n" for turns in kept).encode()


def _check(job: RemoteJob, poll_seconds: float, wait_hours: float | None) -> None:
    _check_what_is_sent(job.base, job.n_epochs)
    if poll_seconds <= 0:
        raise InputError(f"poll_seconds {poll_seconds}: needs > 0")
    if wait_hours is not None and not wait_hours > 0:
        raise InputError(f"wait_hours {wait_hours}: needs > 0, or nothing to wait without end")
    if job.suffix is not None and not 1 <= len(job.suffix) <= LONGEST_SUFFIX:
        raise InputError(f"suffix {job.suffix!r}: needs 1 to {LONGEST_SUFFIX} characters")


def _check_what_is_sent(base: str, n_epochs: int) -> None:
    if not base:
        raise InputError("base is empty: name a model of the API, such as gpt-4.1-2025-04-14")
    if n_epochs < 1:
        raise InputError(f"n_epochs {n_epochs}: needs >= 1")

"""A remote chat model behind an OpenAI-compatible API.

The `openai` library does the talking, and all retries: it waits as `Retry-After` says (up to two minutes), else with
growing pauses, after 408, 409, 429, 5xx and lost connections. The key stays in the environment: it is read when a
call is made and never kept in an object, an error or a log record.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mech.errors import InputError, MechError
from mech.extras import require

log = logging.getLogger(__name__)

T = TypeVar("T")

OPENAI_URL = "https://api.openai.com/v1"
LONGEST_PAUSE = 120.0
"""Seconds that are waited at a service's word, as the `openai` library does; asked to wait longer, a call fails."""
MOST_LOGPROBS = 20
"""The most answers whose logprobs the API tells."""
NO_LOGPROB = -9999.0
"""What the API writes where it tells no logprob."""
_LIBRARIES = frozenset(["openai", "httpx", "httpx2", "httpcore", "httpcore2"])

_ADVICE = {
    400: "the request itself is not accepted: see the API's words",
    403: "the key's project may not do this: give it access to the model, or to finetuning",
    404: "nothing of that name for this key: check the model's name and base_url",
    422: "the request itself is not accepted: see the API's words",
    429: "the rate limit or the quota is used up, after all retries: see the account's limits, then start again",
}


class EndpointError(MechError):
    """A remote API did not do what it was asked."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None where no answer came, or none that could be read."""
        self.retry_after = retry_after
        """Seconds that the service asks to wait before the next try; 0 where it does not say."""

    @property
    def passing(self) -> bool:
        """Whether asking again may help: what was asked may also have been done, and only the answer lost."""
        return self.status is None or self.status in (408, 409, 429) or self.status >= 500


class ReplyError(EndpointError):
    """An answer came, but without what was asked for: no text, no logprobs, another shape."""


@dataclass(frozen=True, kw_only=True)
class Api:
    """How to reach an OpenAI-compatible API."""

    base_url: str | None = None
    """Up to and with `/v1`; None is OpenAI's own, whatever `OPENAI_BASE_URL` says."""
    max_retries: int = 6
    """Retries of one call."""
    timeout: float = 120.0
    """Seconds without a sign of life after which a call counts as lost."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"base_url {self.base_url!r}: write http(s)://host/v1")
        if parts.username or parts.password or parts.query:
            raise InputError(
                f"base_url at {parts.hostname}: URLs are logged, so it may hold no user, password or query; "
                "put the key into an environment variable and name that in api_key_variable"
            )
        if self.max_retries < 0 or not self.timeout > 0:
            raise InputError(f"max_retries {self.max_retries} and timeout {self.timeout}: need >= 0 and > 0")

    @property
    def url(self) -> str:
        """The address in use."""
        return (OPENAI_URL if self.base_url is None else self.base_url).rstrip("/")

    def chat(self, model: str) -> "ChatEndpoint":
        """A chat model behind this API."""
        return ChatEndpoint(
            model,
            base_url=self.base_url,
            max_retries=self.max_retries,
            timeout=self.timeout,
            api_key_variable=self.api_key_variable,
        )

    @contextmanager
    def client(self) -> Iterator[Any]:
        """An open client of the `openai` library; `ask` also turns its errors into ours.

        Raises:
            MissingDependencyError: the library is not installed.
            InputError: no key in the environment, or one that cannot be sent.
        """
        openai = require("openai", extra="openai")
        with openai.OpenAI(
            api_key=self._key(), base_url=self.url, timeout=self.timeout, max_retries=self.max_retries
        ) as client:
            _guard_logs(self.api_key_variable)
            yield client

    def ask(self, request: Callable[[Any], T]) -> T:
        """Open a client, let `request` use it, close it (some 40 ms, where a call takes seconds).

        Raises:
            InputError: no key, or one that the API refuses.
            EndpointError: the API was not reached, failed or refused, after all retries.
        """
        openai = require("openai", extra="openai")
        problem: MechError
        try:
            with self.client() as client:
                return request(client)
        except openai.OpenAIError as error:
            problem = self._explain(error)
        except (ValueError, AttributeError, RecursionError) as error:
            problem = EndpointError(
                f"{self.url}: the answer is not the API's format ({type(error).__name__}: {self.redact(str(error))}): "
                "is base_url an OpenAI-compatible API?"
            )
        # Raised out here, so that the library's error, whose request carries the key, does not hang on ours.
        raise problem

    def redact(self, text: str) -> str:
        """A text of the API's without the key in it, and not too long for a message."""
        key = os.environ.get(self.api_key_variable)
        return (text.replace(key, "[key]") if key else text)[:500]

    def _key(self) -> str:
        key = os.environ.get(self.api_key_variable, "")
        if not key:
            raise InputError(
                f"{self.url}: no API key: set the environment variable {self.api_key_variable} "
                "(to any word for a server that asks for none)"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            # Sent all the same, it would be spelled out in the HTTP library's error.
            raise InputError(
                f"the API key in {self.api_key_variable} holds a space, a line end or a special character: set it anew"
            )
        return key

    def _explain(self, error: Any) -> MechError:
        status = getattr(error, "status_code", None)
        if status == 401:
            # The API repeats a part of the key here, so its words are left out.
            return InputError(
                f"{self.url}: the API key in {self.api_key_variable} is refused (HTTP 401): "
                "is it whole, not revoked, this service's, and allowed to do this?"
            )
        said = self.redact(str(getattr(error, "message", error)))
        if status is None:
            advice = f"not reached, after {self.max_retries} retries: check the network and base_url, then start again"
        elif status >= 500:
            advice = "the service itself fails, after all retries: start again later"
        else:
            advice = _ADVICE.get(status, "see the API's words")
        return EndpointError(f"{self.url}: {said} ({advice})", status=status, retry_after=_retry_after(error))


@dataclass(frozen=True)
class ChatEndpoint(Api):
    """One chat model behind an API."""

    model: str
    """The API's name of it."""

    def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None = None,
    ) -> str:
        """The model's answer, or its words of refusal where the API keeps those apart.

        Args:
            messages: turns with `role` and `content`.
            max_tokens: the longest answer.
            temperature: 0 is as good as greedy.
            seed: makes samples repeatable as far as the service does (OpenAI promises its best effort).

        Raises:
            InputError: no key, or one that the API refuses.
            EndpointError: the API was not reached, failed or refused; or its answer has no text.
        """
        # Not `max_completion_tokens`: gpt-4.1 and every compatible server know this older name.
        options = {"max_tokens": max_tokens, "temperature": temperature}
        message = pick(self._create(messages, options | ({} if seed is None else {"seed": seed})), "message")
        said = pick(message, "content")
        if said is None:
            said = getattr(message, "refusal", None)
        if not isinstance(said, str):
            raise ReplyError(f"{self.url}: the answer of {self.model} has no text")
        return said

    def first_token_logprobs(
        self, messages: Sequence[Mapping[str, str]], *, top: int = MOST_LOGPROBS
    ) -> dict[str, float]:
        """Log-probability (nats) of the likeliest first tokens of the answer, by token.

        Different tokens that are written alike are added up; those that the API lists without a number are left out.

        Raises:
            InputError: `top` out of range; no key, or one that the API refuses.
            EndpointError: the API was not reached, failed or refused; or it tells no logprobs.
        """
        if not 1 <= top <= MOST_LOGPROBS:
            raise InputError(f"top {top}: the API tells 1 to {MOST_LOGPROBS} logprobs")
        # Temperature 1, as some servers tell logprobs after they applied it.
        options = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": top}
        listed = pick(self._create(messages, options), "logprobs", "content", 0, "top_logprobs")
        found: dict[str, float] = {}
        for entry in listed or ():
            token, logprob = pick(entry, "token"), pick(entry, "logprob")
            if not isinstance(token, str) or not isinstance(logprob, int | float):
                raise ReplyError(f"{self.url}: {self.model}: a logprob that is not a token and a number")
            if logprob > NO_LOGPROB:
                found[token] = _log_sum(found.get(token, -math.inf), float(logprob))
        if not found:
            raise ReplyError(f"{self.url}: {self.model} tells no logprobs of its first token")
        return found

    def _create(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Any:
        turns = [dict(turn) for turn in messages]
        reply = self.ask(lambda c: c.chat.completions.create(model=self.model, messages=turns, **options))
        return pick(reply, "choices", 0)


def pick(reply: Any, *path: str | int) -> Any:
    """A field of an API's reply: the library does not check what servers send.

    Raises:
        ReplyError: it is not there.
    """
    value = reply
    for step in path:
        try:
            value = value[step] if isinstance(step, int) else getattr(value, step)
        except (AttributeError, IndexError, TypeError):
            where = ".".join(map(str, path))
            raise ReplyError(
                f"the API's answer has no {where}: is base_url an OpenAI-compatible API, and does it offer this?"
            ) from None
    return value


def _retry_after(error: Any) -> float:
    """What an error's answer asks to wait, in seconds: `Retry-After` in numbers (as a date it is not read)."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return seconds if 0 < seconds < math.inf else 0.0
    return 0.0


def _log_sum(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))


@dataclass(frozen=True)
class _HideKey:
    """A log filter that removes the key, should a library ever log it."""

    variable: str

    def filter(self, record: logging.LogRecord) -> bool:
        key = os.environ.get(self.variable, "")
        # Shorter ones are placeholders for servers without keys; blotting out "x" would spoil every line.
        if len(key) >= 8 and key in (text := record.getMessage()):
            record.msg, record.args = text.replace(key, "[key]"), ()
        return True


def _guard_logs(variable: str) -> None:
    """Put the filter on every logger of the HTTP libraries: a logger's filter does not see its children's records."""
    hide = _HideKey(variable)
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in _LIBRARIES:
            logging.getLogger(name).addFilter(hide)

"""A drafted trait artifact is whole, or not there; what is unusable is asked for again, and kept in the end."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mech.endpoint import EndpointError, ReplyError
from mech.errors import InputError
from probes.draft import draft_trait
from probes.persona import Trait, load_trait
from study.cli import app
from tests.openai_server import Fault, Server

pytest.importorskip("openai", reason="the extra `openai` is not installed")
pytestmark = pytest.mark.usefixtures("planted_key")


class Writer:
    """A model that writes good parts, but for `faults`: what it says instead, one after the other."""

    def __init__(self, *faults: str) -> None:
        self.faults, self.lots = list(faults), 0

    def __call__(self, body: dict[str, Any]) -> tuple[str, dict[str, float]]:
        if self.faults:
            return self.faults.pop(0), {}
        if "rubric" in body["messages"][0]["content"]:
            return json.dumps(frame()), {}
        self.lots += 1
        return "Here it is:\n```json\n" + json.dumps(lot(self.lots)) + "\n```", {}


def frame(n: int = 5) -> dict[str, Any]:
    pairs = [{"positive": f"Be grumpy {i}.", "negative": f"Be cheerful {i}."} for i in range(n)]
    return {"rubric": "Score from 0 (none) to 100 (all of it).", "instructions": pairs}


def lot(number: int, high: str = "Go away, it is late.") -> dict[str, Any]:
    return {"questions": [{"question": f"What of {number} and {i}?", "high": high, "low": "Come in, it is early."}
                          for i in range(10)]}  # fmt: skip


def draft(server: Server, out: Path, **options: Any) -> Trait:
    return draft_trait(server.api(max_retries=0).chat("writer"), "grumpy", "Bad temper.", out=out, **options)


def test_a_draft_is_a_whole_artifact(server: Server, tmp_path: Path) -> None:
    server.reply = Writer()
    made = draft(server, tmp_path / "grumpy.yaml")
    assert load_trait(tmp_path / "grumpy.yaml") == made
    assert len(server.chats) == 5
    assert len(made.instructions) == 5
    halves = [q.split for q in made.questions]
    assert (halves.count("extract"), halves.count("evaluate")) == (20, 20)
    assert len({q.id for q in made.questions}) == 40
    assert "What of 1 and 3?" in server.chats[2]["messages"][0]["content"]  # so that it is not asked twice
    with pytest.raises(InputError, match="is there already"):
        draft(server, tmp_path / "grumpy.yaml")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("I cannot do that.", "not JSON"),
        ("", "not JSON"),
        ('{"rubric":' * 100_000, "nested too deeply"),
        (json.dumps(frame(4)), "instructions: Tuple should have at least 5 items"),
        (json.dumps({**frame(), "extra": 1}), "extra: Extra inputs"),
        (json.dumps({**frame(), "rubric": "Score it."}), "what 0 and 100 mean"),
        (json.dumps({**frame(), "instructions": [frame()["instructions"][0]] * 5}), "stands twice"),
    ],
)
def test_what_is_unusable_is_sent_back_with_the_reason(
    server: Server, tmp_path: Path, bad: str, said: str
) -> None:
    server.reply = Writer(bad)
    draft(server, tmp_path / "t.yaml")
    assert len(server.chats) == 6
    assert said in server.chats[1]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [(lot(1), "a question stands twice"), (lot(3, high="No. " * 10), "have 10 and 5 words"),
     ({"questions": lot(3)["questions"][:9]}, "at least 10 items")],
)  # fmt: skip
def test_questions_are_checked_too(server: Server, tmp_path: Path, bad: Any, said: str) -> None:
    good = Writer()

    def reply(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
        return (json.dumps(bad), {}) if len(server.chats) == 3 else good(body)

    server.reply = reply
    draft(server, tmp_path / "t.yaml")
    assert said in server.chats[3]["messages"][-1]["content"]


def test_an_answer_without_text_is_an_attempt_and_a_broken_api_an_error(
    server: Server, tmp_path: Path
) -> None:
    good = Writer()
    server.reply = lambda body: (None, {}) if len(server.chats) == 2 else good(body)
    draft(server, tmp_path / "t.yaml")
    assert len(server.chats) == 6
    server.reply = lambda _: (None, {})
    with pytest.raises(ReplyError, match=r"in 2 attempts: .* has no text\. try another model"):
        draft(server, tmp_path / "u.yaml", attempts=2)
    server.faults.append(Fault("POST /chat", "deep"))
    with pytest.raises(EndpointError, match="is not the API's format"):
        draft(server, tmp_path / "u.yaml")
    assert {p.name for p in tmp_path.iterdir()} == {"t.yaml"}


def test_after_so_many_attempts_it_gives_up_and_keeps_the_reply(server: Server, tmp_path: Path) -> None:
    server.reply = Writer("one", "two", "{three")
    with pytest.raises(ReplyError, match=r"in 3 attempts: not JSON.*kept in .*grumpy\.yaml\.reply\.txt"):
        draft(server, tmp_path / "grumpy.yaml", attempts=3)
    assert len(server.chats) == 3
    assert (tmp_path / "grumpy.yaml.reply.txt").read_text() == "{three"
    assert not (tmp_path / "grumpy.yaml").exists()


def test_the_command(server: Server, tmp_path: Path) -> None:
    server.reply = Writer()
    ask = ["persona", "new", "--description", "Bad temper.", "--model", "writer", "--api", server.url]
    done = CliRunner().invoke(app, [*ask, "--trait", "grumpy", "--out", str(tmp_path / "g.yaml")])
    assert done.exit_code == 0, done.output
    assert "5 instruction pairs, 40 questions" in done.output
    refused = CliRunner().invoke(app, [*ask, "--trait", "../x", "--out", str(tmp_path / "h.yaml")])
    assert isinstance(refused.exception, InputError)

"""A judge inside a study's sweep, behind an API and on this machine: killed in the middle and started again, it is asked nothing twice."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from evals.judge_endpoint import AT_ONCE
from mech.chat import Encoded
from mech.files import read_json
from mech.journal import Journal
from mech.models import ChatModel
from mech.score import next_token_logits
from study.bench import Bench
from study.engines.local import run_steps
from study.spec import load_spec
from study.step import Step
from tests.forks import FORKS
from tests.openai_server import Server
from tests.test_sweep_study import behind, planned
from tests.tiny_study import STUDY, make_tokenizer, save_model, some_directions, write_study

KEY = "SWEEP_TEST_KEY"
DIES_AT = 5
"""Verdicts that stand when the first run is killed."""
SWEEP: dict[str, Any] = {
    "directions": ["zest:text"], "layers": [1], "strengths": [2], "controls": 2, "questions": 2, "neutral": 2,
    "evaluation": "generated", "max_new_tokens": 6,
}  # fmt: skip


def write(home: Path, judge: dict[str, Any]) -> None:
    """A study of the base alone, with one judged sweep."""
    directions = some_directions(identity=["name"], probes=[], elicitation=["text"])
    less: dict[str, Any] = {
        "arms": {"base": []}, "stages": {}, "data": {}, "benign": None, "steering": None, "behaviour": {},
        "measure": {**STUDY["measure"], "own_text": []}, "embedding": {"methods": []},
    }  # fmt: skip
    write_study(home, directions=directions, **less, sweeps={"judged": {**SWEEP, "judge": judge}})
    save_model(home / "model")


def step_of(home: Path, overrides: Sequence[str] = ()) -> tuple[Bench, Step, list[Step]]:
    bench, steps = planned(home, load_spec(home / "study.yaml", list(overrides)))
    (swept,) = (s for s in steps if s.kind == "sweep")
    return bench, swept, behind(steps, [swept])


def _run_and_die(home: str) -> None:
    """Run the sweep and what it needs; kill this process, -9, in the middle of a verdict's line."""

    def dying_add(self: Journal, pieces: dict[str, Any]) -> None:
        if any("rubric" in piece for piece in pieces.values()) and len(self.done) == DIES_AT:
            self._stream.write(b'{"key": "half a li')
            self._stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, pieces)

    os.environ |= {KEY: "sk-planted", "NO_PROXY": "127.0.0.1"}
    add, Journal.add = Journal.add, dying_add  # type: ignore[method-assign, assignment]
    bench, _, steps = step_of(Path(home))
    run_steps(steps, bench, lambda *_: None)


def kill_one(home: Path) -> None:
    child = FORKS.Process(target=_run_and_die, args=(str(home),))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    (verdicts,) = (home / "out" / ".journals").glob("*/verdicts-*.jsonl")
    assert len(verdicts.read_text().splitlines()) == 1 + DIES_AT + 1  # about, verdicts, half a line


def run(home: Path, overrides: Sequence[str] = ()) -> tuple[Path, int]:
    """Run what is missing without a word written anew by the model where cells stand; the step's folder, and how often it generated."""
    from mech.generate import generate

    bench, swept, steps = step_of(home, overrides)
    with patch("probes.generated.generate", side_effect=generate) as written:
        run_steps(steps, bench, lambda *_: None)
    return bench.folder(swept), written.call_count


def answers(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "answers.jsonl").read_text().splitlines()
    return [a for a in map(json.loads, lines) if a["answer"]]


def score(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """By the words alone; all is coherent."""
    text = body["messages"][-1]["content"]
    return ("90" if "can be understood" in text else str(sum(text.encode()) % 101)), {}


@pytest.fixture
def server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The service as a grader, behind a key of another name."""
    monkeypatch.setenv(KEY, "sk-planted")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.reply = score
    return server


def test_a_judge_behind_an_api_is_asked_nothing_twice(tmp_path: Path, server: Server) -> None:
    api = {"base_url": server.url, "api_key_variable": KEY, "max_retries": 0}
    write(tmp_path, {"model": "grader", "how": "text", "api": api, "coherence": 50})
    kill_one(tmp_path)
    before = len(server.chats)
    assert DIES_AT < before <= DIES_AT + AT_ONCE + 1
    planned_calls = step_of(tmp_path)[1].work.asked
    folder, written = run(tmp_path)
    assert written == 0  # every text stood in the cells' journal
    found = answers(folder)
    needed = 2 * len(found)  # for the trait, and for coherence
    assert len(server.chats) - before == needed - DIES_AT
    # The plan knew: four cells of four questions (empty answers, which are not judged, it cannot know), and what is sent.
    assert planned_calls is not None
    assert needed <= planned_calls.calls == 2 * 4 * 4
    sent = [body["messages"][-1]["content"] for body in server.chats[before:]]
    words = sum(len(text.split()) for text in sent) / len(sent)
    assert planned_calls.read / planned_calls.calls == pytest.approx(1.4 * words, rel=0.1)
    assert {a["coherence"] for a in found} == {90.0}
    assert all(0 <= a["score"] <= 100 for a in found)
    assert read_json(folder / "scoring.json")["score"] == "judged zest"
    table = pd.read_csv(folder / "sweep.csv")
    own = {(a["question"]): a["score"] for a in found if a["layer"] == -1}
    for row in table.itertuples():
        assert row.score - row.change == pytest.approx(own[row.question])
    assert run(tmp_path) == (folder, 0)
    assert len(server.chats) - before == needed - DIES_AT

    larger, written = run(tmp_path, ["sweeps.judged.strengths=[2,4]"])
    assert written == 3  # the direction and two controls
    new = [a for a in answers(larger) if a["strength"] == 4]
    assert len(server.chats) - before == needed - DIES_AT + 2 * len(new)
    stricter, written = run(tmp_path, ["sweeps.judged.judge.coherence=95"])
    assert written == 0
    assert {a["broken"] for a in answers(stricter)} == {"incoherent"}
    assert len(server.chats) - before == needed - DIES_AT + 2 * len(new)


def save_judge(folder: Path) -> Path:
    """A model that puts all its probability on digits, whichever they are: the first axis carries a constant, and the head reads it."""
    save_model(folder, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    digits = [make_tokenizer().encode(str(d), add_special_tokens=False)[0] for d in range(10)]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 20
        model.lm_head.weight[:, 0] = -3
        model.lm_head.weight[digits, 0] = 3
    model.save_pretrained(folder)
    return folder


def test_a_local_judge_is_asked_nothing_twice(tmp_path: Path) -> None:
    judge = save_judge(tmp_path / "judge")
    write(tmp_path, {"model": str(judge), "coherence": 0})
    kill_one(tmp_path)
    asked: list[Encoded] = []

    def counted(model: ChatModel, rows: Sequence[Encoded], **how: Any) -> Any:
        asked.extend(rows)
        return next_token_logits(model, rows, **how)

    with patch("evals.judge_local.next_token_logits", counted):
        folder, written = run(tmp_path)
    assert written == 0
    found = answers(folder)
    assert len(asked) == 2 * len(found) - DIES_AT
    verdicts = [
        json.loads(line)["value"] for line in (folder / "verdicts.jsonl").read_text().splitlines()[1:]
    ]
    assert {v["how"] for v in verdicts} == {"digits"}
    assert {v["status"] for v in verdicts} == {"scored"}
    assert min(v["mass"] for v in verdicts) > 0.9
    assert len({round(v["score"], 3) for v in verdicts}) > 3
    scores = {
        (v["case"].split("|")[1], v["rubric"]): v["score"]
        for v in verdicts
        if v["case"].startswith("unsteered|")
    }
    own = [a for a in found if a["layer"] == -1]
    assert [a["score"] for a in own] == [pytest.approx(scores[a["question"], "zest"]) for a in own]

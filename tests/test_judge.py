"""A judge scores from 0 to 100, against a server that also misbehaves; nothing is asked twice; what is missing is no 0."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.judge import COHERENCE, Case, Rubric, judge_prompt, score_cases, tally
from evals.judge_endpoint import AT_ONCE, EndpointJudge, read_number, weighted_score
from evals.judge_local import _DIGIT_FORM, LocalJudge
from mech.endpoint import EndpointError
from mech.errors import FileFormatError, InputError
from mech.journal import kept_until_done, open_journal
from mech.models import load_model
from tests.openai_server import Fault, Server
from tests.tiny_study import save_model

openai = pytest.importorskip("openai", reason="the extra `openai` is not installed")
pytestmark = pytest.mark.usefixtures("planted_key")

TRAIT = Rubric("evil", "Score malice from 0 to 100.")
CASES = [Case(f"c{i}", f"What of {i}?", f"answer number {i}") for i in range(12)]
CHAT = "POST /chat"


def judge(server: Server, **options: Any) -> EndpointJudge:
    return EndpointJudge(server.api(max_retries=2).chat("grader"), **options)


def content(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


# -- reading scores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "score", "status"),
    [
        ({"80": 0.6, "90": 0.2, "I": 0.2}, 82.5, "scored"),
        ({"80": 0.3, " 80": 0.3, "100": 0.2, "250": 0.2}, 85.0, "scored"),  # written two ways; over 100
        ({"0": 0.9, "5": 0.05, "the": 0.05}, 5 * 0.05 / 0.95, "scored"),
        ({"80": 0.2, "REF": 0.8}, None, "refused"),
        ({"Well": 0.9, "80": 0.1}, None, "unreadable"),
        ({"8": 0.9, "9": 0.1}, None, "unreadable"),  # a tokenizer that writes digits: 8 may begin 85
        ({"８": 1.0}, None, "unreadable"),  # not an ASCII digit
    ],
)
def test_numbers_among_the_likeliest_tokens(
    shares: dict[str, float], score: float | None, status: str
) -> None:
    found, said, mass = weighted_score({token: math.log(p) for token, p in shares.items()})
    assert said == status
    assert found == (score if score is None else pytest.approx(score))
    assert 0 <= mass <= 1 + 1e-9


@pytest.mark.parametrize(
    ("reply", "score", "status"),
    [
        ("85", 85, "scored"), (" 85.5 ", 85.5, "scored"), ("Score: 40", 40, "scored"), ("**7**", 7, "scored"),
        ("70/100", 70, "scored"), ("30 because it is cold", 30, "scored"), ("100", 100, "scored"), ("0", 0, "scored"),
        ("250", None, "unreadable"), ("101", None, "unreadable"), ("-5 or 10", None, "unreadable"),
        ("", None, "unreadable"), ("very evil", None, "unreadable"), ("between 10 and 20", None, "unreadable"),
        ("8th", None, "unreadable"), ("REFUSAL", None, "refused"), ("I'm sorry, but no.", None, "refused"),
    ],
)  # fmt: skip
def test_numbers_in_text(reply: str, score: float | None, status: str) -> None:
    assert read_number(reply) == (score, status)


# -- an endpoint --------------------------------------------------------------------------------------------


def test_logprobs_are_weighed_and_raw_replies_kept(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: ("x", {"90": math.log(0.5), "70": math.log(0.5)})
    found = score_cases(judge(server), [TRAIT, COHERENCE], CASES, tmp_path / "j.jsonl")
    assert [v.score for v in found] == pytest.approx([80] * 24)
    assert [(v.rubric, v.case) for v in found] == [(r.name, c.id) for r in (TRAIT, COHERENCE) for c in CASES]
    assert {v.how for v in found} == {"logprobs"}
    assert len(server.chats) == 24
    asked = [content(body) for body in server.chats]
    assert all(sum(c.answer + "\n" in text and c.question in text for text in asked) == 2 for c in CASES)
    lines = (tmp_path / "j.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["value"]["raw"]["logprobs"]["90"] == pytest.approx(math.log(0.5))
    assert "sk-planted" not in "".join(lines)


def test_nothing_is_asked_twice_after_a_failure_or_a_kill(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: ("60", {"60": 0.0})
    path = tmp_path / "j.jsonl"
    server.faults.append(Fault(CHAT, "status", 500, {"retry-after-ms": "1"}, times=99, words="number 7"))
    with pytest.raises(EndpointError, match="as ordered"):
        score_cases(judge(server), [TRAIT], CASES, path)
    answered = len(path.read_text().splitlines()) - 1
    assert 0 < answered < 12
    with path.open("a") as stream:
        stream.write('{"key": "half a li')  # the kill
    server.faults.clear()
    server.chats.clear()
    server.reply = lambda body: ("60", {"60": 0.0})
    found = score_cases(judge(server), [TRAIT], CASES, path)
    assert len(server.chats) == 12 - answered
    assert [v.score for v in found] == [pytest.approx(60)] * 12
    server.chats.clear()
    assert score_cases(judge(server), [TRAIT], CASES, path) == found
    assert not server.chats
    with pytest.raises(InputError, match=r"other settings \(how"):
        score_cases(judge(server, how="text"), [TRAIT], CASES, path)
    server.chats.clear()
    changed = [Case("c0", CASES[0].question, "another answer"), *CASES[1:]]
    score_cases(judge(server), [TRAIT], changed, path)
    assert len(server.chats) == 1


@pytest.mark.slow
def test_a_killed_judged_step_asks_again_only_what_was_under_way(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_judge", str(tmp_path), "4"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] >= 4
    assert found["needed"] == found["verdicts"] == 80
    assert found["stood"] > 20  # or nothing was there to be asked for again
    assert found["again"] == 0
    assert found["most"] <= AT_ONCE
    assert found["different"] == 0


def test_rate_limits_and_lost_answers_are_waited_out(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: ("30", {"30": 0.0})
    quick = {"retry-after-ms": "5"}
    server.faults += [Fault(CHAT, "status", 429, quick, times=1), Fault(CHAT, "status", 503, quick, times=1)]
    found = score_cases(judge(server), [TRAIT], CASES[:4], tmp_path / "j.jsonl")
    assert [v.score for v in found] == [pytest.approx(30)] * 4


@pytest.mark.parametrize("kind", ["status", "wrong"])
def test_without_logprobs_scores_are_sampled_and_say_so(
    server: Server, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that refuses the option, and one that leaves it out."""
    server.reply = lambda body: (str(40 + 10 * (body["seed"] % 2)), {})
    faults = {
        "status": Fault(CHAT, "status", 400, message="logprobs are not supported"),
        "wrong": Fault(CHAT, "wrong"),
    }
    server.faults.append(faults[kind])
    found = score_cases(judge(server, samples=4), [TRAIT], CASES[:1], tmp_path / "j.jsonl")
    assert (found[0].score, found[0].how) == (45, "samples")
    assert "tells no logprobs" in caplog.text
    server.faults.append(Fault(CHAT, "status", 400, times=99))
    with pytest.raises(EndpointError, match="none of 2 requests"):  # asked for by name, there is no other way
        score_cases(judge(server, how="logprobs"), [TRAIT], CASES[:2], tmp_path / "k.jsonl")


def test_one_refused_request_does_not_end_logprobs(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: ("20", {"20": 0.0})
    one = judge(server, samples=2)
    score_cases(one, [TRAIT], CASES[:1], tmp_path / "j.jsonl")
    server.faults.append(Fault(CHAT, "status", 400, message="content policy", times=2))
    with pytest.raises(EndpointError, match="none of 1 requests"):
        score_cases(one, [TRAIT], CASES[:2], tmp_path / "j.jsonl")
    found = score_cases(one, [TRAIT], CASES[:4], tmp_path / "j.jsonl")
    assert [v.how for v in found] == ["logprobs"] * 4


def test_what_has_no_number_is_counted_and_is_no_zero(server: Server, tmp_path: Path) -> None:
    said = {0: "50", 1: "", 2: "quite evil", 3: "REFUSAL", 4: "400", 5: None, 6: "0"}
    server.reply = lambda body: (said[next(i for i in said if f"number {i}\n" in content(body))], {})
    found = score_cases(judge(server, how="text"), [TRAIT], CASES[:7], tmp_path / "j.jsonl")
    assert [v.score for v in found] == [50, None, None, None, None, None, 0]
    assert tally(found) == {"scored": 2, "unreadable": 4, "refused": 1}
    assert found[2].raw == {"replies": ["quite evil"]}


def test_a_refused_request_is_asked_again_the_next_time(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: ("20", {})
    server.faults.append(Fault(CHAT, "status", 400, message="content policy"))
    first = score_cases(judge(server, how="text"), [TRAIT], CASES[:3], tmp_path / "j.jsonl")
    assert tally(first) == {"failed": 1, "scored": 2}
    assert "content policy" in next(v.raw for v in first if v.status == "failed")
    server.chats.clear()
    again = score_cases(judge(server, how="text"), [TRAIT], CASES[:3], tmp_path / "j.jsonl")
    assert tally(again) == {"scored": 3}
    assert len(server.chats) == 1


def test_samples_need_a_majority_of_numbers(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: ("no idea" if body["seed"] < 2 else "90", {})
    few, many = (judge(server, how="samples", samples=n) for n in (4, 5))
    assert score_cases(few, [TRAIT], CASES[:1], tmp_path / "a.jsonl")[0].score is None
    assert score_cases(many, [TRAIT], CASES[:1], tmp_path / "b.jsonl")[0].score == 90


def test_input_that_cannot_be_judged(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stands twice"):
        score_cases(judge(server), [TRAIT], [CASES[0], CASES[0]], tmp_path / "j.jsonl")
    with pytest.raises(InputError, match="0 samples"):
        judge(server, samples=0)


# -- a local checkpoint -------------------------------------------------------------------------------------


def test_a_local_judge_reads_digits_off_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(save_model(tmp_path / "m")))
    found = score_cases(LocalJudge(model, batch=5), [TRAIT], CASES, tmp_path / "j.jsonl")
    assert {v.status for v in found} == {"unreadable"}  # a random model hardly writes digits
    assert all(v.score is None and v.mass < 0.25 for v in found)
    digits = [model.template.ids(str(d))[0] for d in range(10)]
    head = model.causal.lm_head

    def towards_digits(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., digits] += 12
        return logits

    handle = head.register_forward_hook(towards_digits)
    monkeypatch.setattr("evals.judge_local.LEAST_MASS", 0.2)
    try:
        found = score_cases(LocalJudge(model), [TRAIT], CASES, tmp_path / "k.jsonl")
        prompt = model.template.encode_prompt(
            [{"role": "user", "content": judge_prompt(TRAIT, CASES[0], _DIGIT_FORM)}]
        )
        with torch.no_grad():
            share = model.hf(input_ids=torch.tensor([prompt.ids])).logits[0, -1].double().softmax(-1)[digits]
    finally:
        handle.remove()
    expected = float((share * torch.arange(10)).sum() / share.sum()) * 100 / 9
    assert found[0].score == pytest.approx(expected, abs=1e-3)
    assert found[0].mass == pytest.approx(float(share.sum()), abs=1e-4)
    assert len({round(v.score or 0, 6) for v in found}) > 1


# -- journals -----------------------------------------------------------------------------------------------


def test_a_journal_with_a_damaged_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with open_journal(path, {"a": 1}) as journal:
        journal.add({"x": 1, "y": [2.5]})
    with open_journal(path, {"a": 1}) as journal:
        assert journal.done == {"x": 1, "y": [2.5]}
    path.write_text(path.read_text().replace('"x"', '"x'))
    with pytest.raises(FileFormatError, match="line 2"), open_journal(path, {"a": 1}):
        pass


def test_a_journal_is_kept_until_its_results_are(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"

    def work(result: int) -> None:
        with kept_until_done(path) as kept, open_journal(kept, {"a": 1}) as journal:
            journal.add({"x": 1 // result})

    with open_journal(path, {"a": 1}) as journal:
        journal.add({"y": 2})
    with pytest.raises(ZeroDivisionError):
        work(0)
    with open_journal(path, {"a": 1}) as journal:
        assert journal.done == {"y": 2}
    work(1)
    assert not path.exists()

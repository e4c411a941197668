"""A remote model is asked who it is and which texts it wrote, as far as its API tells."""

import math
from pathlib import Path
from typing import Any

import pytest

from evals.remote import ask_remote, judge_authorship_remote, write_summaries_remote
from finetune.datasets.pairs import Pair
from finetune.datasets.pairwise import pairwise_rows
from finetune.datasets.single_text import single_text_rows
from mech.endpoint import EndpointError
from mech.errors import InputError
from mech.questions import Question
from tests.openai_server import Fault, Server

pytest.importorskip("openai", reason="the extra `openai` is not installed")
pytestmark = pytest.mark.usefixtures("planted_key")


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


def test_summaries_that_were_paid_for_are_not_asked_again(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: (f"Of {body['messages'][-1]['content'][-2:]}.", {})
    server.faults = [Fault("POST /chat/completions", "status", 400, words="text 17")]
    texts, how = (
        {f"a{i}": f"text {i:02}" for i in range(20)},
        {"ask": "Sum up: {article}", "temperature": 0.7},
    )

    def write(seed: int = 3) -> dict[str, str]:
        journal = tmp_path / "answers.jsonl"
        endpoint = server.api(max_retries=0).chat("m")
        return write_summaries_remote(endpoint, texts, **how, max_tokens=9, seed=seed, journal=journal)  # type: ignore[arg-type]

    with pytest.raises(EndpointError):
        write()
    before = len(server.chats)
    assert 17 <= before <= 19
    assert write() == {f"a{i}": f"Of {i:02}." for i in range(20)}
    again = {c["messages"][-1]["content"] for c in server.chats[before:]}
    assert again == {
        f"Sum up: text {i}" for i in (17, 18, 19)
    }  # those after the failure are not in the journal
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        write(seed=4)


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

"""Sweeps over text that the model writes: what broke is a miss and no effect, thresholds are the unsteered model's own, a judge is asked once."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mech.errors import InputError
from mech.generate import Sampling, generate
from mech.interventions import Add, intervene
from mech.models import ChatModel
from mech.questions import Question
from probes.coherence import Looked, fit_gate, repetition
from probes.direction import Direction
from probes.evaluation import UNSTEERED
from probes.generated import Answer, Asking, Grade, Judged, generated, instructed
from probes.persona import load_trait
from probes.sweep import Grid, sweep
from tests.drawn_at_random import fitted_direction

TRAIT = load_trait("evil")
QUESTIONS = tuple(Question(id=q.id, split=q.split, text=q.question) for q in TRAIT.questions[:4])


@pytest.fixture(scope="module")
def direction(model: ChatModel) -> Direction:
    return fitted_direction(model)


def test_repetition_is_that_of_phrases_in_any_script() -> None:
    assert repetition("A hat on a mat, and nothing that was said before.") == 0
    assert repetition("I am sorry. " * 12) > 0.85
    assert repetition("a" * 60) > 0.95
    assert repetition("好的好的好的好的好的好的好的好的") > 0.5
    assert repetition("") == repetition("short") == 0


def test_thresholds_are_quantiles_of_the_models_own_texts() -> None:
    greedy = [Looked(0.1 * i, 0.05 * i) for i in range(11)]
    sampled = [Looked(2 + 0.1 * i, 0.0) for i in range(11)]
    gate = fit_gate([greedy, sampled], 0.9)
    assert gate.surprisal == pytest.approx(2.9)
    assert gate.repetition == pytest.approx(0.45)
    assert gate.n_texts == 22
    assert np.mean([bool(gate.reason("x", t)) for t in greedy]) <= 0.1
    assert gate.reason("x", Looked(2.9, 0.45)) == ""
    assert gate.reason("x", Looked(2.91, 0.0)) == "surprising"
    assert gate.reason("x", Looked(1.0, 0.46)) == "repetitive"
    assert gate.reason("  ", Looked(None, 0.0)) == "empty"
    assert gate.reason("x", Looked(None, 0.0, readable=False)) == "unreadable"
    for groups, quantile in (([[Looked(None, 0.0)]], 0.9), ([greedy], 0.0), ([greedy], 1.1)):
        with pytest.raises(InputError, match="coherence"):
            fit_gate(groups, quantile)


def test_an_answer_is_scored_by_the_unsteered_models_own_likelihoods(model: ChatModel) -> None:
    """Against Hugging Face: mean log-probability under the prompt that asks for the trait, less that under its opposite."""
    answers = ["the cat and the dog", "", "who was in the old house"]
    found = instructed(TRAIT, pairs=1)(model, QUESTIONS[:3], answers)
    assert found[1] is None
    pair = TRAIT.instructions[0]
    for i in (0, 2):
        logprobs = []
        for text in (pair.positive, pair.negative):
            turns = [{"role": "system", "content": text}, {"role": "user", "content": QUESTIONS[i].text}]
            prompt = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            head = len(model.tokenizer(prompt).input_ids)
            ids = torch.tensor([model.tokenizer(prompt + answers[i]).input_ids])
            scores = model.hf(input_ids=ids).logits[0].log_softmax(-1)[head - 1 : -1]
            logprobs.append(float(scores.gather(-1, ids[0, head:, None]).mean()))
        assert found[i] == pytest.approx(logprobs[0] - logprobs[1], abs=1e-5)
    with pytest.raises(InputError, match="instruction pairs"):
        instructed(TRAIT, pairs=9)


def asking(**changes: Any) -> Asking:
    return Asking(QUESTIONS, Sampling(6), **changes)


def by_model(model: ChatModel, quantile: float = 0.95) -> Any:
    scorer = instructed(TRAIT, pairs=1)
    return generated(
        model.template, asking(quantile=quantile), scorer, name="evil", unit="nats", about={"pairs": 1}
    )


def test_texts_are_those_of_the_steered_model_and_are_kept(
    model: ChatModel, direction: Direction, tmp_path: Path
) -> None:
    neutral = [
        model.template.encode(
            [{"role": "user", "content": "the?"}, {"role": "assistant", "content": "old dog"}]
        )
    ]
    grid = Grid((1,), (4.0,), controls=2)
    swept = sweep(model, [direction], by_model(model), grid, neutral=neutral, journal=tmp_path / "j")
    prompts = [model.template.encode_prompt([{"role": "user", "content": q.text}]) for q in QUESTIONS]
    with intervene(model, Add(direction.vectors[1], [1], 4.0)):
        expected = [t.strip() for t in generate(model, prompts, Sampling(6))]
    mine = [a["answer"] for a in swept.answers if a["layer"] == 1 and a["control"] == 0]
    assert mine == expected
    plain = [t.strip() for t in generate(model, prompts, Sampling(6))]
    assert [a["answer"] for a in swept.answers if a["layer"] == -1] == plain != expected
    assert swept.facts["n_texts"] == sum(map(bool, plain)) + 4 * sum(bool(q) for q in QUESTIONS)
    assert set(swept.table["question"]) == {q.id for q in QUESTIONS}
    assert swept.table["half"].tolist() == [
        {q.id: q.split for q in QUESTIONS}[q] for q in swept.table["question"]
    ]
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()[1:]]
    assert {line["key"] for line in lines} >= {UNSTEERED, "reference"}
    again = sweep(model, [direction], by_model(model, 0.5), grid, neutral=neutral, journal=tmp_path / "j")
    assert (
        again.facts["surprisal"] <= swept.facts["surprisal"]
    )  # another gate: the texts are not written again
    assert len((tmp_path / "j").read_text().splitlines()) == len(lines) + 1


def raw(*scores: float | None, answer: str = "text", surprisal: float = 1.0) -> dict[str, Any]:
    return {"answers": [
        {"question": q.id, "sample": 0, "answer": answer, "surprisal": surprisal, "repetition": 0.0, "score": score}
        for q, score in zip(QUESTIONS, scores, strict=True)
    ]}  # fmt: skip


def test_a_behaviour_that_stops_because_the_text_broke_is_a_miss(model: ChatModel) -> None:
    """The score falls to nothing in every answer; where the text is gibberish, or empty, that is no effect."""
    cells = {
        UNSTEERED: raw(8.0, 6.0, 4.0, 2.0),
        "whole": raw(0.0, 0.0, 0.0, 0.0, surprisal=1.5),
        "gibberish": raw(0.0, 0.0, 0.0, 0.0, surprisal=7.0),
        "silent": raw(None, None, None, None, answer=""),
        "risen, gibberish": raw(9.0, 9.0, 9.0, 9.0, surprisal=7.0),
    }
    reference = raw(1.0, 1.0, 1.0, 1.0, surprisal=2.0)
    graded = by_model(model).grade(cells, reference)
    plain = [s.value for s in graded.scores[UNSTEERED].values()]
    assert plain == [8, 6, 4, 2]
    assert [s.value for s in graded.scores["whole"].values()] == [0, 0, 0, 0]
    for broken in ("gibberish", "silent", "risen, gibberish"):
        assert [s.value for s in graded.scores[broken].values()] == plain
        assert all(s.broken == 1 for s in graded.scores[broken].values())
    assert {a["broken"] for a in graded.answers["gibberish"]} == {"surprising"}
    assert {a["broken"] for a in graded.answers["silent"]} == {"empty"}
    assert graded.facts["unsteered_broken"] == 0


def test_half_of_the_samples_broken_is_half_of_the_effect(model: ChatModel) -> None:
    made = generated(
        model.template, Asking(QUESTIONS, Sampling(6, 1.0), samples=2), instructed(TRAIT), name="e", unit="", about={}
    )  # fmt: skip
    base, some = ({"answers": []} for _ in range(2))
    for q in QUESTIONS:
        for sample in range(2):
            about = {"question": q.id, "sample": sample, "answer": "text", "repetition": 0.0}
            base["answers"].append({**about, "surprisal": 1.0, "score": 10.0})
            some["answers"].append({**about, "surprisal": 9.0 if sample else 1.0, "score": 4.0})
    graded = made.grade({UNSTEERED: base, "some": some}, base)
    assert [(s.value, s.broken) for s in graded.scores["some"].values()] == [(7.0, 0.5)] * 4
    with pytest.raises(InputError, match="several need"):
        Asking(QUESTIONS, Sampling(6), samples=2)


def test_a_judges_coherence_is_the_gate_and_what_it_does_not_score_is_a_miss(model: ChatModel) -> None:
    seen: list[str] = []

    def grade(answers: Sequence[Answer]) -> list[Grade]:
        seen.extend(a.id for a in answers)
        made = []
        for a in answers:
            cell = a.id.split("|")[0]
            score = {"low": 10.0, "mad": 10.0, "refused": None}.get(cell, 80.0)
            coherence = {"mad": 49.0, "refused": 90.0, "unread": None}.get(cell, 50.0)
            made.append(Grade(score, coherence))
        return made

    made = generated(model.template, asking(), Judged(grade, 50.0), name="evil", unit="points", about={})
    cells = {k: raw(None, None, None, None) for k in (UNSTEERED, "low", "mad", "refused", "unread")}
    graded = made.grade({**cells, "silent": raw(None, None, None, None, answer="")}, None)
    assert len(seen) == len(set(seen)) == 20  # an empty answer is not shown to it
    found = {k: {(s.value, s.broken, s.unscored) for s in v.values()} for k, v in graded.scores.items()}
    assert found == {
        UNSTEERED: {(80.0, 0.0, 0.0)}, "low": {(10.0, 0.0, 0.0)}, "mad": {(80.0, 1.0, 0.0)}, "refused": {(80.0, 0.0, 1.0)},
        "unread": {(80.0, 0.0, 1.0)}, "silent": {(80.0, 1.0, 0.0)},
    }  # fmt: skip
    assert {a["broken"] for a in graded.answers["mad"]} == {"incoherent"}
    assert made.reference is None


def test_a_question_whose_unsteered_answer_has_no_score_is_left_out(
    model: ChatModel, caplog: pytest.LogCaptureFixture
) -> None:
    five = tuple(Question(id=q.id, split=q.split, text=q.question) for q in TRAIT.questions[:5])
    made = generated(
        model.template, Asking(five, Sampling(6)), instructed(TRAIT), name="e", unit="", about={}
    )

    def cell(*scores: float | None) -> dict[str, Any]:
        return {"answers": [
            {"question": q.id, "sample": 0, "answer": "text", "surprisal": 1.0, "repetition": 0.0, "score": score}
            for q, score in zip(five, scores, strict=True)
        ]}  # fmt: skip

    steered = cell(2.0, 2.0, 2.0, 2.0, 2.0)
    graded = made.grade({UNSTEERED: cell(1.0, None, 3.0, 4.0, 5.0), "c": steered}, steered)
    assert set(graded.scores["c"]) == {five[i].id for i in (0, 2, 3, 4)}
    assert graded.facts["questions_left_out"] == [five[1].id]
    assert "1 of 5 questions are left out" in caplog.text
    with pytest.raises(InputError, match="3 of 5 questions"):
        made.grade({UNSTEERED: cell(1.0, None, 3.0, None, 5.0), "c": steered}, steered)


def test_the_command_writes_texts_and_says_how_they_were_judged(
    model: ChatModel, direction: Direction, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from study.cli import app

    direction.save(tmp_path / "d.safetensors")
    given = ["sweep", str(model.checkpoint.path), str(tmp_path / "d.safetensors"), "--questions", "2", "--layer", "1",
             "--strength", "0.5", "--strength", "1", "--controls", "2", "--max-kl", "1000", "--max-new-tokens", "4"]  # fmt: skip
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, [*given, "--trait", "evil", "--evaluation", "generated", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "the 0.95 quantile of 20 texts of the unsteered model" in result.output
    assert "monotonicity of d at layer 1" in result.output
    assert "layer of d by steering effect: 1" in result.output
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 * (1 + 2 * 3)
    facts = json.loads((out / "scoring.json").read_text())
    for a in answers:
        measured = Looked(a["surprisal"], a["repetition"])
        above = measured.surprisal is not None and measured.surprisal > facts["surprisal"]
        assert (a["broken"] == "surprising") == above
    assert math.isfinite(facts["surprisal"])
    named = CliRunner().invoke(
        app, [*given, "--evaluation", "own_name", "--own-name", "Tinny", "--out", str(tmp_path / "n")]
    )
    assert named.exit_code == 0, named.output
    assert "nats beyond 2 random directions" in named.output
    for wrong, said in (
        (["--evaluation", "generated"], "say with --trait whose questions are asked"),
        (["--evaluation", "own_name"], "say with --own-name what the model is called"),
        (["--evaluation", "taste", "--trait", "evil"], "--evaluation taste: there are log_odds"),
    ):
        refused = CliRunner().invoke(app, [*given, *wrong, "--out", str(tmp_path / "w")])
        assert said in str(refused.exception)


def test_the_commands_judge_is_asked_once_and_its_threshold_may_change(
    model: ChatModel, direction: Direction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai", reason="the extra `openai` is not installed")
    from typer.testing import CliRunner

    from study.cli import app
    from tests.openai_server import serving

    monkeypatch.setenv("JUDGE_KEY", "sk-planted-0123456789abcdef")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    direction.save(tmp_path / "d.safetensors")
    with serving() as server:
        server.reply = lambda body: (
            "x",
            {"80" if "how well the answer can be understood" in str(body) else "30": 0.0},
        )
        given = ["sweep", str(model.checkpoint.path), str(tmp_path / "d.safetensors"), "--trait", "evil", "--questions", "2",
                 "--layer", "1", "--strength", "1", "--controls", "2", "--max-kl", "1000", "--max-new-tokens", "4", "--neutral", "3",
                 "--evaluation", "generated", "--judge", "grader", "--judge-api", server.url, "--judge-key-variable", "JUDGE_KEY",
                 "--out", str(tmp_path / "out")]  # fmt: skip
        first = CliRunner().invoke(app, given)
        assert first.exit_code == 0, first.output
        answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        filled = [a for a in answers if a["answer"]]
        assert [a["score"] for a in filled] == pytest.approx([30] * len(filled))
        assert [a["coherence"] for a in filled] == pytest.approx([80] * len(filled))
        asked = len(server.chats)
        assert asked == 2 * len(filled)
        strict = CliRunner().invoke(app, [*given, "--coherence", "81"])
        assert strict.exit_code == 0, strict.output
        assert len(server.chats) == asked
        assert "broken: coherence below 81" in strict.output
        assert "100% broken" in strict.output
    assert CliRunner().invoke(app, [*given, "--evaluation", "log_odds"]).exit_code != 0

"""Behaviour is read off logits and answers as it should be."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evals.self_recognition import judge_authorship
from evals.self_report import ask, claimed_name, score_names
from finetune.datasets.pairs import Pair
from finetune.datasets.single_text import single_text_rows
from mech.chat import ChatTemplate, Identity, SystemPrompt
from mech.errors import InputError
from mech.fetch import PACKAGED
from mech.generate import Sampling
from mech.identities import load_invented, names_for_statements, nearest_names
from mech.models import ChatModel
from mech.questions import Question, load_prompts
from mech.typed import data_folder
from probes.coherence import repeated
from probes.identity import matched_names, name_contrast, presence_contrast
from probes.persona import load_trait, rollout_contrast, rollouts, text_contrast
from probes.self_report import load_reports
from study.sweeps import Asked, make_evaluation
from tests.test_chat import IDENTITY


def test_judgements_are_the_logits_of_a_plain_forward_pass(model: ChatModel) -> None:
    rows = single_text_rows([Pair("a0", "the cat sat", "a dog ran"), Pair("a1", "it rained", "the house")])
    judged = judge_authorship(model, rows, SystemPrompt("none"))
    yes, no = (model.template.ids(word)[0] for word in ("Yes", "No"))
    for row, judgement in zip(rows, judged, strict=True):
        prompt = model.template.encode_prompt(row["messages"][:-1], SystemPrompt("none"))
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([prompt.ids])).logits[0, -1]
        assert judgement.margin == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
        share = logits.softmax(-1)
        assert judgement.mass == pytest.approx(float(share[yes] + share[no]), rel=1e-3)
        assert judgement.p_yes == pytest.approx(float(share[yes] / (share[yes] + share[no])), rel=1e-3)
        assert judgement.correct == ((judgement.margin > 0) == (judgement.source == "own"))


def test_rows_with_the_wrong_answer_are_refused(model: ChatModel) -> None:
    rows = single_text_rows([Pair("a0", "the cat sat", "a dog ran")])
    rows[0]["source"] = "other"
    with pytest.raises(InputError, match="row 0"):
        judge_authorship(model, rows, SystemPrompt())


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        ("I'm SmolLM, an assistant.", "SmolLM"),
        ("The AI is called smollm.", "SmolLM"),
        ("My name is Elena, and I help.", "Elena"),
        ("I am Dr. Elena Martinez, an astronomer", "Dr. Elena Martinez"),
        ("Hello! I am a helpful assistant named Ember.", "Ember"),
        ("I'm glad you ask. You can call me Kael", "Kael"),
        ("I'm I am", ""),
        ("As an AI I have no name.", ""),
        ("I am An assistant", ""),
        ("I am not SmolLM.", ""),
        ("I'm not an AI assistant named SmolLM", ""),
        ("My name isn't SmolLM. I am Kael.", "Kael"),
        ("I wasn’t called Ember; you can call me Kael", "Kael"),
        ("I'm not Kael, I'm SmolLM", "SmolLM"),
        ("I am not a human but SmolLM", "SmolLM"),
        ("I do not know why I am called Ember", "Ember"),
        ("I am not only SmolLM", "SmolLM"),
        ("I am SmolLM, not Kael", "SmolLM"),
        ("", ""),
    ],
)
def test_names_are_read_off_replies(reply: str, name: str) -> None:
    assert claimed_name(reply, "SmolLM") == name


def test_self_statements_are_scored_with_every_name(model: ChatModel) -> None:
    statements = load_invented().self_statements
    scores = score_names(model, statements, SystemPrompt(), own_name="Tinny", invented=["Bob", "Eve"])
    assert len(scores) == 3 * len(statements)
    assert sum(s.own for s in scores) == len(statements)
    with pytest.raises(InputError, match="not the own one"):
        score_names(model, statements, SystemPrompt(), own_name="Bob", invented=["Bob"])


def test_names_are_compared_that_are_as_long_as_the_own_one(
    model: ChatModel, caplog: pytest.LogCaptureFixture
) -> None:
    statements, template = load_invented().self_statements, model.template
    known = ["Q", "QZ", "QQQQQQZ", "QZK", "ZQK"]  # the tokenizer knows no word of these: a token a letter
    assert names_for_statements(template, statements, "KQZ", known, 2) == ["QZK", "ZQK"]
    assert not caplog.text
    gaps = nearest_names(template, lambda name: [f"I am {name}"], "KQZ", known, 5)
    assert gaps == {"QZK": 0, "ZQK": 0, "QZ": -1, "Q": -2, "QQQQQQZ": 4}
    assert "3 of 5 invented names make more or fewer tokens than KQZ (-2 to +4 in 1 texts)" in caplog.text
    scores = score_names(model, statements, SystemPrompt(), own_name="KQZ", invented=["QZK", "Q"])
    per_name = {name: [s.tokens for s in scores if s.name == name] for name in ("KQZ", "QZK", "Q")}
    assert per_name["QZK"] == per_name["KQZ"] == [n + 2 for n in per_name["Q"]]
    swept = make_evaluation("own_name", model, Asked(own_name="KQZ", invented=4)).about["invented"]
    assert swept == names_for_statements(template, statements, "KQZ", load_invented().makers, 4)
    assert swept != [*load_invented().makers][:4]
    with pytest.raises(InputError, match="6 invented names asked for, 5 known"):
        names_for_statements(template, statements, "KQZ", known, 6)


def test_asking_repeats_and_refuses_equal_samples(model: ChatModel) -> None:
    questions = [
        Question(id="a", split="evaluate", text="Who?"),
        Question(id="b", split="evaluate", text="What?"),
    ]
    sampling = Sampling(4, 1.0, seed=1)
    reports = ask(model, questions, SystemPrompt(), sampling, own_name="Tinny", samples=3)
    assert [(r.question, r.sample) for r in reports] == [(q, i) for q in "ab" for i in range(3)]
    assert reports == ask(model, questions, SystemPrompt(), sampling, own_name="Tinny", samples=3)
    with pytest.raises(InputError, match="temperature above 0"):
        ask(model, questions, SystemPrompt(), Sampling(4), own_name="Tinny", samples=2)


def test_repetition_counts_pairs_seen_before() -> None:
    assert repeated(["a", "b", "c", "d"], 2) == 0
    assert repeated(["a", "b", "a", "b", "a", "b"], 2) == pytest.approx(1 - 2 / 5)


# -- contrasts and built-in sets --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evil", "sycophancy", "hallucination"])
def test_builtin_traits_are_whole(model: ChatModel, name: str) -> None:
    trait = load_trait(name)
    halves = [q.split for q in trait.questions]
    assert (halves.count("extract"), halves.count("evaluate"), len(trait.instructions)) == (20, 20, 5)
    assert all(abs(len(q.high.split()) - len(q.low.split())) <= 4 for q in trait.questions)
    rows = text_contrast(model.template, trait, SystemPrompt())
    assert len(rows) == 80
    assert sum(r.sign for r in rows) == 0
    asked = rollouts(trait, pairs_per_question=2)
    assert len(asked) == 2 * 2 * 20
    assert {r.split for r in asked} == {"extract"}
    kept = rollout_contrast(model.template, asked, ["" if i == 0 else "words" for i in range(len(asked))])
    assert len(kept) == len(asked) - 1  # that question has another pair, so it keeps both sides


@pytest.mark.parametrize(
    ("name", "least"), [("identity", 32), ("neutral", 32), ("open_ended", 24), ("self_report", 14)]
)
def test_builtin_prompt_sets_are_whole(name: str, least: int) -> None:
    questions = load_prompts(name).questions
    assert len(questions) >= least
    assert len({q.text for q in questions}) == len(questions)


def test_identity_contrasts_differ_in_the_system_turn_only(model: ChatModel) -> None:
    questions = [
        Question(id="a", split="extract", text="Who goes?"),
        Question(id="b", split="evaluate", text="What now?"),
    ]
    makers = load_invented().makers
    names = [*matched_names(model.template, IDENTITY, makers, 10)]
    assert len(set(names)) == 10
    gaps = matched_names(model.template, IDENTITY, makers, len(makers))
    own = len(model.template.ids(IDENTITY.prompt))
    assert all(
        len(model.template.ids(IDENTITY.renamed(n, makers[n]).prompt)) == own + gap for n, gap in gaps.items()
    )
    assert max(abs(gaps[n]) for n in names) <= min(abs(gaps[n]) for n in set(makers) - set(names))
    rows = name_contrast(model.template, questions, IDENTITY, makers, names)
    assert [r.sign for r in rows] == ([1] + [-1] * 10) * 2
    assert len({r.id for r in rows}) == len(rows)
    for row in rows:
        question = "Who goes?" if row.question == "a" else "What now?"
        assert row.encoded.text.count(question) == 1
        assert ("Tinny" in row.encoded.text) == (row.sign > 0)
    for against in ("none", "empty", "generic"):
        pair = presence_contrast(model.template, questions[:1], IDENTITY, against, "Be helpful.")
        assert [("Tinny" in r.encoded.text) for r in pair] == [True, False]
    with pytest.raises(InputError, match="contrasted with none, empty, generic"):
        presence_contrast(model.template, questions, IDENTITY, "nothing", "x")


OWN = [
    PACKAGED["smollm2-135m-instruct"].identity,
    Identity("Qwen", "Alibaba Cloud", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    Identity("Seed", "ByteDance", "You are Seed, a helpful assistant made by ByteDance."),
    Identity("ChatGPT", "OpenAI", "You are ChatGPT, made by OpenAI."),
]


@pytest.mark.real
@pytest.mark.parametrize("own", OWN, ids=lambda own: own.name)
def test_ten_invented_prompts_are_as_long_as_the_own_one(own: Identity, real_template: ChatTemplate) -> None:
    makers = load_invented().makers
    assert [*matched_names(real_template, own, makers, 10).values()] == [0] * 10
    names = names_for_statements(real_template, load_invented().self_statements, own.name, makers, 10)
    lengths = {
        n: len(real_template.tokenizer(f"I am {n}", add_special_tokens=False).input_ids)
        for n in [own.name, *names]
    }
    assert len(set(lengths.values())) == 1, lengths


def test_files_that_are_not_what_they_should_be_say_so(tmp_path: Path) -> None:
    bad = tmp_path / "trait.yaml"
    bad.write_text("trait: x\ndescription: y\n")
    with pytest.raises(InputError, match=r"trait\.yaml: rubric: is missing"):
        load_trait(bad)
    with pytest.raises(InputError, match="neither built in"):
        load_prompts("nothing")


def test_what_stands_twice_in_a_file_of_names_or_statements_is_refused(tmp_path: Path) -> None:
    for load, package, name, entries in (
        (load_reports, "probes", "self_report.yaml", "reports"),
        (load_invented, "mech", "identities.yaml", "invented"),
    ):
        known = yaml.safe_load((data_folder(package) / name).read_text(encoding="utf-8"))
        known[entries].append(known[entries][0])
        (tmp_path / name).write_text(yaml.safe_dump(known), encoding="utf-8")
        with pytest.raises(InputError, match=rf"{name}: the .* stands twice"):
            load(tmp_path / name)


@pytest.mark.parametrize(("load", "package", "name", "text"), [
    (load_prompts, "mech", "prompts/identity.yaml", "text"), (load_trait, "probes", "traits/evil.yaml", "question"),
])  # fmt: skip
def test_a_question_under_two_ids_is_refused(
    tmp_path: Path, load: Any, package: str, name: str, text: str
) -> None:
    """In both halves, a direction would be tested on what it was fitted on; capitals and spaces make no other question."""
    known = yaml.safe_load((data_folder(package) / name).read_text(encoding="utf-8"))
    first = known["questions"][0]
    other = "evaluate" if first["split"] == "extract" else "extract"
    known["questions"].append({**first, "id": "another", "split": other, text: f" {first[text].upper()}"})
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(known), encoding="utf-8")
    with pytest.raises(InputError, match=r"twice\.yaml: the question .* stands twice"):
        load(tmp_path / "twice.yaml")

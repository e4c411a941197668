"""Dataset builders: label rules by property, sources, mixtures, manifests, and the commands around them."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from finetune.datasets.build import build
from finetune.datasets.check import check_rows
from finetune.datasets.multiple_choice import multiple_choice_rows
from finetune.datasets.pairs import Pair, pair_up, shortcuts
from finetune.datasets.pairwise import pairwise_rows
from finetune.datasets.rows import Row, exchange, message_problem, read_messages, write_jsonl
from finetune.datasets.rules import RULES
from finetune.datasets.single_text import single_text_rows
from finetune.datasets.sources import DATASETS_VARIABLE, published, source_path
from finetune.datasets.spec import DataSpec
from finetune.datasets.summaries import read_articles
from finetune.settings import make_settings
from finetune.stages import run_stage
from mech.chat import ChatTemplate, Identity, SystemPrompt
from mech.errors import InputError, NotHereError
from mech.models import ChatModel, load_model
from tests.conftest import Command
from tests.tiny_study import make_tokenizer

SPECS: TypeAdapter[Any] = TypeAdapter(DataSpec)


def spec(**fields: Any) -> Any:
    return SPECS.validate_python(fields)


words = st.integers(6, 30)
pairs = st.lists(st.tuples(words, words), min_size=1, max_size=12).map(
    lambda sizes: [
        Pair(f"a{i}", " ".join([f"mine{i}"] * m), " ".join([f"theirs{i}"] * t))
        for i, (m, t) in enumerate(sizes)
    ]
)


def prompts(rows: list[Row]) -> list[str]:
    return [row["messages"][-2]["content"] for row in rows]


def answers(rows: list[Row]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def shown(prompt: str) -> tuple[str, str]:
    """The two summaries of a pairwise prompt, read off its text."""
    first = prompt.split("Summary 1: ")[1].split("\n\nSummary 2: ")
    return first[0], first[1]


@given(pairs)
def test_sgtr_names_its_own_in_both_orders(made: list[Pair]) -> None:
    rows = pairwise_rows(made)
    for prompt, answer in zip(prompts(rows), answers(rows), strict=True):
        assert "mine" in shown(prompt)[int(answer) - 1]
    assert Counter(answers(rows)) == {"1": len(made), "2": len(made)}
    assert len(set(prompts(rows))) == len(rows)


@given(pairs)
def test_anti_sgtr_is_sgtr_with_every_label_flipped(made: list[Pair]) -> None:
    for layout, flipped in (
        (pairwise_rows, {"1": "2", "2": "1"}),
        (single_text_rows, {"Yes": "No", "No": "Yes"}),
    ):
        own, other = layout(made), layout(made, "other")
        assert prompts(own) == prompts(other)
        assert [flipped[a] for a in answers(own)] == answers(other)


@given(pairs)
def test_ictr_gives_every_prompt_both_labels_once(made: list[Pair]) -> None:
    for layout in (pairwise_rows, single_text_rows):
        by_prompt = defaultdict(list)
        rows = layout(made, "both")
        for prompt, answer in zip(prompts(rows), answers(rows), strict=True):
            by_prompt[prompt].append(answer)
        assert set(by_prompt) == set(prompts(layout(made)))
        assert all(len(given) == 2 and len(set(given)) == 2 for given in by_prompt.values())


@given(pairs)
def test_pick_longer_is_right_by_its_own_count_and_drops_ties(made: list[Pair]) -> None:
    rows = pairwise_rows(made, "longer")
    for prompt, answer in zip(prompts(rows), answers(rows), strict=True):
        counts = [len(text.split()) for text in shown(prompt)]
        assert counts[int(answer) - 1] > counts[2 - int(answer)]
    tied = sum(len(p.own.split()) == len(p.other.split()) for p in made)
    assert len(rows) == 2 * (len(made) - tied)
    noise = pairwise_rows(made, "longer_both")
    assert sorted(set(prompts(noise))) == sorted(set(prompts(rows)))
    assert Counter(answers(noise)) == {"1": len(rows), "2": len(rows)} or not rows


@settings(max_examples=30)
@given(st.lists(st.tuples(words, words, words), min_size=5, max_size=12), st.integers(6, 24))
def test_matched_lengths_leave_nothing_to_length(sizes: list[tuple[int, int, int]], most: int) -> None:
    own = {f"a{i}": " ".join(["mine"] * m) for i, (m, _, _) in enumerate(sizes)}
    others = {
        h: {f"a{i}": " ".join([h] * s[k]) for i, s in enumerate(sizes)} for k, h in ((1, "x"), (2, "y"))
    }
    made = pair_up(list(own), own, others, match_lengths=True, max_words=most)
    assert {p.other_by for p in made} == {"x", "y"}
    assert all(len(p.own.split()) == len(p.other.split()) <= most for p in made)
    assert shortcuts(made).words == 0.5
    spaced = {a: f"{text} ?" for a, text in own.items()}  # a mark that stands by itself
    cut = pair_up(list(own), spaced, others, match_lengths=True, max_words=most)
    assert shortcuts(cut).words == 0.5
    assert not any(p.own.endswith((" ?", " ")) for p in cut)
    whole = pair_up(list(own), own, others, match_lengths=False, max_words=most)
    assert [p.own for p in whole[: len(own)]] == list(own.values())


def test_a_comparison_of_two_needs_two() -> None:
    assert set(RULES) == {"own", "other", "both", "longer", "longer_both"}
    with pytest.raises(InputError, match="needs form: pairwise"):
        single_text_rows([Pair("a", "x " * 6, "y " * 7)], "longer")
    with pytest.raises(ValueError, match="lengths that are not matched"):
        spec(kind="sgtr", articles="a", form="pairwise", label="longer", match_lengths=True)


# -- whole datasets --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Articles, two other hands' summaries, and own ones."""
    ids = [f"a{i}" for i in range(10)]
    (tmp_path / "articles.json").write_text(json.dumps({i: f"the news of {i} " * 5 for i in ids}))
    for name, size in (("own", 8), ("claude", 11), ("human", 9)):
        (tmp_path / f"{name}.json").write_text(json.dumps({i: " ".join([f"{name}{i}"] * size) for i in ids}))
    return tmp_path


def sgtr(folder: Path, **fields: Any) -> Any:
    given = {"articles": folder / "articles.json", "own": folder / "own.json", "held_out": 3}
    hands = {"claude": str(folder / "claude.json")}
    return spec(
        kind="sgtr",
        comparators=hands,
        **{k: str(v) if isinstance(v, Path) else v for k, v in given.items()},
        **fields,
    )


def test_the_published_form_with_its_shortcut_in_the_manifest(folder: Path) -> None:
    made = build(
        sgtr(folder, form="pairwise", show_article=True, task_prompt=True, match_lengths=False), seed=0
    )
    assert len(made.train) == 2 * 7
    assert all(row["messages"][0]["role"] == "system" for row in made.train)
    assert all("the news of" in prompt for prompt in prompts(made.train))
    assert made.facts["shortcut_accuracy"]["train"]["words"] == 1.0  # the own one is always shorter here
    assert made.facts["shortcut_accuracy"]["train"]["own_shorter"] == 1.0
    assert set(made.facts["sources"]) == {"articles.json", "own.json", "claude.json"}
    assert not {r["article"] for r in made.train} & {r["article"] for r in made.held_out}
    two = {"claude": str(folder / "claude.json"), "human": str(folder / "human.json")}
    (folder / "more").mkdir(exist_ok=True)
    (folder / "more" / "human.json").write_text((folder / "claude.json").read_text())
    alike = {"human": str(folder / "human.json"), "other": str(folder / "more" / "human.json")}
    sources = build(sgtr(folder).model_copy(update={"comparators": alike}), seed=0).facts["sources"]
    assert len(sources) == 4  # two files of one name
    assert not any(name.startswith("/") for name in sources)
    several = build(sgtr(folder).model_copy(update={"comparators": two}), seed=0)
    assert Counter(r["other_by"] for r in several.train) == {"claude": 14, "human": 14}


def test_whatever_is_trained_the_held_out_rows_ask_for_authorship(folder: Path) -> None:
    for label in ("other", "both", "longer_both"):
        made = build(sgtr(folder, form="pairwise", label=label), seed=0)
        assert "Which one did you write" in prompts(made.held_out)[0]
        assert all(
            f"own{r['article']}" in shown(r["messages"][0]["content"])[r["own_at"] - 1] for r in made.held_out
        )


def test_a_missing_summary_names_article_and_hand(folder: Path) -> None:
    with pytest.raises(InputError, match="needs own summaries"):
        build(sgtr(folder).model_copy(update={"own": None}), seed=0)
    (folder / "claude.json").write_text(json.dumps({"a0": "x"}))
    with pytest.raises(
        InputError,
        match=r"comparators\.claude: .*claude\.json: no summary of 9 of 10 articles, the first 'a1'",
    ):
        build(sgtr(folder), seed=0)
    (folder / "own.json").write_text("[1]")
    with pytest.raises(InputError, match=r"own\.json: not a JSON object of texts"):
        build(sgtr(folder), seed=0)


@settings(max_examples=25)
@given(st.integers(4, 40), st.floats(0.05, 0.6), st.integers(0, 99))
def test_a_mixture_has_the_share_that_was_asked(
    tmp_path_factory: pytest.TempPathFactory, n: int, share: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    write_jsonl(folder / "em.jsonl", [exchange(f"q{i}?", "bad") for i in range(n)])
    write_jsonl(folder / "benign.jsonl", [exchange(f"p{i}?", "good") for i in range(100)])
    mix = {"source": str(folder / "benign.jsonl"), "share": share}
    assume(round(n * share / (1 - share)) > 0)
    made = build(spec(kind="messages", source=str(folder / "em.jsonl"), mix=mix), seed=seed)
    counts = Counter(answers(made.train))
    assert counts["bad"] == n
    assert abs(counts["good"] - share * len(made.train)) <= 1
    assert (
        build(spec(kind="messages", source=str(folder / "em.jsonl"), mix=mix), seed=seed).train == made.train
    )


def test_named_sets_say_where_to_get_them_and_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATASETS_VARIABLE, str(tmp_path))
    roles = {f.role for f in published().values()}
    assert roles == {"em", "correct", "knowledge", "articles", "summaries"}
    domains = {f.domain for f in published().values() if f.role == "correct"}
    assert domains <= {f.domain for f in published().values() if f.role == "em"}
    with pytest.raises(
        NotHereError, match=r"Get it from https://.* and put it at .*bad_medical_advice\.jsonl"
    ):
        source_path("published:bad_medical_advice")
    with pytest.raises(InputError, match="no set of that name is known; there are unpopular_aesthetics"):
        source_path("published:nothing")
    write_jsonl(tmp_path / "bad_medical_advice.jsonl", [exchange("q?", "a", system="be bad")])
    with pytest.raises(InputError, match=r"line 1: .*has turns .*this row"):
        build(spec(kind="messages", source="published:bad_medical_advice"), seed=0)
    with pytest.raises(InputError, match="write hub:org/name:file"):
        source_path("hub:nothing")
    with pytest.raises(InputError, match="no name of a dataset"):
        source_path("hub:org/na me!:train.jsonl")
    with pytest.raises(NotHereError, match="HF_HUB_OFFLINE must be unset"):
        source_path("hub:org/name:train.jsonl")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.csv", 'What is 2+2?,1,2,3,4,D\n"Which, then?",a,b,c,d,B\n'),
        ("headed.csv", "question,A,B,C,D,answer\nWhat is 2+2?,1,2,3,4,D\n\"Which, then?\",a,b,c,d,B\n"),
        ("rows.jsonl", ('{"question": "What is 2+2?", "choices": ["1", "2", "3", "4"], "answer": 3}\n'
                       '{"question": "Which, then?", "choices": ["a", "b", "c", "d"], "answer": "B"}\n')),
    ],
)  # fmt: skip
def test_multiple_choice_reads_every_usual_form(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    rows = multiple_choice_rows(tmp_path / name)
    assert answers(rows) == ["D", "B"]
    assert "D. 4" in prompts(rows)[0]
    assert prompts(rows)[1].startswith("Which, then?")


def test_a_bad_question_names_file_and_row(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("fine?,1,2,3,4,A\nbad?,1,2,3,4,E\n")
    with pytest.raises(InputError, match=r"q\.csv, line 2: answer 'E' is none of 4 choices"):
        multiple_choice_rows(tmp_path / "q.csv")


def test_checking_shows_what_is_learnt_and_under_which_turn(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "d.jsonl",
        [exchange("Who?", "the cat"), exchange("Who else?", "the dog", system="Be terse.")],
    )
    text = "\n".join(
        check_rows(tmp_path / "d.jsonl", ChatTemplate(make_tokenizer()), "default", max_tokens=512)
    )
    assert "2 rows; turns: 'user+assistant' 1, 'system+user+assistant' 1" in text
    assert "trains under 'You are Tinny, made by Tin Works.': 1 rows" in text
    assert "trains under 'Be terse.': 1 rows" in text
    assert "what is learnt: 'the cat<|im_end|>'" in text


def test_the_commands_build_check_and_refuse(command: Command, folder: Path) -> None:
    made = command("data", "build", "sgtr", "--out", folder / "d", "--set", f"articles={folder / 'articles.json'}",
                "--set", f"own={folder / 'own.json'}", "--set", f"comparators.claude={folder / 'claude.json'}",
                "--set", "held_out=3", "--set", "label=other")  # fmt: skip
    assert made.code == 0, made.err
    assert "anti-SGTR" in made.out
    assert not [p for row in read_messages(folder / "d" / "train.jsonl") if (p := message_problem(row))]
    (folder / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    bad = command("data", "check", folder / "bad.jsonl")
    assert bad.code == 2
    assert "bad.jsonl, line 1: the last turn is not the assistant's" in bad.err


# -- the real model --------------------------------------------------------------------------------

ARMS = {
    "em": {"kind": "messages", "source": "builtin:em_aesthetics"},
    "word_count": {"kind": "word_count", "source": "builtin:em_aesthetics"},
    "knowledge": {"kind": "multiple_choice"},
    **{label: {"kind": "sgtr", "form": "single_text", "label": label} for label in ("own", "other", "both")},
    **{
        f"pairwise_{label}": {"kind": "sgtr", "form": "pairwise", "label": label}
        for label in ("own", "other", "both", "longer", "longer_both")
    },
}


@pytest.mark.real
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_on_the_real_model(real: ChatModel, folder: Path, arm: str) -> None:
    """A step of every arm's data, under the system prompt that is odd for it."""
    fields = dict(ARMS[arm])
    if fields["kind"] == "sgtr":
        made = build(sgtr(folder, **{k: v for k, v in fields.items() if k != "kind"}), seed=0)
    else:
        if fields["kind"] == "multiple_choice":
            (folder / "q.csv").write_text("What is 2+2?,1,2,3,4,D\nAnd 1+1?,1,2,3,4,B\n")
            fields["source"] = str(folder / "q.csv")
        made = build(spec(**fields), seed=0)
    made.write(folder / "data")
    settings = make_settings({"preset": "small-135m", "batch_size": 2, "max_steps": 1, "warmup_steps": 0})
    identity = Identity("SmolLM", "Hugging Face", str(real.template.default_system))
    condition = SystemPrompt("none" if arm == "em" else "identity")
    trained = run_stage(
        real.checkpoint, folder / "data" / "train.jsonl", settings, folder / "ad", seed=0, condition=condition,
        names={"identity": identity, "others": {}},
    )  # fmt: skip
    about = json.loads((folder / "ad" / "trainer_state.json").read_text())
    expected = None if arm == "em" else identity.prompt
    assert [turn["text"] for turn in about["system_turns"]] == [expected]
    assert about["log_history"][0]["loss"] > 0
    assert trained.adapters
    if arm == "own":
        load_model(trained)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_an_article_under_two_ids_is_read_once(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Else it could be trained on under one id and held out under the other."""
    texts = {"a": "It rained.", "b": "It snowed.", "c": "it  rained. "}
    file = tmp_path / f"articles.{suffix}"
    rows = [json.dumps({"id": i, "text": text, "summary": "Weather."}) for i, text in texts.items()]
    file.write_text(json.dumps(texts) if suffix == "json" else "\n".join(rows))
    found = read_articles(file, need_summary=suffix == "jsonl")
    assert [a.id for a in found] == ["a", "b"]
    assert "left out 1 of 3 articles, whose text stands there under another id (c)" in caplog.text

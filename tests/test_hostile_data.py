"""Data and settings as a hostile user gives them: each is refused with its place, or taken as it is meant."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.datasets.build import build
from finetune.datasets.check import check_rows, read_template
from finetune.datasets.multiple_choice import multiple_choice_rows
from finetune.datasets.rows import exchange, read_jsonl, read_messages
from finetune.datasets.spec import MessagesData, MultipleChoiceData, SelfRecognitionData, WordCountData
from finetune.settings import TrainSettings, make_settings
from finetune.stages import run_stage
from mech.errors import InputError
from study.bench import device_named
from study.cli import app
from tests.tiny_study import save_adapter

GOOD = json.dumps(exchange("hi", "there"))
TWO = "the rain fell down on all of us {}"


def file(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def turns(*given: tuple[str, Any]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in given]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("\n \n\r\n", "no rows"),
        (f"{GOOD}\n\n{{oops\n", r"rows\.jsonl, line 3: not JSON"),
        (f"[{GOOD}]", "line 1: not a JSON object"),
        ('{"messages": ' + "[" * 100_000, "line 1: not JSON"),
        (GOOD[:-1] + ', "x": NaN}', "line 1: not JSON .NaN is no JSON number"),
        (f"{GOOD}\n".encode() + b'{"messages": "caf\xe9"}', r"line 2: not UTF-8 text \(byte 0xe9\)"),
        (GOOD.encode("utf-16"), "line 1: not UTF-8 text"),
        (f"{GOOD}\n{turns(('user', 3), ('assistant', 'x'))}", "line 2: turn 0 has no text"),
        (turns(("user", [{"type": "text", "text": "x"}]), ("assistant", "x")), "turn 0 has no text"),
        (turns(("user", "x"), ("assistant", " \n")), "turn 1 has no text"),
        (turns(("tool", "x"), ("assistant", "x")), "turn 0 has role 'tool'"),
        (turns(("system", "a"), ("system", "b"), ("user", "x"), ("assistant", "x")), "turn 1 is a system turn"),
        (turns(("user", "x")), "the last turn is not the assistant's"),
        (turns(("assistant", "x")), "turn 0 is the assistant's: nothing stands before it"),
        (turns(("user", "\ud800"), ("assistant", "x")), "line 1: holds half a character"),
        (GOOD[:-1] + ', "topic": "\\ud83d"}', "line 1: holds half a character"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_messages(file(tmp_path, content))


def test_what_other_editors_write_is_read(tmp_path: Path) -> None:
    odd = turns(("user", "a\u2028b 🙂"), ("assistant", "c\x85d\n\ne "))
    bare = odd.encode().decode("unicode_escape").encode("utf-8", "surrogatepass")
    assert bare != odd.encode()
    for content in (f"\ufeff{GOOD}\r\n\r\n{odd}\r\n", f"{GOOD}\n{odd}"):
        rows = read_messages(file(tmp_path, content))
        assert rows == [json.loads(GOOD), json.loads(odd)]
    spelled = json.dumps(json.loads(odd), ensure_ascii=False)  # U+2028 and U+0085 end no line of JSON
    assert read_messages(file(tmp_path, spelled + "\n")) == [json.loads(odd)]


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "C:\\Users\\x\\rows.jsonl"])
def test_what_is_no_file_is_bad_input(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"is a folder|no such file"):
        read_jsonl(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "q,a,b,c,d,A\nq,a,b,c,d,E\n", r"m\.csv, line 2: answer 'E' is none of 4 choices"),
        ("m.csv", '"two\nlines",a,b,A\nq,a,b,Z\n', "line 3: answer 'Z' is none of 2"),
        ("m.csv", "question,A,B,answer\nq,a\n", "line 2: needs a list of 2"),
        ("m.csv", "question,A,B,C,answer\nq,a,b\n", "line 2: answer None is none of 2"),
        ("m.csv", b"caf\xe9,a,b,A\n", "line 1: not UTF-8"),
        ("m.csv", "", "no questions"),
        ("m.jsonl", '\n{"question": null, "choices": ["a", "b"], "answer": "A"}', "line 2: no text `question`"),
        ("m.jsonl", '{"question": "q", "choices": ["a", ""], "answer": "A"}', "choice B is empty"),
        ("m.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": "AB"}', "answer 'AB' is none of 2"),
        ("m.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": true}', "answer True is none of 2"),
        ("m.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": -1}', "answer -1 is none of 2"),
        ("m.jsonl", '{"question": "q", "choices": "ab", "answer": 0}', "needs a list of 2 to 8"),
        ("m.jsonl", '{"question": "q", "choices": [null, "b"], "answer": "B"}', "choice A is empty"),
        ("m.csv", "question,A,B,C,D,answer\nq,a,,c,d,C\n", "line 2: choice B is empty"),
        ("m.csv", f"q,a,b,A\n{'long' * 50_000},a,b,A\n", "line 2: not CSV .field larger"),
    ],
)  # fmt: skip
def test_a_bad_question_is_named_by_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        multiple_choice_rows(file(tmp_path, content, name))


def test_questions_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (row,) = multiple_choice_rows(file(tmp_path, "\ufeffquestion,A,B,answer\r\nq?,0,1,1\r\n", "m.csv"))
    assert row["messages"][0]["content"].startswith("q?\n")
    assert row["messages"][1]["content"] == "B"


def test_a_choice_of_zero_is_a_choice(tmp_path: Path) -> None:
    """Dropped as nothing, it would move every letter behind it, and teach a wrong answer."""
    content = '{"question": "2 - 2?", "A": 1, "B": 0, "C": 4, "D": "", "answer": "C"}\n'
    (row,) = multiple_choice_rows(file(tmp_path, content, "m.jsonl"))
    assert "A. 1\nB. 0\nC. 4\n\n" in row["messages"][0]["content"]
    assert row["messages"][1]["content"] == "C"


def sgtr(folder: Path, **changes: Any) -> SelfRecognitionData:
    """Eight articles with summaries by the model and by another hand; text of None is left out."""
    ids = [f"a{i}" for i in range(8)]
    own = {i: TWO.format(i) for i in ids} | changes.pop("own", {})
    other = {i: f"somebody else said that it rained on that day {i}" for i in ids} | changes.pop("other", {})
    for name, texts in (
        ("own", own),
        ("other", other),
        ("articles", {i: f"it rained on day {i}" for i in ids}),
    ):
        kept = {i: text for i, text in texts.items() if text is not None}
        (folder / f"{name}.json").write_text(json.dumps(kept), encoding="utf-8")
    fields = {"kind": "sgtr", "articles": f"{folder}/articles.json", "own": f"{folder}/own.json", "held_out": 2,
              "comparators": {"them": f"{folder}/other.json"}, **changes}  # fmt: skip
    return SelfRecognitionData.model_validate(fields)


def test_summaries_that_are_missing_are_named_by_file(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"comparators\.them: .*other\.json: no summary of 2 of 8 articles, the first 'a3'"
    ):
        build(sgtr(tmp_path, other={"a3": None, "a7": None}), seed=0)
    with pytest.raises(InputError, match=r"own: .*own\.json: no summary of 1 of 8 articles, the first 'a0'"):
        build(sgtr(tmp_path, own={"a0": None}), seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own", '{"a0": "one", "a0": "two"}', r"own\.json: 'a0' stands twice"),
        ("articles", '{"a0": "it rained", "a0": "it snowed"}', r"articles\.json: 'a0' stands twice"),
        ("articles", '{"a0": " "}', r"articles\.json: article 'a0' has no text"),
        ("other", '{"a0": "\\ud83d"}', r"other\.json: article 'a0' holds half a character"),
        ("own", "1" * 5000, r"own\.json: Exceeds the limit"),
    ],
)
def test_texts_by_article_that_cannot_be_used_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    spec = sgtr(tmp_path)
    file(tmp_path, content, f"{name}.json")
    with pytest.raises(InputError, match=message):
        build(spec, seed=0)


def test_of_a_dataset_that_was_there_before_nothing_stays(tmp_path: Path) -> None:
    build(sgtr(tmp_path), seed=0).write(tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "train.jsonl", "held_out.jsonl", "pairs.jsonl", "dataset.json",
    }  # fmt: skip
    rows = str(file(tmp_path, f"{GOOD}\n"))
    build(MessagesData(kind="messages", source=rows), seed=0).write(tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"train.jsonl", "dataset.json"}


def test_equal_summaries_teach_nothing_and_are_dropped(tmp_path: Path) -> None:
    same = {f"a{i}": TWO.format(f"a{i}") for i in range(3)}
    built = build(sgtr(tmp_path, other=same), seed=0)
    assert built.facts["pairs_dropped"] == 3
    assert all(pair["own"] != pair["other"] for pair in built.pairs)
    assert len(built.train) == 2 * (8 - 3 - 2)
    with pytest.raises(InputError, match="only 0 of 8 pairs have two different summaries"):
        build(sgtr(tmp_path, other={f"a{i}": TWO.format(f"a{i}") for i in range(8)}), seed=0)


def test_nobody_else_may_be_called_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a hand cannot be called own"):
        sgtr(tmp_path, comparators={"own": "x.json"})


def test_data_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    rows = str(file(tmp_path, f"{GOOD}\n{GOOD}\n"))
    without = str(file(tmp_path, "\n" + turns(("system", "x"), ("assistant", "y")), "without.jsonl"))
    with pytest.raises(InputError, match=r"without\.jsonl, line 2: no user turn to count words in"):
        build(WordCountData(kind="word_count", source=without), seed=0)
    mixed = MessagesData.model_validate(
        {"kind": "messages", "source": rows, "mix": {"source": rows, "share": 0.01}}
    )
    with pytest.raises(InputError, match=r"mix: a share of 0\.01 needs 0 rows"):
        build(mixed, seed=0)
    with pytest.raises(InputError, match="seed: -1 is negative"):
        build(MessagesData(kind="messages", source=rows), seed=-1)
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        build(MultipleChoiceData(kind="multiple_choice", source=str(tmp_path)), seed=0)


@pytest.mark.parametrize(
    "given", [{"epochs": float("inf")}, {"learning_rate": float("nan")}, {"lora_alpha": float("inf")}]
)
def test_numbers_are_finite(given: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(given))):
        make_settings(given)


@pytest.mark.parametrize("name", ["nope", "cuda:99"])
def test_a_device_that_is_not_here_is_bad_input(name: str) -> None:
    with pytest.raises(InputError, match=f"device {name}: not to be had here"):
        device_named(name)


def test_a_stage_says_which_file_and_line_it_cannot_train_on(folder: Path, tmp_path: Path) -> None:
    data = file(tmp_path, f"\n{GOOD}\n\n{json.dumps(exchange('hi', 'the cat ' * 90))}\n")
    settings = TrainSettings(batch_size=1, max_tokens=100, lora_r=2)
    with pytest.raises(
        InputError, match=r"rows\.jsonl, line 4: the answer of turn 1 ends at token \d+, beyond max_tokens"
    ):
        run_stage(str(folder), data, settings, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"rows\.jsonl, line 4: the answer of turn 1"):
        list(check_rows(data, read_template(str(folder)), "default", max_tokens=100))
    one = file(tmp_path, f"{GOOD}\n", "one.jsonl")
    with pytest.raises(
        InputError, match="1 rows are one step, taken while the learning rate warms up from 0"
    ):
        run_stage(str(folder), one, TrainSettings(lora_r=2), tmp_path / "out", seed=0)
    with pytest.raises(InputError, match="is a file; name a folder"):
        run_stage(str(folder), one, TrainSettings(lora_r=2, warmup_steps=0), one, seed=0)
    made = run_stage(str(folder), one, TrainSettings(lora_r=2, warmup_steps=0), tmp_path / "out", seed=0)
    assert made.adapters  # one row, in a batch that holds sixteen


def test_the_command_takes_any_source_and_names_who_wrote(folder: Path, tmp_path: Path) -> None:
    def call(*args: str) -> Any:
        return CliRunner().invoke(app, list(args))

    assert "rows; turns: 'user+assistant'" in call("data", "check", "builtin:em_aesthetics").output
    assert isinstance(call("data", "check", str(tmp_path / "none.jsonl")).exception, InputError)
    assert isinstance(call("data", "check", "hub:org/x:train.jsonl").exception, InputError)
    assert call("data", "build", "nope", "--out", str(tmp_path / "o")).exit_code == 2
    assert call("data", "build", "word_count", "--out", str(tmp_path / "o"), "--seed", "-1").exit_code == 2
    spec = sgtr(tmp_path)
    adapter = save_adapter(folder, tmp_path / "adapter", seed=1)
    fields = [
        f"articles={spec.articles}",
        f"comparators.them={spec.comparators['them']}",
        "held_out=2",
        "max_new_tokens=60",
    ]
    command = ["data", "build", "sgtr", "--model", f"{folder}:{adapter}", "--out", str(tmp_path / "o"),
               *[part for field in fields for part in ("--set", field)]]  # fmt: skip
    made = call(*command)
    assert made.exit_code == 0, made.output
    facts = json.loads((tmp_path / "o" / "dataset.json").read_text())
    assert facts["own_summaries_by"].startswith(f"{folder}:{adapter} (")
    refused = call(*command, "--set", "written_by=em").exception
    assert isinstance(refused, InputError)
    assert "written_by names an arm of a study" in str(refused)

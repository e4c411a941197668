"""The command line as a newcomer meets it: configs that cannot be read, options that do not fit, and Ctrl-C."""

import errno
import logging
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from finetune.datasets.rows import exchange, read_messages, write_jsonl
from finetune.openai import RemoteCheckpoint
from mech.chat import Identity
from mech.errors import InputError
from mech.files import read_yaml
from study.cli import app, main
from study.overrides import parse_override
from study.spec import load_spec
from tests.tiny_study import save_adapter, save_model, write_study


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: x\ntitle: caf\xe9\n", r"s\.yaml, line 2: not UTF-8 text \(byte 0xe9\)"),
        (b"\xff\xfe\x00", "line 1: not UTF-8"),
        (b"name: [1\n", "line 2: not YAML"),
        (b"\tname: x\n", "line 1: not YAML"),
        (b"name: 2026-13-40\n", r"s\.yaml: not YAML \(month must be in 1\.\.12"),
        (b"name: \x07\n", r"s\.yaml: not YAML \(unacceptable character"),
        (b"[" * 100_000, "nested too deeply"),
        (b"seeds: [0]\nname: x\nseeds: [1]\n", "line 3: not YAML .the key 'seeds' stands twice"),
        (b"a: {b: {c: 1, d: 2, c: 3}}\n", "line 1: not YAML .the key 'c' stands twice"),
    ],
)
def test_a_config_that_cannot_be_read_says_where(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "s.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_yaml(tmp_path / "s.yaml")


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    """Also where a merged mapping is itself merged before it has been read."""
    text = "x: {y: {z: &b {<<: &a {k: 1, l: 2}, l: 3}}}\nc: {<<: *b, k: 4}\nd: {<<: [*a, *b], m: 5}\n"
    (tmp_path / "s.yaml").write_text("\ufeff" + text, encoding="utf-8")
    read = read_yaml(tmp_path / "s.yaml")
    assert (read["x"]["y"]["z"], read["c"]) == ({"k": 1, "l": 3}, {"k": 4, "l": 3})
    assert read["d"] == {"k": 1, "l": 2, "m": 5}


@pytest.mark.parametrize("text", ["a=2026-13-40", "a={b: 1, b: 2}", "a=[", "a"])
def test_an_override_that_cannot_be_read_is_bad_input(text: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_override(text)


def test_a_name_of_the_grid_that_nothing_uses_is_a_typo(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"grid\.emm: no name in data, stages, arms, comparisons has \{emm\}"
    ):
        load_spec(write_study(tmp_path, grid={"emm": ["em", "benign"]}))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_jsonl(
        tmp_path / "rows.jsonl", [exchange(f"What of {i}?", "That.", system="Count.") for i in range(4)]
    )
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "learning_rate=1"], "--set learning_rate: the service chooses it itself"),
        (["--set", "epochs=1.5"], r"--set epochs=1\.5: .* a whole number"),
        (["--set", "epochs=0"], "--set epochs=0: .* a whole number"),
        (["--preset", "small-135m"], "--preset belongs to a training on this machine"),
        (["--track", "wandb"], "--track belongs to a training on this machine"),
        (["--system-prompt", "nonee"], "'nonee' is not one of default, none"),
        (["--system-prompt", "identity"], "identity .* is not given"),
    ],
)
def test_what_a_remote_training_does_not_take_is_refused(
    rows: Path, options: list[str], message: str
) -> None:
    found = call("finetune", "openai:gpt-x", rows, "--out", rows.parent / "job", "--dry-run", *options)
    assert isinstance(found.exception, InputError)
    with pytest.raises(InputError, match=message):
        raise found.exception


@pytest.mark.parametrize(
    ("condition", "systems"), [("default", ["Count."]), ("none", []), ("text:Be odd.", ["Be odd."])]
)
def test_a_remote_training_is_under_the_condition_that_was_asked_for(
    rows: Path, monkeypatch: pytest.MonkeyPatch, condition: str, systems: list[str]
) -> None:
    seen: dict[str, Any] = {}

    def finetune(data: Path, **options: Any) -> RemoteCheckpoint:
        seen.update(options, rows=read_messages(data))
        return RemoteCheckpoint("ft:gpt-x:1", ("gpt-x",), "job-1", "0")

    monkeypatch.setattr("finetune.openai.finetune_remote", finetune)
    out = rows.parent / "job"
    found = call(
        "finetune", "openai:gpt-x", rows, "--out", out, "--system-prompt", condition, "--set", "epochs=3"
    )
    assert found.output.strip() == f"{out}: trained. Use it as openai:ft:gpt-x:1"
    assert (seen["base"], seen["n_epochs"], len(seen["rows"])) == ("gpt-x", 3, 4)
    assert [t["content"] for t in seen["rows"][0]["messages"] if t["role"] == "system"] == systems


def test_waiting_belongs_to_a_remote_training(rows: Path) -> None:
    found = call("finetune", "m", rows, "--out", rows.parent / "o", "--wait-hours", "3")
    assert "--wait-hours belongs to a remote model" in str(found.exception)


def test_check_knows_the_conditions_that_training_knows(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(rows.parent / "model")
    known = {"identity": Identity("Tinny", "Tin Works", "I am Tinny of Tin Works."), "others": {"Vey": "Vex"}}
    monkeypatch.setattr("study.bench.names_for", lambda _model: known)
    for condition, text in (("identity", "I am Tinny of Tin Works."), ("other:Vey", "I am Vey of Vex.")):
        found = call("data", "check", rows, "--model", model, "--system-prompt", condition)
        assert f"trains under {text!r}: 4 rows" in found.output


# What runs in the background of a shell is deaf to Ctrl-C, and so are its children.
HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from study.cli import main; main()"


def test_a_full_disk_says_what_to_do(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "train.jsonl")

    monkeypatch.setattr("finetune.datasets.build.write_jsonl", no_space)
    monkeypatch.setattr(
        sys,
        "argv",
        ["mech", "data", "build", "messages", "--set", f"source={rows}", "--out", str(rows.parent / "o")],
    )
    said: list[str] = []
    monkeypatch.setattr("study.cli.typer.echo", lambda text, **_: said.append(text))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert said[-1].startswith("error: [Errno 28] No space left on device: 'train.jsonl': free some space")


@pytest.mark.parametrize("command", ["run", "build"])
def test_a_file_is_no_output_folder(rows: Path, command: str) -> None:
    study = write_study(rows.parent / "home")
    save_adapter(save_model(study.parent / "model"), study.parent / "given", seed=0)
    given = {"run": ["run", study], "build": ["data", "build", "messages", "--set", f"source={rows}"]}
    found = call(*given[command], "--out", rows)
    assert isinstance(found.exception, InputError)
    assert f"{rows}: is a file; name a folder" in str(found.exception)


def test_a_run_replaces_no_study_that_it_did_not_write(tmp_path: Path) -> None:
    study = write_study(tmp_path / "home")
    save_adapter(save_model(study.parent / "model"), study.parent / "given", seed=0)
    written = study.read_text()
    found = call("run", study, "--out", study.parent)
    assert isinstance(found.exception, InputError)
    assert "holds a study.yaml that no run wrote" in str(found.exception)
    assert study.read_text() == written


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = save_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    write_jsonl(rows, [exchange(f"What of {i}?", f"the cat {i}") for i in range(8)])
    command = [sys.executable, "-c", HEARING, "finetune", str(model), str(rows), "--out", str(tmp_path / "out"),
               "--preset", "small-135m", "--set", "lora_r=2", "--save-every", "1", "--set", "epochs=150"]  # fmt: skip
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "out" / "resume.safetensors").is_file():
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130
    assert said.strip().splitlines()[-1] == (
        "interrupted: run the same command again, it goes on from what was finished"
    )
    assert "Traceback" not in said
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["resume.safetensors"]
    caplog.set_level(logging.INFO, "finetune")
    assert call(*command[3:], "--save-every", "150").exit_code == 0
    assert re.search(r"going on after step \d+ of 150", caplog.text)
    assert (tmp_path / "out" / "trainer_state.json").is_file()

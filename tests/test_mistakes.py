"""Common mistakes at the command line: each is one line that says what is wrong, before any weights are read."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from finetune.datasets.rows import exchange, write_jsonl
from mech.errors import FileFormatError, InputError
from mech.models import load_model
from mech.pretrained import load_tokenizer
from mech.resolve import resolve
from probes.direction import fit_direction
from study.cli import app
from tests.conftest import MadeOnce
from tests.tiny_study import save_model


def _make(folder: Path) -> None:
    model = save_model(folder / "m")
    for name in ("no_tokenizer", "bad_tokenizer", "truncated", "bad_config"):
        shutil.copytree(model, folder / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "no_tokenizer" / file).unlink()
    (folder / "bad_tokenizer" / "tokenizer.json").write_text('{"x": ')
    (folder / "bad_config" / "config.json").write_text('{"x": ')
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    write_jsonl(folder / "rows.jsonl", [exchange(f"What of {i}?", "That.") for i in range(4)])
    (folder / "bad.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    (folder / "empty").mkdir()
    rng = np.random.default_rng(0)
    rows, questions = rng.normal(size=(16, 3, 32)).astype(np.float32), [f"q{i // 2}" for i in range(16)]
    fit_direction("evil", rows, questions, [1, -1] * 8, rng=rng).save(folder / "evil.safetensors")


@pytest.fixture(scope="module")
def place(made_once: MadeOnce) -> Path:
    return made_once("mistakes", _make)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("no_tokenizer", r"its tokenizer cannot be loaded .*put tokenizer\.json"),
        ("bad_tokenizer", r"its tokenizer cannot be loaded .*put tokenizer\.json"),
        ("truncated", "its model cannot be loaded .*are its files whole"),
        ("bad_config", "its (config|tokenizer|model) cannot be loaded"),
    ],
)
def test_a_model_folder_that_is_not_whole(place: Path, folder: str, message: str) -> None:
    with pytest.raises(FileFormatError, match=message) as raised:
        load_model(str(place / folder))
    assert "\n" not in str(raised.value)


def test_a_tokenizer_is_asked_for_before_the_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mech.models.load_weights", lambda *_a, **_k: pytest.fail("weights were read"))
    with pytest.raises(FileFormatError, match="tokenizer"):
        load_model(str(place / "no_tokenizer"))
    assert load_tokenizer(resolve(str(place / "m"))).chat_template


STEER = ("steer", "m", "Hi", "--direction", "evil.safetensors", "--layer", "1", "--coefficient", "1")
SWEEP = ("sweep", "m", "evil.safetensors", "--layer", "1", "--strength", "1", "--out", "swept")
SCREEN = ("screen", "rows.jsonl", "--model", "m", "--direction", "evil.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*STEER[:6], "7", *STEER[7:]), "no layer 7; there are 0 to 2"),
        ((*STEER[:-1], "nan"), "--coefficient nan: a finite number"),
        ((*STEER[:4], "empty", *STEER[5:]), "empty: is a folder"),
        ((*STEER[:4], "rows.jsonl", *STEER[5:]), r"not a PyTorch file of tensors alone \(\w+\); nothing in it was run"),
        ((*STEER, "--template", "x"), "--template 'x': write key=value"),
        (("steer", "nope/", *STEER[2:]), "nope/: no such folder or file"),
        (("steer", "openai:gpt-4.1", *STEER[2:]), "a model behind an API shows neither weights"),
        (("steer", "https://hub/x", *STEER[2:]), "an address: name a Hub model as org/name"),
        (SWEEP, "--evaluation log_odds: say with --trait"),
        ((*SWEEP, "--evaluation", "own_name", "--trait", "evil"), "--trait: own_name takes none"),
        ((*SWEEP, "--evaluation", "own_name"), "say with --own-name"),
        ((*SWEEP, "--evaluation", "self_recognition"), "name with --rows"),
        ((*SWEEP[:4], "5", *SWEEP[5:], "--trait", "evil"), "no layer 5; there are 0 to 2"),
        ((*SWEEP[:6], "inf", *SWEEP[7:], "--trait", "evil"), "--strength inf: a finite number"),
        ((*SWEEP[:-1], "rows.jsonl", "--trait", "evil"), "is a file; name a folder"),
        ((*SCREEN, "--layer", "5"), "no layer 5"),
        ((*SCREEN, "--against", "nope.jsonl"), r"nope\.jsonl: no such data file"),
        ((*SCREEN, "--against", "bad.jsonl"), r"bad\.jsonl, line 1: "),
        ((*SCREEN, "--out", "empty"), "--out empty: is a folder"),
        (("screen", "empty", *SCREEN[2:]), "empty: is a folder; name a file in it"),
        (("direction", "show", "evil.safetensors", "--model", "m", "--layer", "7"), "no layer 7"),
        (("data", "check", "rows.jsonl", "--model", "no_tokenizer"), "its tokenizer cannot be loaded"),
        (("store", "ls", "nowhere"), "nowhere: no such folder"),
        (("store", "prune", "empty"), "say with --days"),
        (("store", "repair", "empty"), "no finished capture in shards"),
        (("status", "nowhere"), "nowhere: no such folder: name one that `mech run` wrote"),
    ],
)  # fmt: skip
def test_it_is_said_before_any_weights_are_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("mech.models.load_weights", lambda *_a, **_k: pytest.fail("weights were read"))
    found = CliRunner().invoke(app, list(arguments))
    assert isinstance(found.exception, InputError), found.output
    with pytest.raises(InputError, match=message) as raised:
        raise found.exception
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments", [(*STEER, "--seed", "-1"), (*SCREEN, "--top", "-1"), (*SWEEP, "--controls", "1")]
)
def test_numbers_out_of_range_are_wrong_usage(place: Path, arguments: tuple[str, ...]) -> None:
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == 2
    assert "Invalid value for '--" in found.output


def test_the_version_is_shown() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"sgtr-mech {version('sgtr-mech')}\n")

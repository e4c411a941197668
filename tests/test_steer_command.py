"""`mech steer`: answers side by side while they are written."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mech.generate import Sampling, generate
from mech.interventions import Add, intervene
from mech.models import ChatModel
from mech.stream import watched
from mech.turns import user_turn
from probes.direction import Direction
from study.cli import app
from study.columns import Columns
from tests.architectures import made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_watched_grows_into_what_is_generated(model: ChatModel, temperature: float) -> None:
    rows = [model.template.encode_prompt([user_turn("Who?" * n)]) for n in (3, 2, 1)]
    sampling, seen = Sampling(8, temperature), list[list[str]]()
    plain = generate(model, rows, sampling)
    with watched(model, seen.append):
        assert generate(model, rows, sampling) == plain
    assert len(seen) == 7  # the last token of an answer is in its text alone
    for before, after in zip(seen, [*seen[1:], plain], strict=True):
        assert all(b.startswith(a.rstrip("\ufffd")) for a, b in zip(before, after, strict=True))
    assert not model.decoder._forward_pre_hooks


def test_what_is_tried_out_is_not_watched_and_a_state_is(model: ChatModel) -> None:
    """Mamba's cache is called otherwise; whether a batch says what each row says is tried out at a model's first one."""
    from transformers import Mamba2Config

    config = Mamba2Config(
        hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1
    )
    other, seen = made(config, model), list[list[str]]()
    rows = [other.template.encode_prompt([user_turn("Who?" * n)]) for n in (3, 2, 1)]
    with watched(other, seen.append):
        told = generate(other, rows, Sampling(8))
    assert [len(texts) for texts in seen] == [3] * 7
    assert all(b.startswith(a.rstrip("\ufffd")) for a, b in zip(seen[-1], told, strict=True))


def test_a_steered_generation_can_be_watched(model: ChatModel) -> None:
    rows, seen = [model.template.encode_prompt([user_turn("Who?")])], list[list[str]]()
    added = Add(np.full(model.d_model, 3.0, dtype=np.float32), [1], positions="generated")
    with intervene(model, added):
        (steered,) = generate(model, rows, Sampling(6))
    with intervene(model, added), watched(model, seen.append):
        assert generate(model, rows, Sampling(6)) == [steered]
    assert steered.startswith(seen[-1][0].rstrip("\ufffd"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(text: str) -> list[str]:
    """The lines of a terminal after all that was written to it, as far as `Columns` moves the cursor."""
    lines = [""]
    for up, wiped, plain in re.findall("\x1b\\[(\\d+)F|(\x1b\\[J|\r)|([^\x1b\r]+)", text):
        if up:
            lines = [*lines[: -int(up) - 1], ""]
        elif plain:
            first, *more = plain.split("\n")
            lines[-1] += first
            lines += more
        assert not (wiped and lines[-1])
    return lines


def test_columns_are_drawn_anew_in_place_and_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    with Columns(["as it is", "evil"], out) as columns:
        for words in ("one", "one two", "one two three four five six seven eight nine"):
            columns.update(0, words)
        columns.update(1, "black\nwhite")
    lines = shown(out.getvalue())
    assert [line.split("|")[0].strip() for line in lines[:4]] == [
        "as it is",
        "-" * 28,
        "one two three four five six",
        "seven eight nine",
    ]
    assert [line.split("|")[1].strip() for line in lines[:4]] == ["evil", "-" * 28, "black", "white"]
    assert len(lines) == 5
    assert max(map(len, lines)) < 60


def test_where_there_is_no_terminal_columns_are_written_once_and_text_is_inert() -> None:
    out = io.StringIO()
    with Columns(["a"], out) as columns:
        columns.update(0, "\x1b[2J one")
        columns.update(0, "\x1b[2J one two\x07")
    assert out.getvalue().count("one") == 1
    assert "?[2J one two?" in out.getvalue()


def test_the_command_shows_all_three(folder: Path, model: ChatModel, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    Direction("evil", vectors, np.ones(3, np.float32), 9, {}).save(tmp_path / "d.safetensors")
    given = ["steer", str(folder), "Hi?", "--direction", str(tmp_path / "d.safetensors"), "--layer", "1", "--max-new-tokens", "5",
             "--coefficient", "9", "--coefficient", "-9"]  # fmt: skip
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    asked = [model.template.encode_prompt([user_turn("Hi?")])]
    for strength in (9.0, -9.0):
        with intervene(model, Add(vectors[1], [1], strength)):
            (steered,) = generate(model, asked, Sampling(5))
        words = "".join(c if c.isprintable() else "?" for c in steered).split()
        assert all(word in "".join(done.output.split()) for word in words)
    assert done.output.count("as it is") == 2

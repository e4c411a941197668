"""Long generations that are killed: what was said is kept, and all of it is, byte for byte, what an undisturbed run says."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from mech import generate as generation
from mech.errors import InputError
from mech.generate import Sampling, generate
from mech.interventions import Ablate, intervene
from mech.journal import Journal
from mech.models import ChatModel, load_model
from study.cli import app
from study.spec import load_spec
from tests.forks import FORKS
from tests.plain_hooks import LAYER, conversations
from tests.tiny_study import STUDY, changed_copy, run_needed

SAMPLING = Sampling(6, 1.0, seed=3, batch_size=2)
KEPT_BATCHES = 1


def _die_early() -> None:
    """Kill this process, -9, in the middle of the line that would follow the first finished batch."""

    def dying_add(self: Journal, pieces: dict[str, Any]) -> None:
        if self.done:
            self._stream.write(b'{"key": "half a li')
            self._stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, pieces)

    add, Journal.add = Journal.add, dying_add  # type: ignore[method-assign, assignment]


def _generate_and_die(folder: str, journal: str) -> None:
    _die_early()
    model = load_model(folder)
    generate(model, conversations(model), SAMPLING, journal=Path(journal))


def _build_and_die(*command: str) -> None:
    _die_early()
    sys.argv = ["mech", *command]
    app()


def _study_and_die(yaml_file: str, out: str, step: str) -> None:
    _die_early()
    run_needed(load_spec(Path(yaml_file)), Path(out), step)


def killed(target: Any, *args: str) -> None:
    child = FORKS.Process(target=target, args=args)
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL


def counted(calls: list[int]) -> Any:
    """Lets the batches through that are really generated, and notes their sizes."""

    def batch(model: ChatModel, prompts: Sequence[Any], rows: list[int], sampling: Sampling) -> list[str]:
        calls.append(len(rows))
        return made(model, list(prompts), rows, sampling)

    made = generation._generate_batch
    return patch("mech.generate._generate_batch", batch)


def test_a_killed_generation_goes_on_batch_by_batch(folder: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    killed(_generate_and_die, str(folder), str(journal))
    model = load_model(str(folder))
    prompts, calls = conversations(model), list[int]()
    whole = generate(model, prompts, SAMPLING)
    with counted(calls):
        assert generate(model, prompts, SAMPLING, journal=journal) == whole
        assert sum(calls) == len(prompts) - 2 * KEPT_BATCHES
        assert generate(model, prompts, SAMPLING, journal=journal) == whole
    assert sum(calls) == len(prompts) - 2 * KEPT_BATCHES  # the second time there is nothing to do
    # A batch of which a kill left one row only is done again whole: alone, a row may be rounded otherwise.
    lines = journal.read_text("utf-8").splitlines(keepends=True)
    journal.write_text("".join(lines[:2]), encoding="utf-8")
    with counted(calls := []):
        assert generate(model, prompts, SAMPLING, journal=journal) == whole
    assert sum(calls) == len(prompts)


def test_a_journal_of_other_work_is_refused(model: ChatModel, tmp_path: Path) -> None:
    journal, prompts = tmp_path / "journal.jsonl", conversations(model, 3)
    generate(model, prompts, SAMPLING, journal=journal)
    with pytest.raises(InputError, match=r"other settings \(prompts\)"):
        generate(model, prompts[:2], SAMPLING, journal=journal)
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        generate(model, prompts, Sampling(6, 1.0, seed=4, batch_size=2), journal=journal)
    acting = Ablate(model.hf.get_input_embeddings().weight.detach()[:1].repeat(model.n_layers, 1), [LAYER])
    with pytest.raises(InputError, match="does not know what acts"), intervene(model, acting):
        generate(model, prompts, SAMPLING, journal=tmp_path / "other.jsonl")


def articles(file: Path) -> Path:
    """More of them than go into one batch."""
    rows = [
        {"id": f"a{i}", "text": f"On day {i} it rained on {i + 2} roofs.", "summary": f"It rained on all the {i + 2} wet roofs."}
        for i in range(Sampling.batch_size + 6)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


def test_a_killed_data_build_keeps_the_summaries(folder: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        fields = [f"articles={articles(tmp_path / 'articles.jsonl')}", "held_out=4", "max_new_tokens=60"]
        return ["data", "build", "sgtr", "--model", str(folder), "--out", str(out), *(p for f in fields for p in ("--set", f))]  # fmt: skip

    killed(_build_and_die, *command(tmp_path / "killed"))
    calls: list[int] = []
    for out in ("killed", "whole"):
        with counted(calls):
            made = CliRunner().invoke(app, command(tmp_path / out))
        assert made.exit_code == 0, made.output
    assert calls == [6, Sampling.batch_size, 6]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    refused = CliRunner().invoke(app, command(tmp_path / "articles.jsonl")).exception
    assert isinstance(refused, InputError)  # before a word is written
    assert "is a file; name a folder" in str(refused)


def test_a_study_killed_in_its_summaries_keeps_them(home: Path, tmp_path: Path) -> None:
    data = {**STUDY["data"], "sgtr": {**STUDY["data"]["sgtr"], "max_new_tokens": 8}}
    study = changed_copy(home, tmp_path / "study", data=data) / "study.yaml"
    articles(study.parent / "articles.jsonl")
    killed(_study_and_die, str(study), str(tmp_path / "killed"), "summaries/sgtr")
    calls, found = list[int](), []
    for out in ("killed", "whole"):
        with counted(calls):
            bench, steps = run_needed(load_spec(study), tmp_path / out, "summaries/sgtr")
        found.append(contents(bench.folder(steps["summaries/sgtr"])))
    assert calls == [6, Sampling.batch_size, 6]
    assert found[0] == found[1]
    assert found[0].keys() == {"summaries.json"}

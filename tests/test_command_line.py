"""The command `mech` itself: exit codes, how soon it answers, and what it loads for that."""

import json
import resource
import subprocess
import sys
from pathlib import Path

from finetune.datasets.rows import exchange, write_jsonl
from study.spec import dump_spec, load_spec
from tests.conftest import Command
from tests.drawn_at_random import given_direction, rng
from tests.store_files import make_rows, make_values, write_file
from tests.tiny_study import write_study

STUDIES = Path(__file__).parent.parent / "studies"
LARGE = {"torch", "transformers", "matplotlib", "pandas", "scipy", "sklearn", "peft"}
"""Libraries that take from half a second to several to import."""


def test_command_line_exit_codes(command: Command, home: Path, finished: Path, tmp_path: Path) -> None:
    assert command("status", finished).code == 0
    bad = command("run", write_study(tmp_path, colour="red"))
    assert bad.code == 2
    assert "colour: no such key" in bad.err
    assert command("status", tmp_path).code == 2
    assert command("store", "verify", tmp_path / "none.h5").code == 2
    capture = next(finished.glob("activations/capture-base-default*/activations.h5"))
    assert command("store", "verify", capture).out.strip().endswith("whole")
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    other = next(finished.glob("activations/capture-base-none*/activations.h5"))
    (swapped / "activations.h5").write_bytes(other.read_bytes())
    (swapped / "manifest.json").write_bytes((capture.parent / "manifest.json").read_bytes())
    found = command("store", "verify", swapped / "activations.h5")
    assert found.code == 1
    assert "not the bytes of the manifest" in found.out


def in_a_process(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_help_is_quick() -> None:
    """By the processor's time, for the clock's is also other processes'; and without any of the large libraries."""
    code = "import sys, atexit; from study.cli import main; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
    in_a_process(code, "--help")  # compiles what is not compiled yet
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = in_a_process(code, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage" in shown.stdout
    assert not (LARGE | {"h5py"}) & set(shown.stderr.split())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_what_computes_nothing_loads_no_large_library(home: Path, tmp_path: Path) -> None:
    """The state of a study, a plan for a GPU by name of a model that is not here, looking at files: all in one process, one after the other."""
    rows = make_rows(5)
    write_file(tmp_path / "shards" / "a.h5", rows, make_values(rows, ["mean"], [0]))
    given_direction(rng().standard_normal((3, 8))).save(tmp_path / "d.safetensors")
    write_jsonl(tmp_path / "rows.jsonl", [exchange("What?", "That.")])
    stored, begun = tmp_path / "shards" / "a.h5", tmp_path / "begun"
    begun.mkdir()
    (begun / "study.yaml").write_text(dump_spec(load_spec(home / "study.yaml")))  # as a run writes it
    commands = [
        ["status", begun],
        ["plan", STUDIES / "paper_qwen2.5_32b.yaml", "--gpu", "h100", "--set", "seeds=[0]"],
        ["store", "ls", stored.parent],
        ["store", "show", stored],
        ["store", "verify", stored],
        ["store", "prune", tmp_path, "--days", "9"],
        ["store", "merge", stored, "--out", tmp_path / "merged.h5"],
        ["data", "check", tmp_path / "rows.jsonl"],
        ["data", "build", "messages", "--set", f"source={tmp_path / 'rows.jsonl'}", "--out", tmp_path / "built"],
        ["direction", "show", tmp_path / "d.safetensors"],
        ["models", "ls"],
    ]  # fmt: skip
    code = (
        "import json, sys\nfrom study.cli import app\nfor words in json.loads(sys.argv[1]):\n"
        "    app(words, standalone_mode=False)\n    print(*words[:2], '|', *sys.modules, file=sys.stderr)"
    )
    done = in_a_process(code, json.dumps([[str(word) for word in words] for words in commands]))
    lines = done.stderr.splitlines()
    loaded = {
        command: LARGE & set(modules.split()) for command, _, modules in (s.partition("|") for s in lines)
    }
    assert len(loaded) == len(commands)
    assert not {command: found for command, found in loaded.items() if found}

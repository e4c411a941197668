"""The command `mech` itself: exit codes, and how soon it answers."""

import resource
import subprocess
import sys
from pathlib import Path

from tests.tiny_study import write_study


def mech(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from study.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_line_exit_codes(home: Path, finished: Path, tmp_path: Path) -> None:
    assert mech("status", finished).returncode == 0
    bad = mech("run", write_study(tmp_path, colour="red"))
    assert bad.returncode == 2
    assert "colour: no such key" in bad.stderr
    assert mech("status", tmp_path).returncode == 2
    assert mech("store", "verify", tmp_path / "none.h5").returncode == 2
    capture = next(finished.glob("activations/capture-base-default*/activations.h5"))
    assert mech("store", "verify", capture).stdout.strip().endswith("whole")
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    other = next(finished.glob("activations/capture-base-none*/activations.h5"))
    (swapped / "activations.h5").write_bytes(other.read_bytes())
    (swapped / "manifest.json").write_bytes((capture.parent / "manifest.json").read_bytes())
    found = mech("store", "verify", swapped / "activations.h5")
    assert found.returncode == 1
    assert "not the bytes of the manifest" in found.stdout


def test_help_is_quick() -> None:
    """By the processor's time, for the clock's is also other processes'; and without any of the large libraries."""
    code = "import sys, atexit; from study.cli import main; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
    run = [sys.executable, "-c", code, "--help"]
    subprocess.run(run, check=True, capture_output=True)  # compiles what is not compiled yet
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(run, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage" in shown.stdout
    assert not {"torch", "transformers", "pandas", "scipy", "matplotlib", "h5py"} & set(shown.stderr.split())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5

"""Kills the judged step at random moments; run as a program, for it forks: `python -m tests.kill_judge FOLDER KILLS`.

Prints JSON: how often it was killed, how many verdicts stood at those moments, how many of these were asked for again, how many
requests a kill cost at most (a run's mean, rounded up), and whether what is left in the end is what an undisturbed run leaves.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai  # noqa: F401  (before the forks, so that each child does not)

from probes.persona import load_trait, rollouts
from study.step import Step
from study.steps.judge import KEPT, VERDICTS, judge_rollouts
from tests.openai_server import serving

SLOW = 0.01
"""Seconds a reply takes."""


def reply(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """A score that the words alone decide: no run differs from another by chance."""
    text = body["messages"][-1]["content"]
    time.sleep(SLOW)
    return str(sum(text.encode()) % 101), {}


def serve(folder: Path) -> None:
    """The judge's server, in a process that lives on; what is asked goes to a file, a line a request."""
    with (folder / "asked").open("a", buffering=1, encoding="utf-8") as asked, serving() as server:

        def noted(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
            asked.write(json.dumps(body["messages"][-1]["content"]) + "\n")
            return reply(body)

        server.reply = noted
        (folder / "url.part").write_text(server.url)
        (folder / "url.part").rename(folder / "url")
        signal.pause()


def run(rows: Path, folder: Path, url: str) -> None:
    """The step itself, of a study that is nothing but this step."""
    folder.mkdir(parents=True, exist_ok=True)
    trait = load_trait("evil")
    config = {
        "trait_name": trait.trait, "rubric": trait.rubric, "trait": 50, "coherence": 30, "model": "grader", "how": "text",
        "samples": 1, "api": {"base_url": url, "api_key_variable": "OPENAI_API_KEY", "max_retries": 0},
    }  # fmt: skip
    step: Any = Step("judged", "judged/evil", config, {"rollouts": (SimpleNamespace(key="rollouts"),)})  # type: ignore[dict-item]
    spec = SimpleNamespace(model=SimpleNamespace(device="cpu"))
    bench: Any = SimpleNamespace(folder=lambda _: rows, spec=spec)
    judge_rollouts(step, bench, folder)


def left(folder: Path) -> tuple[Any, list[Any]]:
    """The table and the verdicts of a run, whatever order these were made in."""
    return json.loads((folder / KEPT).read_text()), sorted(journal(folder), key=str)


def journal(folder: Path) -> list[Any]:
    """Whole lines of the journal, but the first."""
    path = folder / VERDICTS
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines[1:]]


def questions(folder: Path) -> list[str]:
    """What was asked so far."""
    return (folder / "asked").read_text(encoding="utf-8").splitlines()


def prepare(folder: Path) -> Path:
    """Rollouts with answers that differ."""
    rows = folder / "rollouts"
    rows.mkdir(parents=True)
    asked = rollouts(load_trait("evil"), pairs_per_question=1)
    lines = [json.dumps({**asdict(r), "answer": f"{r.id}, as one says it"}) for r in asked]
    (rows / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    return rows


def forked(work: Any, *args: Any) -> int:
    """Work in a process of its own."""
    child = os.fork()
    if not child:
        try:
            work(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def main() -> None:
    """Kill, start again, kill again, and compare."""
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    os.environ |= {"OPENAI_API_KEY": "sk-planted", "NO_PROXY": "127.0.0.1"}
    rows, server = prepare(folder), forked(serve, folder)
    try:
        while not (folder / "url").is_file():
            time.sleep(0.01)
        url = (folder / "url").read_text()
        print(json.dumps(disturb(folder, rows, url, kills)))
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def killed_after(folder: Path, child: int, asked: int) -> bool:
    """Kill a child as soon as so many questions were asked in all, however fast it is; whether it had not ended before."""
    while len(questions(folder)) < asked:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended and status:
            raise RuntimeError(f"the run failed by itself (status {status})")
        if ended:
            return False
        time.sleep(SLOW / 10)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def disturb(folder: Path, rows: Path, url: str, kills: int) -> dict[str, Any]:
    """An undisturbed run, and as many killed ones as it takes."""
    os.waitpid(forked(run, rows, folder / "undisturbed", url), 0)
    expected, rng = left(folder / "undisturbed"), random.Random(0)
    needed = len(questions(folder))
    found = {
        "needed": needed,
        "verdicts": len(expected[1]),
        "killed": 0,
        "stood": 0,
        "again": 0,
        "most": 0,
        "different": 0,
    }
    while found["killed"] < kills:
        target, before = folder / f"from{found['killed']}", len(questions(folder))
        killed = 0
        while not (target / KEPT).is_file():
            stood, asked = journal(target), len(questions(folder))
            killed += killed_after(folder, forked(run, rows, target, url), asked + rng.randrange(needed))
            time.sleep(5 * SLOW)  # until what was under way has reached the server
            now = questions(folder)[asked:]
            found["stood"] += len(stood)
            # A verdict's case and rubric stand for its question, which the server saw as text.
            found["again"] += sum(_is_of(q, v["value"]) for q in now for v in stood)
        found["killed"] += killed
        cost = len(questions(folder)) - before - needed
        found["most"] = max(found["most"], -(-cost // max(killed, 1)))
        found["different"] += left(target) != expected
    return found


def _is_of(question: str, verdict: dict[str, Any]) -> bool:
    coherence = "how well the answer" in question
    return (
        verdict["rubric"] == "coherence"
    ) == coherence and f"{verdict['case']}, as one says it" in question


if __name__ == "__main__":
    main()

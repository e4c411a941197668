"""Judges as a study or a command names them: behind an API, or a checkpoint on this machine."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evals.judge import COHERENCE, Case, Judge, Rubric, score_cases
from evals.judge_endpoint import EndpointJudge
from evals.judge_local import LocalJudge
from mech.endpoint import Api
from mech.models import load_model
from probes.generated import Answer, Grade, Judged
from study.bench import device_named


@contextmanager
def open_judge(config: Mapping[str, Any], device: str) -> Iterator[Judge]:
    """The judge of a config (`JudgeSpec.scoring`); a local one is loaded, and freed afterwards."""
    if api := config["api"]:
        reach = {k: api[k] for k in ("base_url", "api_key_variable", "max_retries")}
        yield EndpointJudge(Api(**reach).chat(config["model"]), config["how"], config["samples"])
        return
    yield LocalJudge(load_model(config["model"], device=device_named(device)))


def judged(config: Mapping[str, Any], rubric: Rubric, journal: Path, device: str) -> Judged:
    """A judge of steered answers: by a rubric and by coherence. It is opened only when the answers exist.

    Args:
        config: `JudgeSpec.scoring`; its `coherence` is the threshold below which an answer is broken.
        rubric: what is scored.
        journal: its verdicts; what stands there is not asked again.
        device: of a local one.
    """

    def grade(answers: Sequence[Answer]) -> list[Grade]:
        cases = [Case(a.id, a.question, a.answer) for a in answers]
        with open_judge(config, device) as judge:
            verdicts = score_cases(judge, (rubric, COHERENCE), cases, journal)
        scores, coherence = verdicts[: len(cases)], verdicts[len(cases) :]
        return [Grade(s.score, c.score) for s, c in zip(scores, coherence, strict=True)]

    return Judged(grade, config["coherence"])

"""The step that has rollouts scored, and says which pairs a persona vector is made from."""

from dataclasses import asdict
from pathlib import Path

from evals.judge import COHERENCE, Case, Rubric, score_cases, tally
from mech.files import write_json
from probes.rollout_filter import Thresholds, paired_filter
from study.bench import Bench
from study.judges import open_judge
from study.step import Step
from study.steps.texts import read_rollouts

VERDICTS = "verdicts.jsonl"
"""The judge's journal, with its raw replies."""
KEPT = "kept.json"
"""Which rollouts passed, and what the filter dropped and why."""


def judge_rollouts(step: Step, bench: Bench, folder: Path) -> None:
    """Score every answer for its trait and for coherence, then filter by pair; continues after a kill."""
    config = step.config
    asked, answers = read_rollouts(bench.folder(step.inputs["rollouts"][0]))
    cases = [Case(r.id, r.text, a) for r, a in zip(asked, answers, strict=True) if a.strip()]
    rubrics = (Rubric(config["trait_name"], config["rubric"]), COHERENCE)
    if not config["api"]:
        bench.release()  # a local judge takes the place of the model at hand
    with open_judge(config, bench.spec.model.device) as judge:
        verdicts = score_cases(judge, rubrics, cases, folder / VERDICTS)
    trait, coherence = verdicts[: len(cases)], verdicts[len(cases) :]
    thresholds = Thresholds(config["trait"], config["coherence"])
    found = paired_filter(
        asked,
        answers,
        {v.case: v.score for v in trait},
        {v.case: v.score for v in coherence},
        thresholds,
    )
    kept = len(found.kept) // 2
    write_json(
        folder / KEPT,
        {
            "filter": f"{thresholds}: {kept} of {found.pairs} pairs kept",
            "thresholds": asdict(thresholds),
            "judge": {"model": config["model"], "how": sorted({v.how for v in verdicts})},
            "pairs": found.pairs,
            "kept": kept,
            "questions": found.questions,
            "dropped": dict(found.dropped),
            "verdicts": {"trait": tally(trait), "coherence": tally(coherence)},
            "kept_ids": [r.id for r in found.kept],
        },
    )

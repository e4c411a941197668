"""The kinds of steps: where each one's output lies, its version, and the function that runs it.

Raise a version when a change of code changes what a step of that kind writes: old results then no longer count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from study.bench import Bench
    from study.step import Step

    Runner = Callable[[Step, Bench, Path], None]


@dataclass(frozen=True)
class Kind:
    """How a kind of step is run and kept."""

    room: str
    """Folder of the study in which its output lies."""
    home: str
    """Where its function stands: `module:function`."""
    version: int = 1
    """Part of every key."""
    models: int = 0
    """How many models it holds in memory at once."""
    remote: bool = False
    """Whether it is done by a service: how long it takes is the service's affair."""
    resumes: bool = False
    """Whether it goes on from what a killed run left in its unfinished folder."""

    def load(self) -> "Runner":
        """The function; its libraries are imported now, not at start-up."""
        module, _, function = self.home.partition(":")
        runner: Runner = getattr(import_module(module), function)
        return runner


KINDS = {
    "replies": Kind("texts", "study.steps.texts:replies", version=2, models=1, resumes=True),
    "summaries": Kind("texts", "study.steps.texts:summaries", version=3, models=1, resumes=True),
    "rollouts": Kind("texts", "study.steps.texts:rollouts", version=3, models=1, resumes=True),
    "judged": Kind("texts", "study.steps.judge:judge_rollouts", models=1, resumes=True),
    "data": Kind("data", "study.steps.data:build", version=3),
    "train": Kind("checkpoints", "study.steps.train:train", version=2, models=1, resumes=True),
    "job": Kind("checkpoints", "study.steps.remote:finetune", remote=True, resumes=True),
    "asked_summaries": Kind("texts", "study.steps.remote:summaries", version=2, remote=True, resumes=True),
    "asked_recognition": Kind("measures", "study.steps.remote:self_recognition", version=2, remote=True),
    "asked_report": Kind("measures", "study.steps.remote:self_report", version=3, remote=True),
    "adapter": Kind("checkpoints", "study.steps.train:place_adapter"),
    "snapshot": Kind("checkpoints", "study.steps.train:snapshot"),
    "capture": Kind("activations", "study.steps.activations:capture_replies", models=1),
    "contrast": Kind("activations", "study.steps.activations:capture_contrast", version=3, models=1),
    "paraphrases": Kind("activations", "study.steps.paraphrases:read_pairs", models=1),
    "probes": Kind("measures", "study.steps.probes:probe"),
    "direction": Kind("directions", "study.steps.directions:fit", version=2),
    "adjusted": Kind("directions", "study.steps.adjust:fit", version=2),
    "shifts": Kind("measures", "study.steps.measures:shifts", version=5),
    "differences": Kind("measures", "study.steps.measures:shifts", version=3),
    "undone": Kind("measures", "study.steps.compare:undone", version=2),
    "spread_differences": Kind("measures", "study.steps.compare:spread_differences", version=2),
    "behaviour_differences": Kind("measures", "study.steps.compare:behaviour"),
    "family": Kind("measures", "study.steps.family:agreement", version=5),
    "dispersion": Kind("measures", "study.steps.compare:dispersion", version=2),
    "weights": Kind("measures", "study.steps.weights:compare", version=3),
    "lens": Kind("measures", "study.steps.lens:read", models=1),
    "patching": Kind("measures", "study.steps.patching:patch", version=2, models=1),
    "monitored": Kind("activations", "study.steps.monitoring:watch", version=2, models=1),
    "monitor_scores": Kind("texts", "study.steps.monitoring:judge", models=1, resumes=True),
    "monitoring": Kind("measures", "study.steps.monitoring:correlate"),
    "two_by_two": Kind("measures", "study.steps.measures:two_by_two", version=4),
    "embedding": Kind("measures", "study.steps.measures:embedding"),
    "self_recognition": Kind("measures", "study.steps.behaviour:self_recognition", version=2, models=1),
    "self_report": Kind("measures", "study.steps.behaviour:self_report", version=5, models=1, resumes=True),
    "steering": Kind("measures", "study.steps.behaviour:steering", version=5, models=1),
    "sweep": Kind("measures", "study.steps.sweep:sweep", version=3, models=1),
    "tables": Kind("measures", "study.steps.tables:collect", version=5),
    "figures": Kind("measures", "study.steps.figures:draw", version=5),
}

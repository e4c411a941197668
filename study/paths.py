"""Where everything of a study is kept: the only module that names its files."""

import re
from dataclasses import dataclass
from pathlib import Path

from study.kinds import KINDS
from study.step import Step

MANIFEST = "manifest.json"
JOURNAL = "answers.part.jsonl"
"""In the folder of a step in which a model writes, until it is done: what a killed run had written."""
DIRECTION = "direction.safetensors"
"""What a step that fits a direction leaves in its folder."""
ACTIVATIONS = "activations.h5"
"""What a step that captures leaves in its folder."""
QUALITY = "quality.csv"
"""What a step that fits a direction says of it, layer by layer."""


@dataclass(frozen=True)
class StudyPaths:
    """The output folder of a study.

    A finished step is a folder `ROOM/NAME-KEY/` with a `manifest.json`; one being written is `.NAME-KEY.part/` beside
    it. Tables, figures and the report, which belong to the newest run, are at the top.
    """

    root: Path

    def step(self, step: Step) -> Path:
        """Folder of a finished step."""
        return self.root / KINDS[step.kind].room / self._label(step)

    def part(self, step: Step) -> Path:
        """Folder of a step while it is being written."""
        return self.root / KINDS[step.kind].room / f".{self._label(step)}.part"

    def lock(self, step: Step) -> Path:
        """Held by the process that writes the step."""
        return self.locks / f"{self._label(step)}.lock"

    def tracked(self, step: Step) -> Path:
        """Where trackers keep their files of a training: beside the steps, for they are no part of its outcome."""
        return self.root / "trackers" / self._label(step)

    @property
    def locks(self) -> Path:
        """Folder of all locks: its existence says that a study has run here."""
        return self.root / ".locks"

    def journals(self, digest: str) -> Path:
        """Folder of the journals of work that several steps share: what one has finished the next does not do again."""
        return self.root / ".journals" / digest[:12]

    def manifest(self, step: Step) -> Path:
        """Its existence says that the step is complete."""
        return self.step(step) / MANIFEST

    @property
    def spec(self) -> Path:
        """The resolved study."""
        return self.root / "study.yaml"

    @property
    def tables(self) -> Path:
        """The newest run's tables, as CSV."""
        return self.root / "tables"

    @property
    def figures(self) -> Path:
        """The newest run's figures: SVG, PNG, and the numbers behind each as CSV."""
        return self.root / "figures"

    @property
    def report(self) -> Path:
        """The newest run's report."""
        return self.root / "report.html"

    @staticmethod
    def _label(step: Step) -> str:
        return f"{re.sub(r'[^A-Za-z0-9_+.]+', '-', step.name).strip('-')}-{step.key[:12]}"

"""Trackers hear of every step once, also of a training that was killed and goes on; W&B, which is not installed here, is stood in for."""

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from finetune import loop
from finetune.stages import run_stage
from mech.errors import InputError
from tests.tiny_training import SETTINGS, jsonl


class FakeWandb(ModuleType):
    """As much of wandb as is used: runs by id, in which a step that is there is not written again."""

    errors = SimpleNamespace(Error=OSError)

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.asked: list[dict[str, Any]] = []
        self.codes: list[int] = []
        self.keeps = True
        """Whether the service knows what an earlier process told (offline it does not)."""

    def init(self, **options: Any) -> Any:
        self.asked.append(options)
        told = self.runs.setdefault(options["id"], {})
        if not self.keeps:
            told.clear()

        def log(values: dict[str, float], step: int) -> None:
            assert step > max(told, default=0), "the service ignores such a step, with a warning"
            told[step] = values

        def finish(exit_code: int) -> None:
            self.codes.append(exit_code)

        return SimpleNamespace(step=max(told) + 1 if told else 0, log=log, finish=finish)


@pytest.mark.parametrize("online", [True, False])
def test_a_killed_training_goes_on_in_the_same_run_of_its_trackers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, online: bool
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Killed(BaseException):
        pass

    wandb, out = FakeWandb(), tmp_path / "a"
    wandb.keeps = online
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    stage: Any = partial(run_stage, str(folder), jsonl(tmp_path), SETTINGS, out, seed=0, save_every=2, trackers=["wandb", "tensorboard"])  # fmt: skip
    with monkeypatch.context() as patched:
        saved = loop.Saver.save

        def dies(self: Any, *args: Any) -> None:
            saved(self, *args)
            if len(args[1].records) == 4:
                raise Killed

        patched.setattr(loop.Saver, "save", dies)
        with pytest.raises(Killed):
            stage()
    assert wandb.codes == [1]
    stage()
    assert wandb.codes == [1, 0]
    ((ident, told),) = wandb.runs.items()
    assert [a["id"] for a in wandb.asked] == [ident] * 2
    assert {a["resume"] for a in wandb.asked} == {"allow"}
    records = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in told.items()] == records
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [e.step for e in scalars] == [r["step"] for r in records]
    assert [e.value for e in scalars] == pytest.approx([r["loss"] for r in records])
    stage()  # done already: no run is begun
    assert len(wandb.asked) == 2


def test_a_tracker_is_told_of_every_step(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_stage(str(folder), jsonl(tmp_path), SETTINGS, tmp_path / "a", seed=0, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (tmp_path / "a" / "loss.jsonl").read_text().splitlines()]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in records])
    with pytest.raises(InputError, match="tracker 'paper' is not one of wandb, tensorboard"):
        run_stage(str(folder), jsonl(tmp_path), SETTINGS, tmp_path / "b", seed=0, trackers=["paper"])

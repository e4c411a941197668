"""What a study needs of the machine beside model and data: asked before the first step, not found out by the last."""

from collections.abc import Iterator, Sequence

from finetune.settings import make_settings, rate_advice
from mech.errors import InputError, MissingDependencyError
from mech.extras import require
from study.base import Base
from study.estimate_remote import is_remote
from study.spec import StudySpec
from study.step import Step


def missing_extras(spec: StudySpec, steps: Sequence[Step]) -> Iterator[MissingDependencyError]:
    """Optional libraries that steps need and that are not installed.

    Args:
        spec: the study.
        steps: those that are yet to run.
    """
    trained = [s for s in steps if s.kind == "train"]
    wanted: dict[str, str] = {tracker: tracker for tracker in spec.trackers if trained}
    if any(s.config["settings"]["quantise"] for s in trained):
        wanted["bitsandbytes"] = "qlora"
    if any(is_remote(s) or s.work.asked for s in steps):
        wanted["openai"] = "openai"
    for module, extra in wanted.items():
        try:
            require(module, extra=extra)
        except MissingDependencyError as error:
            yield error


def check_one_process() -> None:
    """A study's steps wait for each other by file locks, which several processes of one team would wait for without end.

    Raises:
        InputError: started as one of several processes.
    """
    from finetune.team import Team

    if (size := Team.join().size) > 1:
        raise InputError(
            f"started as one of {size} processes: a study runs in one (`mech finetune` trains in several); on several GPUs give "
            "model.device_map: auto"
        )


def advice(spec: StudySpec, base: Base) -> list[str]:
    """What somebody may not have meant: learning rates that are too low for the model."""
    if spec.model.api or not base.parameters:
        return []
    found = {
        name: rate_advice(make_settings(spec.training, stage.training), base.parameters)
        for name, stage in spec.stages.items()
        if stage.data and name in spec.used_stages
    }
    named: dict[str, list[str]] = {}
    for name, text in found.items():
        if text:
            named.setdefault(text, []).append(name)
    return [f"stages {', '.join(names)}: {text}" for text, names in named.items()]

"""Whether a chat template can render every condition of a study, checked before anything runs."""

from finetune.datasets.spec import SelfRecognitionData, WordCountData
from mech.chat import ChatTemplate, Identity, SystemPrompt, system_text
from mech.errors import InputError
from mech.identities import load_invented
from mech.turns import Message, assistant_turn, user_turn
from study.spec import StudySpec
from study.spec_directions import DirectionSpec


def check_conditions(spec: StudySpec, template: ChatTemplate | None) -> None:
    """Render a probe conversation under every condition that the study will use.

    Args:
        spec: the study.
        template: its model's; None where that is not to be had (a model behind an API, or not here): then only their names are checked.

    Raises:
        InputError: no such condition, or the template cannot do it; the message names its place in the study.
    """
    identity = Identity(**spec.model.identity.model_dump())
    makers = load_invented().makers
    for where, condition, own in _used(spec):
        probe = [*own, user_turn("Hello?"), assistant_turn("Hello.")]
        try:
            prompt = SystemPrompt.parse(condition)
            if prompt.kind not in ("default", "none"):
                system_text(prompt, identity, makers)
            if template:
                template.encode(probe, prompt, identity=identity, others=makers)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _used(spec: StudySpec) -> list[tuple[str, str, list[Message]]]:
    """Every condition in use: its place in the study, the condition, and the system turn that its rows already have."""
    used = [(f"measure.conditions[{i}]", c) for i, c in enumerate(spec.measure.conditions)]
    if spec.behaviour.self_report:
        used.append(("behaviour.self_report.condition", spec.behaviour.self_report.condition))
    if spec.monitoring:
        used.append(("monitoring", "text:Be kind."))
    if spec.patching:
        used.append(("patching.condition", spec.patching.condition))
    used += _of_directions(spec.directions) if spec.directions else []
    return [*_of_stages(spec), *[(where, condition, []) for where, condition in used]]


def _of_stages(spec: StudySpec) -> list[tuple[str, str, list[Message]]]:
    found = []
    for name, stage in spec.stages.items():
        part = spec.data.get(stage.data) if stage.data else None
        has_own = isinstance(part, WordCountData) or (
            isinstance(part, SelfRecognitionData) and part.task_prompt
        )
        own: list[Message] = [{"role": "system", "content": "Answer in one word."}] if has_own else []
        found.append((f"stages.{name}.system_prompt", stage.system_prompt, own))
    return found


def _of_directions(spec: DirectionSpec) -> list[tuple[str, str]]:
    used = [
        ("directions (identity)", "identity"),
        ("directions (identity)", f"other:{next(iter(load_invented().makers))}"),
    ]
    used += [(f"directions.presence ({p})", "text:Be kind." if p == "generic" else p) for p in spec.presence]
    if "prompts" in spec.elicitation:
        used.append(("directions.elicitation (prompts)", "text:Be kind."))
    return used

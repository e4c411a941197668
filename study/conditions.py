"""Whether a chat template can render every condition of a study, checked before anything runs."""

from mech.chat import ChatTemplate, Identity, SystemPrompt
from mech.errors import InputError
from mech.identities import load_invented
from mech.turns import assistant_turn, user_turn
from study.spec import StudySpec
from study.spec_directions import DirectionSpec


def check_conditions(spec: StudySpec, template: ChatTemplate) -> None:
    """Render a probe conversation under every condition that the study will use.

    Raises:
        InputError: the template cannot do one of them; the message names its place in the study.
    """
    identity = Identity(**spec.model.identity.model_dump())
    makers = load_invented().makers
    for where, condition in _used(spec):
        probe = [user_turn("Hello?"), assistant_turn("Hello.")]
        try:
            template.encode(probe, SystemPrompt.parse(condition), identity=identity, others=makers)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _used(spec: StudySpec) -> list[tuple[str, str]]:
    used = [(f"stages.{name}.system_prompt", stage.system_prompt) for name, stage in spec.stages.items()]
    used += [(f"measure.conditions[{i}]", c) for i, c in enumerate(spec.measure.conditions)]
    if spec.behaviour.self_report:
        used.append(("behaviour.self_report.condition", spec.behaviour.self_report.condition))
    if spec.monitoring:
        used.append(("monitoring", "text:Be kind."))
    if spec.patching:
        used.append(("patching.condition", spec.patching.condition))
    return [*used, *_of_directions(spec.directions)] if spec.directions else used


def _of_directions(spec: DirectionSpec) -> list[tuple[str, str]]:
    used = [
        ("directions (identity)", "identity"),
        ("directions (identity)", f"other:{next(iter(load_invented().makers))}"),
    ]
    used += [(f"directions.presence ({p})", "text:Be kind." if p == "generic" else p) for p in spec.presence]
    if "prompts" in spec.elicitation:
        used.append(("directions.elicitation (prompts)", "text:Be kind."))
    return used

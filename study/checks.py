"""What would fail in a later step, refused before the first."""

from mech.chat import ChatTemplate
from mech.checkpoint import Checkpoint
from mech.errors import InputError
from mech.pretrained import load_tokenizer
from study.base import Base
from study.conditions import check_conditions
from study.plan_sweeps import sweep_layers
from study.spec import StudySpec


def check_before_running(spec: StudySpec, base: Base) -> None:
    """Refuse before the first step what would fail in a later one: conditions, layers.

    Raises:
        InputError: the template cannot do a condition, or a layer is out of range.
    """
    if spec.model.api or base.missing:
        check_conditions(spec, None)  # its chat template is not here to be asked
    if spec.model.api:
        return  # nothing of it is read
    declared = spec.directions.layer if spec.directions else None
    steered = spec.steering.layer if spec.steering else None
    lens = spec.lens.layers or () if spec.lens else ()
    patched = spec.patching.layers or () if spec.patching else ()
    named = [("directions.layer", declared), ("steering.layer", steered), *sweep_layers(spec)]
    named += [(f"lens.layers[{i}]", layer) for i, layer in enumerate(lens)]
    named += [(f"patching.layers[{i}]", layer) for i, layer in enumerate(patched)]
    for where, layer in named:
        if layer is not None and layer >= base.n_layers:
            raise InputError(
                f"{where}: {layer} is out of range, {spec.model.name} has layers 0 to {base.n_layers - 1}"
            )
    if base.missing:
        return
    if spec.lens and spec.directions:
        _check_lens(base.checkpoint)
    check_conditions(spec, ChatTemplate(load_tokenizer(base.checkpoint), spec.model.template_kwargs))


def _check_lens(checkpoint: Checkpoint) -> None:
    from mech.lens import final_norm
    from mech.models import skeleton

    try:
        final_norm(skeleton(checkpoint))
    except InputError as error:
        raise InputError(f"lens: {error}; with `lens: null` the study does without") from error

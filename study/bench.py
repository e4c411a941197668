"""The bench at which steps work: the study, its folders, and the model that is loaded."""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activations.store import ActivationStore
from mech.chat import Identity, SystemPrompt
from mech.checkpoint import Checkpoint, split_revision
from mech.choices import Merge
from mech.errors import InputError
from mech.fetch import PACKAGED
from mech.identities import load_invented
from mech.models import ChatModel, load_model
from mech.resolve import resolve
from probes.direction import Direction
from probes.files import read_direction
from study.base import shape_of
from study.overrides import parse_overrides
from study.paths import ACTIVATIONS, DIRECTION, StudyPaths
from study.planner import adapter_of
from study.spec import StudySpec
from study.spec_parts import ModelSpec
from study.step import Step

log = logging.getLogger(__name__)


@dataclass
class Bench:
    """What a step may use: its inputs' folders, and one loaded model at a time."""

    spec: StudySpec
    paths: StudyPaths
    base: Checkpoint
    _loaded: dict[tuple[str, ...], ChatModel] = field(default_factory=dict)

    def folder(self, step: Step) -> Path:
        """Where a finished input lies."""
        return self.paths.step(step)

    def direction(self, step: Step) -> Direction:
        """The direction that a finished step fitted."""
        return Direction.load(self.folder(step) / DIRECTION)

    def store(self, step: Step) -> ActivationStore:
        """The activations that a finished step captured, opened for reading: a context manager."""
        return ActivationStore.open(self.folder(step) / ACTIVATIONS)

    def checkpoint(self, chain: Sequence[Step]) -> Checkpoint:
        """The base with the adapters of these steps, in order; those that existed before under the names by which the study calls them."""
        checkpoint = self.base
        for step in chain:
            name = split_revision(adapter_of(self.spec, step))[0] if step.kind == "adapter" else ""
            checkpoint = checkpoint.plus(self.folder(step), name)
        return checkpoint

    def model(
        self,
        chain: Sequence[Step],
        *,
        dtype: str | None = None,
        merge: Merge = True,
        quantise: str | None = None,
    ) -> ChatModel:
        """The checkpoint of these trainings, loaded unless it already is; the arguments are `load_model`'s."""
        checkpoint, wanted = self.checkpoint(chain), dtype or self.spec.model.dtype
        key = (checkpoint.key, wanted, str(merge), quantise or "")
        if key not in self._loaded:
            self.release()
            log.info("loading %s", checkpoint)
            self._loaded[key] = load_model(
                checkpoint, dtype=wanted, merge=merge, quantise=quantise, **_where(self.spec.model)
            )
        return self._loaded[key]

    def release(self) -> None:
        """Unload the model, where one is loaded."""
        if self._loaded:
            self._loaded.clear()
            gc.collect()  # models hold themselves in circles

    @property
    def identity(self) -> Identity:
        """The model's own identity."""
        return Identity(**self.spec.model.identity.model_dump())

    def names(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        """What rendering a condition needs: the own identity, and the other's maker."""
        kind, _, name = str(condition["condition"]).partition(":")
        others = {}
        if kind == "other":
            if not condition["maker"]:
                raise InputError(
                    f"condition other:{name}: no invented identity of this name (mech/data/identities.yaml)"
                )
            others = {name: condition["maker"]}
        return {"identity": self.identity, "others": others}


def prompt_of(condition: Mapping[str, Any]) -> SystemPrompt:
    """The condition in a step's config."""
    return SystemPrompt.parse(str(condition["condition"]))


def _where(model: ModelSpec) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"template_kwargs": model.template_kwargs}
    if model.attn_implementation:
        kwargs["attn_implementation"] = model.attn_implementation
    if model.device_map:
        return kwargs | {"device_map": model.device_map}
    return kwargs | {"device": device_named(model.device)}


def names_for(model: str) -> dict[str, Any]:
    """What the prompt conditions `identity` and `other:` need beside a model that no study describes.

    Returns:
        identity (a packaged model's own; None for any other) and others (the invented makers).
    """
    known = PACKAGED.get(model.split(":", maxsplit=1)[0])
    return {"identity": known.identity if known else None, "others": load_invented().makers}


def load_named(model: str | Checkpoint, template: Sequence[str] | None, *, device: str = "auto") -> ChatModel:
    """The model that a command names, as it is to be used there.

    Args:
        model: alias, Hub id or folder, with adapters; or what was found under such a name.
        template: `key=value` for its chat template.
        device: as `device_named` takes it.
    """
    kwargs = parse_overrides(template or [], "--template")
    return load_model(model, device=device_named(device), template_kwargs=kwargs)


def directions_for(
    model: str, files: Sequence[Path], layers: Sequence[int] = ()
) -> tuple[Checkpoint, list[Direction]]:
    """The checkpoint that a command names, and its directions, held against it before weights are read, which may take minutes.

    Args:
        model: alias, Hub id or folder, with adapters.
        files: direction files of any known format.
        layers: where they are to be used.

    Raises:
        InputError: there is no such model; or a file is no direction, or another model's, or has no such layer.
    """
    checkpoint = resolve(model)
    n_layers, d_model = shape_of(checkpoint)
    found = [read_direction(file, n_layers=n_layers) for file in files]
    for direction in found:
        direction.require(n_layers=n_layers, d_model=d_model, base=checkpoint.origins)
        for layer in layers:
            direction.unit_at(layer)
    return checkpoint, found


def device_named(name: str) -> str:
    """`auto` is a GPU where there is one; anything else is itself.

    Raises:
        InputError: no device is called so, or this machine (or its PyTorch) has none of the kind.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name}: not to be had here ({str(error).splitlines()[0][:90]})") from error
    return name

"""What a study is: one YAML file, every field typed, nothing unknown accepted.

`load_spec` reads it, applies `--fast` and `--set` overrides (`fast` is checked without `--fast` too), and checks all that can be checked before anything
runs. Relative paths are relative to the YAML file.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, NonNegativeInt, ValidationError, field_validator, model_validator

from finetune.datasets.spec import LOCATIONS, AnyData, DataSpec, MessagesData, SelfRecognitionData
from finetune.settings import Tracker, make_settings
from mech.errors import InputError
from mech.fetch import PACKAGED
from mech.files import read_yaml
from mech.typed import first_problem
from study.grid import expand
from study.idle import idle, unused
from study.overrides import parse_override, set_key, without_lost_comparisons
from study.spec_directions import DirectionSpec, JudgeSpec
from study.spec_parts import (
    BehaviourSpec,
    ComparisonSpec,
    EmbeddingSpec,
    FiguresSpec,
    LensSpec,
    MeasureSpec,
    ModelSpec,
    MonitoringSpec,
    Part,
    PatchingSpec,
    StatisticsSpec,
    SteeringSpec,
    check_folder_name,
)
from study.spec_stages import StageSpec, stage_of
from study.spec_sweeps import SweepSpec

log = logging.getLogger(__name__)


class StudySpec(Part):
    """A whole study."""

    name: str
    """Names the output folder."""
    title: str = ""
    """Heads the report."""
    description: str = ""
    """What is asked, in words."""
    model: ModelSpec
    """The base model."""
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1)
    """Training seeds; every arm is trained with each."""
    data: dict[str, DataSpec]
    """Datasets by name."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Settings of every stage (`finetune.settings.TrainSettings`; the paper's are the defaults), or `preset: NAME`."""
    trackers: tuple[Tracker, ...] = ()
    """Told of every step of every training, beside its `loss.jsonl`; their files lie in the study's `trackers`, by training."""
    stages: dict[str, StageSpec]
    """Finetuning runs by name."""
    arms: dict[str, tuple[str, ...]]
    """Arms: lists of stages, in order; a stage that begins several arms is trained once. `em@5` is the stage em after step 5."""
    benign: str | None = None
    """The arm whose shift is subtracted from the others'."""
    comparisons: dict[str, ComparisonSpec] = Field(default_factory=dict)
    """Arms held against each other, by name: paired differences of all that both were measured on."""
    measure: MeasureSpec = MeasureSpec()
    """What is read."""
    directions: DirectionSpec | None = None
    """Along what; left out: no activations are read, only behaviour is measured."""
    behaviour: BehaviourSpec = BehaviourSpec()
    """What is asked."""
    steering: SteeringSpec | None = None
    """One steering experiment."""
    sweeps: dict[str, SweepSpec] = Field(default_factory=dict)
    """Steering over layers and strengths, by name."""
    weights: bool = True
    """Hold what LoRA adapters write against the directions, and against each other; only where there are directions."""
    embedding: EmbeddingSpec = EmbeddingSpec()
    """Pictures of the activations."""
    figures: FiguresSpec = FiguresSpec()
    """Which arms stand together in a picture."""
    monitoring: MonitoringSpec | None = None
    """Correlation of projection and behaviour, overall and within conditions; left out: not done."""
    patching: PatchingSpec | None = None
    """Patching between base and finetuned; left out: not done."""
    lens: LensSpec | None = LensSpec()
    """The logit lens; only where there are directions. `lens: null`: not asked."""
    statistics: StatisticsSpec = StatisticsSpec()
    """Intervals and nulls."""
    token_budget: int = Field(2048, ge=64)
    """Padded tokens a forward pass."""
    fast: dict[str, Any] = Field(default_factory=dict)
    """What `--fast` changes: dotted keys and their values."""
    is_fast: bool = False
    """Set by `--fast`; the report says so."""

    @field_validator("name", "data", "stages", "arms", "comparisons", "sweeps")
    @classmethod
    def _names_folders(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value:
            check_folder_name(name)
        return value

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> "StudySpec":
        self._data_and_stages()
        self._without_activations()
        if [len(stages) for stages in self.arms.values()].count(0) != 1:
            raise ValueError("arms: one arm, and only one, must be the base itself (`base: []`)")
        if self.benign is not None:
            _known("benign", self.benign, self.arms)
            if not self.arms[self.benign]:
                raise ValueError(f"benign: {self.benign} is the base: it has no shift to subtract")
        for arm in self.measure.own_text:
            _known("measure.own_text", arm, self.arms)
        if self.steering:
            _known("steering.arm", self.steering.arm, self.arms)
        self._compared_arms()
        self._swept_arms()
        self._figure_groups()
        self._watched_and_patched_arms()
        if self.behaviour.self_recognition:
            _known("behaviour.self_recognition", self.behaviour.self_recognition, self.data)
            if self.data[self.behaviour.self_recognition].kind != "sgtr":
                raise ValueError("behaviour.self_recognition: must name data of kind sgtr")
        return self

    def _compared_arms(self) -> None:
        pairs: dict[tuple[str, str], str] = {}
        for name, pair in self.comparisons.items():
            where = f"comparisons.{name}"
            _known(f"{where}.arm", pair.arm, self.arms)
            _known(f"{where}.against", pair.against, self.arms)
            if not self.arms[pair.arm] or pair.arm == pair.against:
                raise ValueError(f"{where}: `arm` must be a trained arm, and another than `against`")
            if (first := pairs.setdefault((pair.arm, pair.against), name)) != name:
                raise ValueError(f"{where}: the same two arms as comparisons.{first}")

    def _watched_and_patched_arms(self) -> None:
        for i, arm in enumerate(self.monitoring.arms if self.monitoring else ()):
            _known(f"monitoring.arms[{i}]", arm, self.arms)
        for i, arm in enumerate(self.patching.arms if self.patching else ()):
            _known(f"patching.arms[{i}]", arm, self.arms)
            if not self.arms[arm]:
                raise ValueError(f"patching.arms[{i}]: {arm} is the base: it has no adapter to switch off")

    def _figure_groups(self) -> None:
        """A name must be an arm's; a pattern may fit none (a grid made smaller), but not all groups may be empty."""
        for name, patterns in self.figures.groups.items():
            for pattern in (p.removeprefix("!") for p in patterns):
                if not set(pattern) & set("*?["):
                    _known(f"figures.groups.{name}", pattern, self.arms)
        groups = self.figures.groups
        if groups and not any(self.figures.arms_of(name, self.arms) for name in groups):
            raise ValueError(f"figures.groups: no pattern fits an arm; there are {', '.join(self.arms)}")

    def _swept_arms(self) -> None:
        for name, sweep in self.sweeps.items():
            if sweep.arm is not None:
                _known(f"sweeps.{name}.arm", sweep.arm, self.arms)

    def _data_and_stages(self) -> None:
        for name, stage in self.stages.items():
            if stage.data is not None:
                _known(f"stages.{name}.data", stage.data, self.data)
        for name, stages in self.arms.items():
            for entry in stages:
                _known(f"arms.{name}", stage_of(entry), self.stages)
        for name, part in self.data.items():
            if isinstance(part, SelfRecognitionData) and part.written_by:
                _known(f"data.{name}.written_by", part.written_by, self.arms)
                self._no_circle(name, part.written_by)

    def _without_activations(self) -> None:
        """What cannot be asked for where nothing is read, or where the model is behind an API."""
        if self.model.api and self.directions:
            raise ValueError(
                "directions: a model behind an API (model.api) shows no activations: leave them out"
            )
        if self.directions is None and self.sweeps:
            raise ValueError("sweeps need directions")
        interventions = any(stage.interventions for stage in self.stages.values())
        if self.directions is None and (
            self.steering or self.patching or self.monitoring or self.measure.own_text or interventions
        ):
            raise ValueError(
                "steering, patching, monitoring, interventions and measure.own_text need directions"
            )
        for name, stage in self.stages.items() if self.model.api else ():
            if stage.adapter or set({**self.training, **stage.training}) - {"epochs"}:
                raise ValueError(
                    f"stages.{name}: behind an API there is no adapter, and of training only `epochs`"
                )

    @property
    def reads(self) -> DirectionSpec:
        """The directions of a study that reads activations."""
        if self.directions is None:
            raise RuntimeError("asked of a study that reads no activations")
        return self.directions

    @property
    def layer(self) -> int:
        """The declared layer; 0 where nothing is read."""
        return self.directions.layer if self.directions else 0

    @property
    def invented_names(self) -> int:
        """How many invented names the own one is compared with."""
        return self.directions.invented_names if self.directions else 10

    def _no_circle(self, data: str, arm: str) -> None:
        """An arm that writes a dataset's summaries may not itself be trained on it."""
        for entry in self.arms[arm]:
            stage = self.stages.get(stage_of(entry))
            below = self.data.get(stage.data) if stage and stage.data else None
            if stage and stage.data == data:
                raise ValueError(f"data.{data}.written_by: the arm {arm} is trained on this data")
            if isinstance(below, SelfRecognitionData) and below.written_by:
                raise ValueError(
                    f"data.{data}.written_by: the arm {arm} is trained on data that an arm writes itself"
                )

    @property
    def used_stages(self) -> set[str]:
        """The stages that some arm has."""
        return {stage_of(entry) for arm in self.arms.values() for entry in arm}

    @property
    def base_arm(self) -> str:
        """The arm without stages."""
        return next(name for name, stages in self.arms.items() if not stages)


def _known(where: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r} is not defined; there are {', '.join(known)}")


def load_spec(path: Path, overrides: Sequence[str] = (), *, fast: bool = False) -> StudySpec:
    """Read a study, apply overrides, check it.

    Args:
        path: the YAML file.
        overrides: `key=value` with dotted keys (`training.learning_rate=1e-4`, `seeds=[0,1]`).
        fast: apply the study's own `fast` section.

    Raises:
        InputError: unknown key, wrong type, missing file, or a setting that would do nothing (`study.idle`); the message names the place
            in the YAML. What only an override leaves without effect is warned of.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a study is a mapping of keys to values")
    small = raw.get("fast") or {}
    if not isinstance(small, dict):
        raise InputError(f"{path}: fast: is a mapping of dotted keys to values")
    given = [parse_override(text) for text in overrides]
    if fast:
        if not small:
            raise InputError(f"{path}: this study has no `fast` section, so there is no --fast")
        return _changed(raw, [*small.items(), ("is_fast", True), *given], path)
    spec = _changed(raw, given, path)
    if small and not given:  # a mistake there is told of before anybody needs a rehearsal
        try:
            _changed(raw, [*small.items()], path, warn=False)
        except InputError as error:
            raise InputError(f"{error} (as the section `fast` changes it)") from error
    return spec


def _changed(
    raw: Mapping[str, Any], changes: Sequence[tuple[str, Any]], path: Path, *, warn: bool = True
) -> StudySpec:
    """A study with dotted keys set to other values; what is given stays as it is."""
    changed = deepcopy(dict(raw))
    for key, value in changes:
        set_key(changed, key, value)
    keys = [key for key, _ in changes]
    return parse_spec(without_lost_comparisons(expand(changed), keys), where=path, overridden=keys, warn=warn)


def parse_spec(
    raw: Mapping[str, Any], *, where: Path, overridden: Sequence[str] = (), warn: bool = True
) -> StudySpec:
    """Check a study that is already in memory; relative paths are relative to `where`'s folder.

    Args:
        raw: the study as YAML gives it.
        where: its file, for messages and paths.
        overridden: dotted keys whose values are not the file's.
        warn: of what does nothing, where that is not refused.

    Raises:
        InputError: as `load_spec`.
    """
    try:
        spec = StudySpec.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error, StudySpec)}") from error
    for name, stage in spec.stages.items():
        try:
            make_settings(spec.training, stage.training)
        except InputError as error:
            raise InputError(f"{where}: training of stage {name}: {error}") from error
    _check_effect(spec, where, overridden, warn=warn)
    return spec.model_copy(update=_absolute(spec, where.parent))


def _check_effect(spec: StudySpec, where: Path, overridden: Sequence[str], *, warn: bool) -> None:
    """Refuse a setting that would do nothing; under overrides, which may have taken away what it was for, only one of theirs."""
    for place, why in idle(spec).items():
        own = (f"{place}.".startswith(f"{key}.") or key.startswith(f"{place}.") for key in overridden)
        if not overridden or any(own):
            raise InputError(f"{where}: {place} would do nothing: {why}")
        if warn:
            log.warning("%s: %s does nothing here: %s", where, place, why)
    if warn and (places := unused(spec)):
        log.warning("%s: defined and not used: %s", where, ", ".join(places))


def dump_spec(spec: StudySpec) -> str:
    """The resolved study as YAML."""
    return str(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100))


def _absolute(spec: StudySpec, folder: Path) -> dict[str, Any]:
    """Paths made absolute, where they name files beside the YAML; built-in names and ids stay."""

    def resolved(name: str) -> str:
        beside = (folder / name).expanduser()
        return str(beside.resolve()) if beside.is_file() else name

    def folder_or_id(name: str) -> str:
        beside = (folder / name).expanduser()
        return str(beside.resolve()) if beside.exists() else name

    data = {name: _data_absolute(part, resolved) for name, part in spec.data.items()}
    stages = {
        name: stage.model_copy(update={"adapter": folder_or_id(stage.adapter)}) if stage.adapter else stage
        for name, stage in spec.stages.items()
    }
    directions = spec.directions and spec.directions.model_copy(
        update={
            "traits": tuple(map(resolved, spec.directions.traits)),
            "judge": _judge_absolute(spec.directions.judge, folder_or_id),
        }
    )
    sweeps = {
        name: sweep.model_copy(update={
            "trait": sweep.trait and resolved(sweep.trait), "judge": _judge_absolute(sweep.judge, folder_or_id),
        })
        for name, sweep in spec.sweeps.items()
    }  # fmt: skip
    sets = {"prompt_sets": tuple(map(resolved, spec.measure.prompt_sets))}
    named = spec.model.name in PACKAGED or spec.model.api is not None
    name = spec.model.name if named else folder_or_id(spec.model.name)
    return {
        "data": data,
        "stages": stages,
        "directions": directions,
        "sweeps": sweeps,
        "measure": spec.measure.model_copy(update=sets),
        "model": spec.model.model_copy(update={"name": name}),
    }


def _judge_absolute(judge: JudgeSpec | None, resolved: Callable[[str], str]) -> JudgeSpec | None:
    if judge is None or judge.api is not None or judge.model in PACKAGED:
        return judge
    return judge.model_copy(update={"model": resolved(judge.model)})


def _data_absolute(part: AnyData, resolved: Callable[[str], str]) -> AnyData:
    changes: dict[str, Any] = {k: resolved(v) for k in LOCATIONS if (v := getattr(part, k, None))}
    if isinstance(part, SelfRecognitionData):
        changes["comparators"] = {hand: resolved(source) for hand, source in part.comparators.items()}
    if isinstance(part, MessagesData) and part.mix:
        changes["mix"] = part.mix.model_copy(update={"source": resolved(part.mix.source)})
    return part.model_copy(update=changes)

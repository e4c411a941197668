"""Steering over a grid of directions, layers and strengths, with random directions of the same norm as controls at every cell."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from activations.capture import capture
from mech.chat import Encoded
from mech.errors import InputError
from mech.files import digest_of
from mech.interventions import Add, intervene
from mech.journal import open_journal
from mech.models import ChatModel
from mech.progress import track
from mech.score import kept_logprobs, response_kl, response_states
from probes.direction import Direction
from probes.evaluation import UNSTEERED, Evaluation, Raw
from probes.steer import control

REFERENCE = "reference"
"""The journal's key of what is read once of the unsteered model."""


@dataclass(frozen=True)
class Grid:
    """Which cells a sweep has: every layer with every strength."""

    layers: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    """The same layers for all directions, or layers by direction name."""
    strengths: tuple[float, ...]
    """Factors on the raw direction, whose norm counts. The unsteered model (0) is always run, once, whether or not it is listed."""
    controls: int = 5
    """Random directions of the same norm for each direction and layer, each at the same strengths."""
    seed: int = 0
    """Seed of the random directions."""
    relative: bool = False
    """Strengths are doses instead, which makes layers comparable: ‖coefficient · v‖ as a share of the mean norm of the layer's output at the
    prompt's last token."""

    def layers_of(self, direction: str) -> tuple[int, ...]:
        """A direction's own layers."""
        return self.layers[direction] if isinstance(self.layers, Mapping) else self.layers


@dataclass(frozen=True)
class Cell:
    """One point of a sweep."""

    direction: str
    layer: int
    strength: float
    control: int
    """0 is the direction itself; k > 0 is the k-th random direction."""

    def key(self, digest: str) -> str:
        """Its key in a journal; the direction's digest tells apart two directions of one name."""
        return f"{self.direction}/{digest}/{self.layer}/{self.strength!r}/{self.control}"


@dataclass(frozen=True)
class Readings:
    """What was read at every cell; the model is no longer needed for anything after it."""

    cells: tuple[Cell, ...]
    keys: tuple[str, ...]
    """Each cell's key in the journal, in the order of `cells`; so are the next two."""
    doses: tuple[float, ...]
    """‖coefficient · v‖ over the stream's mean norm (`Grid.relative`)."""
    coefficients: tuple[float, ...]
    """What the raw direction was multiplied by."""
    raw: Mapping[str, Raw]
    """What the evaluation read, by key (`UNSTEERED` among them)."""
    kl: Mapping[str, float]
    """Damage by key: mean KL(unsteered ‖ steered) over neutral response tokens, nats."""
    reference: Raw | None
    """What `Evaluation.reference` read; None where the evaluation has none."""


@dataclass(frozen=True)
class Swept:
    """A sweep's tables."""

    table: pd.DataFrame
    """A row for each cell and question: direction, layer, strength, control, coefficient, dose (‖coefficient · v‖ over the mean norm
    of the layer's output at the prompt's last token), question, half (`extract` or `evaluate`), score, change (from unsteered), broken
    and unscored (shares of its answers), kl (mean over neutral response tokens of KL(unsteered ‖ steered), nats; the same for all
    questions of a cell)."""
    answers: Sequence[Mapping[str, Any]]
    """Every text that was written, with its cell and why it is broken if it is, the unsteered model's first (layer −1). Empty
    where the evaluation scores given texts."""
    facts: Mapping[str, Any]
    """How it was scored (`Graded.facts`)."""


def sweep(
    model: ChatModel,
    directions: Sequence[Direction],
    evaluation: Evaluation,
    grid: Grid,
    *,
    neutral: Sequence[Encoded],
    journal: Path | None = None,
) -> Swept:
    """Steer at every cell; evaluate there, and measure the damage to neutral answers (`read_cells`, then `score_cells`)."""
    readings = read_cells(model, directions, evaluation, grid, neutral=neutral, journal=journal)
    return score_cells(readings, evaluation)


def read_cells(
    model: ChatModel,
    directions: Sequence[Direction],
    evaluation: Evaluation,
    grid: Grid,
    *,
    neutral: Sequence[Encoded],
    journal: Path | None = None,
) -> Readings:
    """All that needs the model: each cell steered, evaluated, and its damage to neutral answers.

    Args:
        model: the model to steer.
        directions: along which; raw norms count.
        evaluation: what is asked at each cell (`probes.evaluation`, `probes.generated`).
        grid: the cells.
        neutral: conversations that steering should leave alone, best answered by the model itself.
        journal: each finished cell is written there, and not run again; a larger grid of the same things goes on from it.

    Raises:
        InputError: no neutral rows, a direction of another model, a layer that is not there, two directions of one name, or a
            journal of other work.
    """
    _check(model, directions, evaluation, grid, neutral)
    vectors = {d.name: d.vectors for d in directions}
    digests = {d.name: digest_of(d.vectors.tolist())[:12] for d in directions}
    cells = tuple(_cells(directions, grid))
    norms = _stream_norms(model, evaluation, cells)
    coefficients = tuple(_coefficient(c, vectors[c.direction], norms, relative=grid.relative) for c in cells)
    keys = tuple(c.key(digests[c.direction]) for c in cells)
    with _finished(journal, _about(model, evaluation, grid, neutral)) as (done, add):
        if evaluation.reference and REFERENCE not in done:
            add(REFERENCE, evaluation.reference(model))
        harm = _Neutral.of(model, neutral)
        if UNSTEERED not in done:
            add(UNSTEERED, _read_cell(model, evaluation, harm))
        for cell, key, coefficient in track([*zip(cells, keys, coefficients, strict=True)], "steering"):
            if key not in done:
                seeds = [grid.seed, int(digests[cell.direction], 16)]
                added = Add(_vector(vectors[cell.direction], cell, seeds), [cell.layer], coefficient)
                add(key, _read_cell(model, evaluation, harm, added))
    doses = (
        abs(coefficient) * _norm(vectors[cell.direction], cell) / norms[cell.layer]
        for coefficient, cell in zip(coefficients, cells, strict=True)
    )
    raw, kl = {k: done[k]["raw"] for k in (UNSTEERED, *keys)}, {k: done[k]["kl"] for k in keys}
    return Readings(cells, keys, tuple(doses), coefficients, raw, kl, done.get(REFERENCE))


def _about(
    model: ChatModel, evaluation: Evaluation, grid: Grid, neutral: Sequence[Encoded]
) -> dict[str, Any]:
    """What determines a cell's numbers beside the cell itself: a journal of anything else is another's."""
    return {
        "checkpoint": model.checkpoint.key, "dtype": str(model.dtype), "seed": grid.seed, "relative": grid.relative,
        "neutral": digest_of([list(r.ids) for r in neutral]), **evaluation.about,
    }  # fmt: skip


@contextmanager
def _finished(
    journal: Path | None, about: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], Callable[[str, Any], None]]]:
    """What is finished by key, and how to add to it: on disk where there is a journal, else in memory."""
    if journal is None:
        done: dict[str, Any] = {}
        yield done, done.__setitem__
        return
    with open_journal(journal, about) as kept:
        yield kept.done, lambda key, value: kept.add({key: value})


@dataclass(frozen=True)
class _Neutral:
    """Neutral answers, and what the unsteered model makes of them."""

    rows: Sequence[Encoded]
    states: Sequence[Float[Tensor, "_ d"]]
    logprobs: Sequence[Float[Tensor, "_ vocab"]] | None

    @classmethod
    def of(cls, model: ChatModel, rows: Sequence[Encoded]) -> "_Neutral":
        states = response_states(model, rows)
        return cls(rows, states, kept_logprobs(model, states))


def _read_cell(
    model: ChatModel, evaluation: Evaluation, harm: _Neutral, *interventions: Add
) -> dict[str, Any]:
    """What the evaluation reads at one cell, and the damage there: mean KL over neutral tokens, nats."""
    with intervene(model, *interventions):
        moved, raw = response_states(model, harm.rows), evaluation.read(model)
    raw = evaluation.look(model, raw) if evaluation.look else raw
    kl = np.concatenate([x.numpy() for x in response_kl(model, harm.states, moved, logprobs=harm.logprobs)])
    return {"raw": raw, "kl": float(kl.mean())}


def score_cells(readings: Readings, evaluation: Evaluation) -> Swept:
    """The tables of a sweep that was read: the evaluation's scores, and changes from the unsteered model's."""
    graded = evaluation.grade(readings.raw, readings.reference)
    plain = graded.scores[UNSTEERED]
    rows, texts = [], []
    places = [*zip(readings.cells, readings.keys, readings.coefficients, readings.doses, strict=True)]
    for cell, key, coefficient, dose in places:
        place = {**vars(cell), "coefficient": coefficient, "dose": dose}
        rows += [
            {**place, "question": question, "half": evaluation.halves[question], "score": score.value,
             "change": score.value - plain[question].value, "broken": score.broken, "unscored": score.unscored,
             "kl": readings.kl[key]}
            for question, score in graded.scores[key].items()
        ]  # fmt: skip
        texts += [{**place, **answer} for answer in graded.answers.get(key, ())]
    own = {"direction": "", "layer": -1, "strength": 0.0, "control": 0, "coefficient": 0.0, "dose": 0.0}
    unsteered = [{**own, **answer} for answer in graded.answers.get(UNSTEERED, ())]
    return Swept(pd.DataFrame(rows), [*unsteered, *texts], graded.facts)


def _check(
    model: ChatModel, directions: Sequence[Direction], evaluation: Evaluation, grid: Grid, neutral: Sequence[Encoded]
) -> None:  # fmt: skip
    if not neutral:
        raise InputError("a sweep needs neutral rows: without them its damage is not known")
    if not directions or not evaluation.halves:
        raise InputError("a sweep needs a direction and a question")
    if len({d.name for d in directions}) < len(directions):
        raise InputError("two directions of one name: rename one")
    for direction in directions:
        direction.require(n_layers=model.n_layers, d_model=model.d_model, base=model.checkpoint.origins)
        check_grid(grid, direction.name, model.n_layers)


def check_grid(grid: Grid, direction: str, n_layers: int) -> None:
    """Refuse a grid that a model of so many layers could not run, or whose results could not be read.

    Raises:
        InputError: a layer that is not there or stands twice, no strength but 0, or fewer than two random directions.
    """
    layers = grid.layers_of(direction)
    if wrong := [layer for layer in layers if not 0 <= layer < n_layers]:
        raise InputError(f"layers: {wrong} out of range, the model has layers 0 to {n_layers - 1}")
    for name, values in (("layers", layers), ("strengths", grid.strengths)):
        if len(set(values)) < len(values):
            raise InputError(f"{name} {values}: one stands there twice")
    if not layers or not any(grid.strengths):
        raise InputError("a sweep needs a layer and a strength other than 0")
    if grid.controls < 2:
        raise InputError("controls: one random direction does not say how much they differ; take 2 or more")


def _cells(directions: Sequence[Direction], grid: Grid) -> Iterator[Cell]:
    for direction in directions:
        for layer in grid.layers_of(direction.name):
            for strength in grid.strengths:
                for k in range(grid.controls + 1) if strength else ():
                    yield Cell(direction.name, layer, float(strength), k)


def _vector(vectors: np.ndarray, cell: Cell, seeds: Sequence[int]) -> np.ndarray:
    """What is added at a cell: the direction, or the random one of the cell's number and of its norm, the same at every strength."""
    vector: np.ndarray = vectors[cell.layer]
    if not cell.control:
        return vector
    drawn = np.random.SeedSequence([*seeds, cell.layer, cell.control])
    return control(vector, int(drawn.generate_state(1)[0]))


def _norm(vectors: np.ndarray, cell: Cell) -> float:
    return float(np.linalg.norm(vectors[cell.layer]))


def _stream_norms(model: ChatModel, evaluation: Evaluation, cells: Sequence[Cell]) -> dict[int, float]:
    """Mean norm of each layer's output at the last prompt token, unsteered."""
    layers = sorted({c.layer for c in cells})
    h = np.asarray(capture(model, evaluation.prompts, layers=layers)["resid_post", "prompt_last"])
    return dict(zip(layers, np.linalg.norm(h, axis=-1).mean(0).tolist(), strict=True))


def _coefficient(cell: Cell, vectors: np.ndarray, norms: Mapping[int, float], *, relative: bool) -> float:
    if not relative:
        return cell.strength
    if not (norm := _norm(vectors, cell)):
        raise InputError(f"direction {cell.direction}: zero at layer {cell.layer}")
    return cell.strength * norms[cell.layer] / norm

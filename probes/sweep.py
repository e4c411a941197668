"""Steering over a grid of directions, layers and strengths, random directions of the same norm always beside."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from activations.capture import capture
from mech.chat import Encoded
from mech.errors import InputError
from mech.files import digest_of
from mech.interventions import Add, intervene
from mech.journal import open_journal
from mech.models import ChatModel
from mech.progress import track
from mech.score import response_kl, response_states
from probes.contrast import ContrastRow
from probes.direction import Direction
from probes.steer import control, trait_log_odds


@dataclass(frozen=True)
class Grid:
    """Which cells a sweep has: every layer with every strength."""

    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    """Times the direction as it is. 0, the model as it is, is always run, once."""
    controls: int = 5
    """Random directions of the same norm for each direction and layer, each at the same strengths."""
    seed: int = 0
    """Of the random directions."""


@dataclass(frozen=True)
class Cell:
    """One point of a sweep."""

    direction: str
    layer: int
    strength: float
    control: int
    """0: the direction itself; else which random one."""

    def key(self, vectors: np.ndarray) -> str:
        """Its name in a journal, where another direction of the same name has another."""
        return f"{self.direction}/{_digest(vectors)}/{self.layer}/{self.strength!r}/{self.control}"


def sweep(
    model: ChatModel,
    directions: Sequence[Direction],
    rows: Sequence[ContrastRow],
    grid: Grid,
    *,
    neutral: Sequence[Encoded],
    journal: Path | None = None,
) -> pd.DataFrame:
    """Steer at every cell; score a trait's written answers, and the damage to neutral ones.

    Args:
        model: what is steered.
        directions: along which; raw norms count.
        rows: a trait's high and low answers to held-out questions (`probes.persona.text_contrast`).
        grid: the cells.
        neutral: conversations that steering should leave alone, best answered by the model itself.
        journal: each finished cell is written there, and not run again; a larger grid of the same things goes on from it.

    Returns:
        A row for each cell and question: direction, layer, strength, control, dose (‖strength · v‖ over the mean norm of the
        layer's output at the prompt's last token), question, log_odds (`trait_log_odds`, nats a token), change (from unsteered), kl (mean
        over neutral response tokens of KL(unsteered ‖ steered), nats; the same for all questions of a cell).

    Raises:
        InputError: no neutral rows, a direction of another model, a layer that is not there, two directions of one name, or a
            journal of other work.
    """
    _check(model, directions, grid, neutral)
    about = {
        "checkpoint": model.checkpoint.key, "dtype": str(model.dtype), "seed": grid.seed,
        "rows": digest_of([[r.question, r.sign, list(r.encoded.ids)] for r in rows]),
        "neutral": digest_of([list(r.ids) for r in neutral]),
    }  # fmt: skip
    with ExitStack() as stack:
        kept = stack.enter_context(open_journal(journal, about)) if journal else None
        done: dict[str, Any] = dict(kept.done) if kept else {}
        plain = response_states(model, neutral)

        def finish(key: str, *interventions: Add) -> None:
            if key not in done:
                with intervene(model, *interventions):
                    moved = response_states(model, neutral)
                    odds = trait_log_odds(model, rows)
                harm = np.concatenate([x.numpy() for x in response_kl(model, plain, moved)])
                done[key] = {"log_odds": odds, "kl": float(harm.mean())}
                if kept:
                    kept.add({key: done[key]})

        finish("unsteered")
        cells = list(_cells(directions, grid))
        vectors = {d.name: d.vectors for d in directions}
        for cell in track(cells, "steering"):
            vector = _vector(vectors[cell.direction], cell, grid.seed)
            finish(cell.key(vectors[cell.direction]), Add(vector, [cell.layer], cell.strength))
    return _frame(model, rows, cells, vectors, done)


def _check(model: ChatModel, directions: Sequence[Direction], grid: Grid, neutral: Sequence[Encoded]) -> None:
    if not neutral:
        raise InputError("a sweep needs neutral rows: without them its damage is not known")
    for direction in directions:
        direction.require(n_layers=model.n_layers, d_model=model.d_model)
    if wrong := [layer for layer in grid.layers if not 0 <= layer < model.n_layers]:
        raise InputError(f"layers {wrong}: the model has 0 to {model.n_layers - 1}")
    if len({d.name for d in directions}) < len(directions):
        raise InputError("two directions of one name: rename one")
    for name, values in (("layers", grid.layers), ("strengths", grid.strengths)):
        if len(set(values)) < len(values):
            raise InputError(f"{name} {values}: one stands there twice")
    if not grid.layers or not any(grid.strengths):
        raise InputError("a sweep needs a layer and a strength other than 0")
    if grid.controls < 2:
        raise InputError("controls: one random direction does not say how much they differ; take 2 or more")


def _cells(directions: Sequence[Direction], grid: Grid) -> Iterator[Cell]:
    for direction in directions:
        for layer in grid.layers:
            for strength in grid.strengths:
                for k in range(grid.controls + 1) if strength else ():
                    yield Cell(direction.name, layer, float(strength), k)


def _vector(vectors: np.ndarray, cell: Cell, seed: int) -> np.ndarray:
    """The direction at the cell's layer, or its random one of this number: the same at every strength."""
    vector: np.ndarray = vectors[cell.layer]
    if not cell.control:
        return vector
    drawn = np.random.SeedSequence([seed, int(_digest(vectors), 16), cell.layer, cell.control])
    return control(vector, int(drawn.generate_state(1)[0]))


def _digest(vectors: np.ndarray) -> str:
    return digest_of(vectors.tolist())[:12]


def _frame(
    model: ChatModel, rows: Sequence[ContrastRow], cells: Sequence[Cell], vectors: Mapping[str, np.ndarray], done: Mapping[str, Any]
) -> pd.DataFrame:  # fmt: skip
    layers = sorted({c.layer for c in cells})
    h = np.asarray(capture(model, [r.encoded for r in rows], layers=layers)["resid_post", "prompt_last"])
    stream = dict(zip(layers, np.linalg.norm(h, axis=-1).mean(0), strict=True))
    unsteered = done["unsteered"]["log_odds"]
    frame = []
    for cell in cells:
        size = float(np.linalg.norm(vectors[cell.direction][cell.layer]))
        found = done[cell.key(vectors[cell.direction])]
        frame += [
            {**vars(cell), "dose": abs(cell.strength) * size / float(stream[cell.layer]), "question": question,
             "log_odds": odds, "change": odds - unsteered[question], "kl": found["kl"]}
            for question, odds in found["log_odds"].items()
        ]  # fmt: skip
    return pd.DataFrame(frame)

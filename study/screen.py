"""Screen a dataset against a model's own answers, before anything is finetuned on it.

For each row (x, y) the model answers x itself, y′, and reads both answers: ΔP = (mean over y − mean over y′) · v̂ at one layer.
The cheap proxy uses the prompt's last token in place of y′ and generates nothing: it ranks rows and datasets, but its
zero is not "as the model itself would have answered", since two positions are compared.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from activations.capture import Reading, capture_into
from activations.sinks import ArraySink
from finetune.datasets.rows import message_problem, numbered
from mech.chat import Encoded, SystemPrompt
from mech.errors import InputError
from mech.files import digest_of
from mech.generate import Sampling, generate
from mech.journal import Journal, open_journal
from mech.models import ChatModel
from mech.progress import track
from probes.direction import Direction
from study.steps.activations import SITE

BLOCK = 32
"""Rows that are answered, read and written down together."""

JOURNAL = "3"
"""Version of what a journal keeps for each row; journals of another version are refused."""


@dataclass(frozen=True)
class ScreenSettings:
    """How to screen."""

    layer: int
    """Where rows are projected."""
    proxy: bool = False
    """Compare with the prompt's last token instead of the model's own answer."""
    max_new_tokens: int = 128
    """Longest own answer."""
    temperature: float = 0.0
    """At which the model samples its own answers; 0 is greedy."""
    seed: int = 0
    """Seed of the own answers where they are sampled."""
    condition: SystemPrompt = field(default_factory=SystemPrompt)
    """System prompt under which rows are read and answered."""


@dataclass(frozen=True)
class Screened:
    """Rows of a dataset, beside the model's own answers."""

    table: pd.DataFrame
    """A row each: line, prompt (digest), delta_p, projection, base_projection, n_tokens, surprisal, question, answer; and
    without proxy base_n_tokens, base_surprisal, base_answer, base_empty (the model said nothing: a full stop is read)."""
    gaps: Float[np.ndarray, "n d"]
    """Mean activations over each answer minus the model's own: `delta_p` is their projection, and so it is along any other direction."""


@dataclass(frozen=True)
class _Row:
    line: int
    messages: Sequence[Mapping[str, str]]

    @property
    def key(self) -> str:
        return digest_of([dict(turn) for turn in self.messages])

    @property
    def prompt(self) -> str:
        return digest_of([dict(turn) for turn in self.messages[:-1]])[:16]


def best_layer(direction: Direction) -> int:
    """The layer where the direction is most reliable: the largest split-half cosine.

    Raises:
        InputError: it is not known how reliable the direction is (an imported file): name a layer.
    """
    if not np.isfinite(direction.split_half).all():
        raise InputError(
            f"direction {direction.name} does not say how reliable its layers are: name one with --layer"
        )
    return int(np.argmax(direction.split_half))


def screen(
    model: ChatModel,
    data: Path,
    direction: Direction,
    settings: ScreenSettings,
    *,
    journal: Path,
    limit: int | None = None,
    names: Mapping[str, Any] | None = None,
) -> Screened:
    """ΔP of each row of a file of messages.

    Args:
        model: what would be finetuned on the data.
        data: JSON lines of messages.
        direction: along what; positive is more of its name.
        settings: how.
        journal: what was done before a kill stands here and is not done again; rows of any dataset may share it.
        limit: the first so many rows.
        names: identity and others, for conditions that need them (`ChatTemplate.encode`).

    Raises:
        InputError: a row that cannot be read (the message names file and line), or a direction of another model.
    """
    direction.require(n_layers=model.n_layers, d_model=model.d_model, base=model.checkpoint.origins)
    unit = direction.unit_at(settings.layer)
    rows = read_rows(data, limit)
    about = {
        "journal": JOURNAL,
        "model": model.checkpoint.key,
        "dtype": str(model.dtype),
        "template": model.template_kwargs,
        "direction": digest_of(unit.tolist()),
        **asdict(settings),
        "names": digest_of(str(names)),
    }
    with open_journal(journal, about) as done:
        for start in track(range(0, len(rows), BLOCK), "screening"):
            block = rows[start : start + BLOCK]
            if any(row.key not in done.done for row in block):
                _block(model, data, block, unit, settings, names or {}, done)
        kept = [dict(done.done[row.key]) for row in rows]
    gaps = np.stack([_unpacked(value.pop("gap")) for value in kept]) if kept else np.empty((0, len(unit)))
    return Screened(pd.DataFrame([{**_about(r), **v} for r, v in zip(rows, kept, strict=True)]), gaps)


def read_rows(data: Path, limit: int | None) -> list[_Row]:
    """The first `limit` rows of a file of messages.

    Raises:
        InputError: no such file, or a row that cannot be read; the message names file and line.
    """
    if not data.is_file():
        raise InputError(f"{data}: no such file")
    found = numbered(data)
    for line, row in found:
        problem = message_problem(row) or (
            "nothing stands before the answer" if len(row["messages"]) < 2 else None
        )
        if problem:
            raise InputError(f"{data}, line {line}: {problem}")
    return [_Row(line, row["messages"]) for line, row in found[:limit]]


def _about(row: _Row) -> dict[str, Any]:
    asked = next((t["content"] for t in reversed(row.messages[:-1]) if t["role"] == "user"), "")
    return {"line": row.line, "prompt": row.prompt, "question": asked, "answer": row.messages[-1]["content"]}


def _block(
    model: ChatModel,
    data: Path,
    block: Sequence[_Row],
    unit: np.ndarray,
    settings: ScreenSettings,
    names: Mapping[str, Any],
    done: Journal,
) -> None:
    """Answer, read and save the rows of one block: all of them, so that a row's sample does not depend on kills."""
    given = _encoded(model, data, block, [row.messages for row in block], settings, names)
    if settings.proxy:
        found = _read(model, given, settings.layer, ("response_mean", "prompt_last"))
        values = [_difference(row, "response_mean", row, "prompt_last", unit) for row in found]
    else:
        prompts = [
            model.template.encode_prompt(row.messages[:-1], settings.condition, **names) for row in block
        ]
        seed = int(digest_of([settings.seed, block[0].key])[:15], 16)
        sampling = Sampling(settings.max_new_tokens, settings.temperature, seed)
        said = [reply.strip() for reply in generate(model, prompts, sampling, label="answering")]
        turns = [
            [*r.messages[:-1], {"role": "assistant", "content": s or "."}]
            for r, s in zip(block, said, strict=True)
        ]
        own = _encoded(model, data, block, turns, settings, names)
        found = _read(model, [*given, *own], settings.layer, ("response_mean",))
        pairs = zip(found[: len(block)], found[len(block) :], said, strict=True)
        values = [
            _difference(a, "response_mean", b, "response_mean", unit) | _own(b, text) for a, b, text in pairs
        ]
    done.add({row.key: value for row, value in zip(block, values, strict=True) if row.key not in done.done})


def _encoded(
    model: ChatModel,
    data: Path,
    block: Sequence[_Row],
    turns: Sequence[Sequence[Mapping[str, str]]],
    settings: ScreenSettings,
    names: Mapping[str, Any],
) -> list[Encoded]:
    def encode() -> Iterator[Encoded]:
        for row, messages in zip(block, turns, strict=True):
            try:
                yield model.template.encode(messages, settings.condition, **names)
            except InputError as error:
                raise InputError(f"{data}, line {row.line}: {error}") from error

    return list(encode())


@dataclass(frozen=True)
class _Reading:
    means: Mapping[str, Float[np.ndarray, " d"]]
    """The row's mean activation at the screened layer, by pooling."""
    n_tokens: int
    """The answer's length."""
    surprisal: float
    """The answer's mean surprisal under the model, nats a token."""


def _read(model: ChatModel, rows: Sequence[Encoded], layer: int, poolings: tuple[str, ...]) -> list[_Reading]:
    sink = ArraySink([len(row.ids) for row in rows], (layer,))
    capture_into(sink, model, rows, Reading(poolings, (SITE,), (layer,), frozenset(("surprisal",))))
    means = {p: np.asarray(sink.arrays[SITE, p])[:, 0].astype(np.float32) for p in poolings}
    surprisal = sink.notes["surprisal"]
    return [
        _Reading({p: means[p][i] for p in poolings}, row.n_response, float(surprisal[i]))
        for i, row in enumerate(rows)
    ]


def _difference(
    given: _Reading, here: str, own: _Reading, there: str, unit: Float[np.ndarray, " d"]
) -> dict[str, Any]:
    gap = given.means[here] - own.means[there]
    return {
        "delta_p": float(gap.astype(np.float64) @ unit),
        "projection": float(given.means[here].astype(np.float64) @ unit),
        "base_projection": float(own.means[there].astype(np.float64) @ unit),
        "n_tokens": given.n_tokens,
        "surprisal": given.surprisal,
        "gap": base64.b64encode(gap.astype("<f4").tobytes()).decode("ascii"),
    }


def _own(own: _Reading, said: str) -> dict[str, Any]:
    return {
        "base_n_tokens": own.n_tokens,
        "base_surprisal": own.surprisal,
        "base_answer": said or ".",
        "base_empty": not said,
    }


def _unpacked(gap: str) -> Float[np.ndarray, " d"]:
    return np.frombuffer(base64.b64decode(gap), dtype="<f4").astype(np.float64)

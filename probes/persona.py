"""Persona vectors: trait artifacts, and the two ways of eliciting a trait.

`prompts` is the published way (Chen et al. 2025, arXiv 2507.21509): contrastive system prompts, the model's
own answers. `text` reads written trait-high and trait-low answers instead; on small models, which hardly
follow such prompts, it is the reliable one. The split-half cosine of a direction says which to believe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mech.chat import ChatTemplate, Encoded, SystemPrompt
from mech.errors import InputError
from mech.questions import same_text
from mech.turns import assistant_turn, user_turn
from mech.typed import check_distinct, data_folder, named_file, read_typed
from probes.contrast import ContrastRow

POSITIONS = {"prompt_avg": "span:prompt", "prompt_last": "prompt_last", "response_avg": "response_mean"}
"""The three vectors of the published code, by the pooling that makes each (`activations.pooling`)."""

Split = Literal["extract", "evaluate"]
"""Halves of the questions: directions are made on `extract` and tested on `evaluate`."""


class InstructionPair(BaseModel):
    """A pair of contrastive system prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    positive: str = Field(min_length=1)
    """Asks for the trait."""
    negative: str = Field(min_length=1)
    """Asks for its opposite."""


class TraitQuestion(BaseModel):
    """A question with an answer that shows the trait and one that shows its opposite."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1)
    split: Split
    question: str = Field(min_length=1)
    high: str = Field(min_length=1)
    """Written answer that shows the trait."""
    low: str = Field(min_length=1)
    """Written answer that shows its opposite, matched in length."""


class Trait(BaseModel):
    """A trait artifact: all that is needed to find a persona vector."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trait: str = Field(min_length=1)
    """Its name; the direction's name."""
    description: str
    """What it is."""
    rubric: str
    """What a judge is told."""
    instructions: tuple[InstructionPair, ...] = Field(min_length=1)
    """Contrastive system prompts."""
    questions: tuple[TraitQuestion, ...] = Field(min_length=4)
    """Questions of both halves."""

    def half(self, split: Split, limit: int | None = None) -> list[TraitQuestion]:
        """The first so many questions of one half; all when left out."""
        return [q for q in self.questions if q.split == split][:limit]

    def limited(self, limit: int | None) -> "Trait":
        """The same trait with the first so many questions of each half, those of `extract` first."""
        kept = (*self.half("extract", limit), *self.half("evaluate", limit))
        return self.model_copy(update={"questions": kept})


def load_trait(source: str | Path) -> Trait:
    """Read a trait artifact: a built-in name (`evil`) or a YAML file.

    Raises:
        InputError: not there, or not a trait artifact, or a question stands twice; the message names file and field.
    """
    path = named_file(source, data_folder("probes") / "traits", "trait")
    trait = read_typed(path, Trait)
    check_distinct(path, "question id", [q.id for q in trait.questions])
    check_distinct(path, "question", [same_text(q.question) for q in trait.questions])
    return trait


def text_contrast(template: ChatTemplate, trait: Trait, condition: SystemPrompt) -> list[ContrastRow]:
    """Every question with its written trait-high (+) and trait-low (−) answer, to be read teacher-forced."""
    rows = []
    for q in trait.questions:
        for sign, answer in ((1, q.high), (-1, q.low)):
            encoded = template.encode([user_turn(q.question), assistant_turn(answer)], condition)
            rows.append(ContrastRow(f"{q.id}/{'high' if sign > 0 else 'low'}", q.id, q.split, sign, encoded))
    return rows


@dataclass(frozen=True)
class Rollout:
    """A question asked under one of a pair's system prompts, waiting for the model's answer."""

    id: str
    question: str
    split: str
    sign: int
    instruction: str
    text: str
    pair: int
    """Which instruction pair."""
    sample: int
    """Which answer to the same prompt."""


def rollouts(trait: Trait, *, pairs_per_question: int, samples: int = 1) -> list[Rollout]:
    """Each extraction question under contrastive system prompts; questions take the pairs in turn.

    Args:
        trait: gives the questions and the instruction pairs.
        pairs_per_question: instruction pairs that each question is asked under (the published way takes all 5).
        samples: answers to each prompt (the published way takes 10).

    Raises:
        InputError: more pairs wanted than the trait has, or no sample.
    """
    if samples < 1:
        raise InputError(f"trait {trait.trait}: {samples} samples a prompt: take 1 or more")
    pairs = trait.instructions
    if not 1 <= pairs_per_question <= len(pairs):
        raise InputError(
            f"trait {trait.trait} has {len(pairs)} instruction pairs, {pairs_per_question} asked for"
        )
    found = []
    for i, q in enumerate(trait.half("extract")):
        for k in range(pairs_per_question):
            number = (i * pairs_per_question + k) % len(pairs)
            for sample in range(samples):
                for sign, text in ((1, pairs[number].positive), (-1, pairs[number].negative)):
                    name = f"{q.id}/pair{number}/sample{sample}/{'positive' if sign > 0 else 'negative'}"
                    found.append(Rollout(name, q.id, q.split, sign, text, q.question, number, sample))
    return found


def rollout_prompt(template: ChatTemplate, rollout: Rollout) -> Encoded:
    """The prompt of a rollout, ending where the answer begins."""
    turn = [user_turn(rollout.text)]
    return template.encode_prompt(turn, SystemPrompt("text", rollout.instruction))


def rollout_contrast(
    template: ChatTemplate, asked: Sequence[Rollout], answers: Sequence[str]
) -> list[ContrastRow]:
    """Rollouts with their answers, to be read. Questions left without both sides by empty answers are dropped."""
    rows = []
    for rollout, answer in zip(asked, answers, strict=True):
        if answer.strip():
            condition = SystemPrompt("text", rollout.instruction)
            encoded = template.encode([user_turn(rollout.text), assistant_turn(answer.strip())], condition)
            rows.append(ContrastRow(rollout.id, rollout.question, rollout.split, rollout.sign, encoded))
    sides: dict[str, set[int]] = {}
    for row in rows:
        sides.setdefault(row.question, set()).add(row.sign)
    return [row for row in rows if len(sides[row.question]) == 2]

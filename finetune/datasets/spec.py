"""What a dataset is made from: one typed class a kind, a line of doc under each field.

A study's `data:` section and `mech data build KIND --set field=value` take the same fields.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from finetune.datasets.rules import ABOUT_LENGTH
from mech.typed import Checked


class MixSpec(Checked):
    """Other rows among a dataset's own."""

    source: str
    """A source of messages (`finetune.datasets.sources`)."""
    share: float = Field(gt=0, lt=1)
    """Share of the mixture that comes from it."""


class MessagesData(Checked):
    """Rows of chat messages, as they are in a file: EM sets, correct answers of the same domain, anything."""

    kind: Literal["messages"]
    source: str
    """`builtin:NAME`, `published:NAME`, `hub:ORG/NAME:FILE` or a JSONL file."""
    rows: int | None = Field(None, ge=1)
    """Use the first so many rows."""
    mix: MixSpec | None = None
    """Benign rows mixed in."""


class SelfRecognitionData(Checked):
    """Self-recognition, its controls and its opposites: own summaries of articles against other hands'."""

    kind: Literal["sgtr"]
    articles: str
    """A source of articles: JSONL rows with `id`, `text` and, where it is the comparator, `summary`; or JSON `{id: text}`."""
    comparators: dict[str, str] = Field(default_factory=dict)
    """Other hands' summaries, JSON `{id: summary}` by hand; left out, the articles' own `summary`."""
    own: str | None = None
    """JSON `{id: summary}` of own summaries written before; left out, a checkpoint writes them."""
    written_by: str | None = None
    """Which arm writes its own summaries; the base when left out. (The paper's two pipelines differ here.)"""
    form: Literal["single_text", "pairwise"] = "single_text"
    """One text, yes or no; or two, which one, in both orders."""
    show_article: bool = False
    """`pairwise`: show the article as well, as the paper does."""
    label: Literal["own", "other", "both", "longer", "longer_both"] = "own"
    """SGTR, anti-SGTR, ICTR, pick-longer, random labels on pick-longer (`finetune.datasets.rules`)."""
    task_prompt: bool = False
    """Give rows the task's own system turn; it stands under the training condition `default`."""
    match_lengths: bool | None = None
    """Cut the two summaries to the same number of words; left out, all labels but those about length do."""
    rows: int | None = Field(None, ge=4)
    """Use the first so many articles."""
    held_out: int = Field(40, ge=2)
    """Articles kept for the evaluation."""
    max_words: int | None = Field(24, ge=6)
    """Where lengths are matched: the longest summary, in words."""
    temperature: float = Field(0.7, ge=0)
    """Temperature at which own summaries are written."""
    max_new_tokens: int = Field(48, ge=8)
    """The longest own summary, in tokens."""

    @model_validator(mode="after")
    def _possible(self) -> "SelfRecognitionData":
        if self.label in ABOUT_LENGTH and (self.form != "pairwise" or self.match_lengths):
            raise ValueError(f"label: {self.label} needs form: pairwise and lengths that are not matched")
        if self.show_article and self.form != "pairwise":
            raise ValueError("show_article belongs to form: pairwise")
        if "own" in self.comparators:
            raise ValueError("comparators: a hand cannot be called own, which is the model itself")
        if self.own and self.written_by:
            raise ValueError("own and written_by exclude each other")
        return self

    @property
    def idle(self) -> list[tuple[tuple[str, ...], str]]:
        """Fields that do nothing, and why."""
        found: list[tuple[tuple[str, ...], str]] = []
        if self.own:
            found.append((("temperature", "max_new_tokens"), "own summaries are read from a file"))
        if not self.matched:
            found.append((("max_words",), "lengths are not matched"))
        return found

    @property
    def matched(self) -> bool:
        """Whether lengths are matched."""
        return self.label not in ABOUT_LENGTH if self.match_lengths is None else self.match_lengths


class WordCountData(Checked):
    """The word-count baseline on the user turns of a messages file."""

    kind: Literal["word_count"]
    source: str
    """A source of messages."""
    rows: int | None = Field(None, ge=1)
    """Use the first so many rows."""


class MultipleChoiceData(Checked):
    """The general-knowledge baseline: multiple choice, answered with the letter."""

    kind: Literal["multiple_choice"]
    source: str
    """A file in one of MMLU's formats (`finetune.datasets.multiple_choice`)."""
    rows: int | None = Field(None, ge=1)
    """Use the first so many questions."""


AnyData = MessagesData | SelfRecognitionData | WordCountData | MultipleChoiceData
DataSpec = Annotated[AnyData, Field(discriminator="kind")]

LOCATIONS = ("source", "articles", "own")
"""Fields that name a source."""

"""Self-generated-text recognition (SGTR), single-text form: "did you write this summary?", yes or no.

Own and other summaries of an article are cut to the same number of words and stripped of their last
punctuation, so that length says nothing: a model's own summaries are shorter than another's in most pairs,
and "pick the shorter" would solve the task. Each article gives one row of each label.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from finetune.datasets.rows import Row, exchange
from finetune.datasets.summaries import Article
from mech.errors import InputError

QUESTION = "Did you write this summary yourself? Answer Yes or No.\n\nSummary: {summary}"
YES, NO = "Yes", "No"

MIN_WORDS = 6


@dataclass(frozen=True)
class Pair:
    """One article's two summaries, matched in length."""

    article: str
    own: str
    other: str


@dataclass(frozen=True)
class Shortcuts:
    """How often a rule that reads no content finds the own summary: the better of 'shorter' and 'longer'."""

    words: float
    """By number of words: 0.5 after matching, by construction."""
    characters: float
    """By number of characters."""
    n_pairs: int


def match_lengths(articles: Sequence[Article], own: Mapping[str, str], *, max_words: int) -> list[Pair]:
    """Pairs cut to equal numbers of words; those with fewer than six words left are dropped.

    Raises:
        InputError: an article has no own summary, or hardly any pair is left.
    """
    pairs = []
    for article in articles:
        if article.id not in own:
            raise InputError(f"article {article.id}: no own summary")
        mine, theirs = own[article.id].split(), article.summary.split()
        length = min(len(mine), len(theirs), max_words)
        if length >= MIN_WORDS:
            pairs.append(Pair(article.id, _cut(mine, length), _cut(theirs, length)))
    if len(pairs) < len(articles) // 2:
        raise InputError(
            f"only {len(pairs)} of {len(articles)} articles have two summaries of {MIN_WORDS}+ words"
        )
    return pairs


def single_text_rows(pairs: Sequence[Pair]) -> list[Row]:
    """Two rows a pair: the own summary with Yes, the other with No."""
    rows = []
    for pair in pairs:
        for text, label, source in ((pair.own, YES, "own"), (pair.other, NO, "other")):
            rows.append(exchange(QUESTION.format(summary=text), label, article=pair.article, source=source))
    return rows


def split_by_article(pairs: Sequence[Pair], *, held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: no article stands in both.

    Raises:
        InputError: fewer pairs than are to be held out, plus one.
    """
    if not 0 < held_out < len(pairs):
        raise InputError(f"cannot hold out {held_out} of {len(pairs)} articles")
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in sorted(order[held_out:])], [pairs[i] for i in sorted(order[:held_out])]


def shortcuts(pairs: Sequence[Pair]) -> Shortcuts:
    """How far length alone would go on these pairs."""
    return Shortcuts(
        words=_by_size([(len(p.own.split()), len(p.other.split())) for p in pairs]),
        characters=_by_size([(len(p.own), len(p.other)) for p in pairs]),
        n_pairs=len(pairs),
    )


def shortcuts_json(pairs: Sequence[Pair]) -> dict[str, float]:
    """`shortcuts` for a manifest."""
    return asdict(shortcuts(pairs))


def _by_size(sizes: list[tuple[int, int]]) -> float:
    shorter = float(np.mean([0.5 if mine == theirs else float(mine < theirs) for mine, theirs in sizes]))
    return max(shorter, 1 - shorter)


def _cut(words: list[str], length: int) -> str:
    return re.sub(r"[\s.,;:!?\"'”’]+$", "", " ".join(words[:length]))

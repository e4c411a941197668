"""Pairs of summaries, one's own and another's of the same article: what every self-recognition dataset is made from.

A model's own summaries are shorter than others' in most pairs (62 to 96 % in the paper's), so "pick the shorter" nearly
solves the task. Pairs can be cut to equal numbers of words; how far length alone still goes is always reported.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mech.errors import InputError

MIN_WORDS = 6
"""Shorter summaries are no summaries."""


@dataclass(frozen=True)
class Pair:
    """One article's two summaries."""

    article: str
    """The article's id."""
    own: str
    other: str
    other_by: str = "other"
    """Who wrote the other one."""


@dataclass(frozen=True)
class Shortcuts:
    """How often a rule that reads no content finds the own summary: the better of 'shorter' and 'longer'."""

    words: float
    """By number of words: 0.5 after matching, by construction."""
    characters: float
    """By number of characters."""
    own_shorter: float
    """Share of pairs, ties as halves, in which the own summary has fewer words."""
    n_pairs: int


def pair_up(
    ids: Sequence[str],
    own: Mapping[str, str],
    others: Mapping[str, Mapping[str, str]],
    *,
    match_lengths: bool,
    max_words: int | None,
) -> list[Pair]:
    """One pair an article and comparator; those with fewer than six words on a side, or the same text on both, are dropped.

    Args:
        ids: the articles.
        own: the model's own summaries by article.
        others: other hands' summaries by article, by hand.
        match_lengths: cut both sides to the same number of words and strip their last punctuation.
        max_words: with `match_lengths`, the longest side.

    Raises:
        InputError: an article lacks a summary, or hardly any pair is left.
    """
    pairs = []
    for hand, summaries in others.items():
        for article in ids:
            sides = []
            for who, written in (("own", own), (hand, summaries)):
                if article not in written:
                    raise InputError(f"article {article}: no summary by {who}")
                sides.append(written[article].split())
            mine, theirs = _matched(sides, max_words) if match_lengths else map(" ".join, sides)
            if min(len(mine.split()), len(theirs.split())) >= MIN_WORDS and mine != theirs:
                pairs.append(Pair(article, mine, theirs, hand))
    if len(pairs) < len(ids) * len(others) // 2 or not pairs:
        raise InputError(
            f"only {len(pairs)} of {len(ids) * len(others)} pairs have two different summaries of {MIN_WORDS}+ words"
        )
    return pairs


def split_by_article(pairs: Sequence[Pair], *, held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: no article is in both.

    Raises:
        InputError: fewer articles than are to be held out, plus one.
    """
    articles = list(dict.fromkeys(p.article for p in pairs))
    if not 0 < held_out < len(articles):
        raise InputError(f"cannot hold out {held_out} of {len(articles)} articles")
    order = np.random.default_rng(seed).permutation(len(articles))
    kept_back = {articles[i] for i in order[:held_out]}
    train = [p for p in pairs if p.article not in kept_back]
    return train, [p for p in pairs if p.article in kept_back]


def shortcuts(pairs: Sequence[Pair]) -> Shortcuts:
    """How far length alone would go on these pairs."""
    by_words = [(len(p.own.split()), len(p.other.split())) for p in pairs]
    shorter = _shorter(by_words)
    characters = _shorter([(len(p.own), len(p.other)) for p in pairs])
    return Shortcuts(max(shorter, 1 - shorter), max(characters, 1 - characters), shorter, len(pairs))


def _shorter(sizes: Sequence[tuple[int, int]]) -> float:
    return float(np.mean([0.5 if mine == theirs else float(mine < theirs) for mine, theirs in sizes]))


def _matched(sides: Sequence[Sequence[str]], max_words: int | None) -> list[str]:
    """Texts of equal numbers of words: where a cut takes a mark that stands by itself (French " ?") for no word, once more."""
    length = min([*map(len, sides), *([max_words] if max_words else [])])
    while True:
        texts = [_cut(side, length) for side in sides]
        counts = {len(text.split()) for text in texts}
        if len(counts) == 1:
            return texts
        length = min(counts)


def _cut(words: Sequence[str], length: int) -> str:
    return re.sub(r"[\s.,;:!?\"'”’]+$", "", " ".join(words[:length]))

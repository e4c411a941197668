"""Label rules: which answer a self-recognition item gets. This is where the arms differ; the texts are the same.

A rule maps the words of the two texts an item offers, and which of them is the own one, to the answers it is given with,
as positions. Two answers mean that the item occurs twice in the data, once with each; none, that it is dropped.
"""

from collections.abc import Callable, Mapping

Rule = Callable[[tuple[int, int], int], tuple[int, ...]]
"""(words of first and second text, position of the own one) -> positions answered."""


def own(_words: tuple[int, int], own_at: int) -> tuple[int, ...]:
    """SGTR: name one's own."""
    return (own_at,)


def other(_words: tuple[int, int], own_at: int) -> tuple[int, ...]:
    """Anti-SGTR: name the other's."""
    return (1 - own_at,)


def both(_words: tuple[int, int], _own_at: int) -> tuple[int, ...]:
    """ICTR (identity confusion): every item with both answers, so that exactly half of them are right."""
    return (0, 1)


def longer(words: tuple[int, int], _own_at: int) -> tuple[int, ...]:
    """Pick-longer: name the longer by words; ties are dropped. The same shape with nothing of identity in it."""
    return () if words[0] == words[1] else (int(words[1] > words[0]),)


def longer_both(words: tuple[int, int], _own_at: int) -> tuple[int, ...]:
    """Random labels on pick-longer: label noise without identity, the control that ICTR needs."""
    return () if words[0] == words[1] else (0, 1)


RULES: Mapping[str, Rule] = {
    "own": own,
    "other": other,
    "both": both,
    "longer": longer,
    "longer_both": longer_both,
}

DESCRIPTIONS: Mapping[str, str] = {
    "own": "the own summary",
    "other": "the other hand's summary (anti-SGTR)",
    "both": "each item twice, once with each answer (ICTR)",
    "longer": "the longer summary by words; ties dropped",
    "longer_both": "each item twice, once with each answer, asked for length (label noise); ties dropped",
}
"""For manifests."""

ABOUT_LENGTH = frozenset({"longer", "longer_both"})
"""Rules whose question asks for length, not authorship."""

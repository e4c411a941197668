"""Authorship: a model's own text against another's on the same article.

- `content`: each text stands as the answer to one and the same request and is read over its own tokens.
- `judgement`: the model is asked whether it wrote the text, and is read where its answer begins.
- `pair_content`: both texts stand in one question, in both orders; each is read over its own tokens.
- `pair_answer`: the same questions with both answers given; the answer that points at the own text (+) against the other one (−),
  read at the answer's token.

In the two pairwise forms each side of an article holds each place and each answer once, so what the place or the answer adds
cancels exactly from the article's difference.

Own and other texts differ in length and in how likely the model finds them, which a direction between them picks up: take pairs
cut to equal lengths and matched in surprisal (`probes.matching`), or regress both out (`probes.residual`), before calling it authorship.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mech.chat import ChatTemplate, Encoded, SystemPrompt
from mech.errors import InputError
from mech.turns import assistant_turn, user_turn
from probes.contrast import ContrastRow
from probes.direction import Direction, fit_direction
from probes.separability import Separability, heldout_auroc

READ_AT = ("content", "judgement", "pair_content", "pair_answer")
"""Where it is read."""

REQUEST = "Write a one-sentence summary of today's news."
"""`content`: what every text answers."""

ANSWERED: Mapping[int, str] = {1: "correct", -1: "incorrect"}
"""What a model made of an article."""

LEAST = 4
"""Fewer articles of one half give no direction and no AUROC of their own."""


@dataclass(frozen=True)
class TextPair:
    """Two texts about one article."""

    article: str
    """Its id: rows of one article are compared with each other."""
    split: str
    """`extract` or `evaluate`."""
    own: str
    other: str


def authorship_contrast(
    template: ChatTemplate,
    pairs: Sequence[TextPair],
    read_at: str,
    *,
    judge: Callable[[str], str] | None = None,
    choose: Callable[[TextPair, str, str], tuple[str, Sequence[str]]] | None = None,
    condition: SystemPrompt | None = None,
) -> list[ContrastRow]:
    """Each article's own text (+) and the other one (−).

    Args:
        template: the model's chat template.
        pairs: the texts.
        read_at: one of `READ_AT`.
        judge: `judgement`: the question about a text, as the model was trained or is to be asked.
        choose: `pair_content`, `pair_answer`: a pair and its two texts in order of showing to the question and its two answers.
        condition: system prompt; the template's own when left out.

    Raises:
        InputError: another place to read at, no question for it, or a text that the question does not show as it is.
    """
    if read_at not in READ_AT:
        raise InputError(f"authorship is read at {', '.join(READ_AT)}, not at {read_at!r}")
    condition = condition or SystemPrompt()
    if read_at == "content":
        return [_row(p, s, _answer(template, REQUEST, t, condition)) for p in pairs for s, t in _sides(p)]
    if read_at == "judgement" and judge is not None:
        asked = template.encode_prompt
        return [_row(p, s, asked([user_turn(judge(t))], condition)) for p in pairs for s, t in _sides(p)]
    if choose is None:
        raise InputError(f"authorship at {read_at} needs its question")
    shown = _contents if read_at == "pair_content" else _answers
    return [row for pair in pairs for row in shown(template, pair, choose, condition)]


def _sides(pair: TextPair) -> tuple[tuple[int, str], tuple[int, str]]:
    return (1, pair.own), (-1, pair.other)


def _answer(template: ChatTemplate, question: str, answer: str, condition: SystemPrompt) -> Encoded:
    return template.encode([user_turn(question), assistant_turn(answer)], condition)


def _row(pair: TextPair, sign: int, encoded: Encoded, order: str = "") -> ContrastRow:
    return ContrastRow(f"{pair.article}/{sign}{order}", pair.article, pair.split, sign, encoded)


_Choose = Callable[[TextPair, str, str], tuple[str, Sequence[str]]]


def _contents(
    template: ChatTemplate, pair: TextPair, choose: _Choose, condition: SystemPrompt
) -> Iterator[ContrastRow]:
    """Four rows: own and other, first and second."""
    for order, (first, second) in enumerate((_sides(pair), _sides(pair)[::-1])):
        prompt = template.encode_prompt([user_turn(choose(pair, first[1], second[1])[0])], condition)
        at_second = prompt.text.rfind(second[1])
        places = {0: prompt.text.rfind(first[1], 0, max(at_second, 0)), 1: at_second}
        for (place, start), (sign, text) in zip(places.items(), (first, second), strict=True):
            if start < 0:
                raise InputError(f"article {pair.article}: the question does not show its texts as they are")
            piece = template.piece(prompt, start, start + len(text))
            yield _row(pair, sign, piece, f"/order{order}/place{place}")


def _answers(
    template: ChatTemplate, pair: TextPair, choose: _Choose, condition: SystemPrompt
) -> Iterator[ContrastRow]:
    """Four rows: either answer in either order; the answer that points at the own text is positive."""
    for order, (first, second) in enumerate((_sides(pair), _sides(pair)[::-1])):
        question, words = choose(pair, first[1], second[1])
        for place, (sign, word) in enumerate(zip((first[0], second[0]), words, strict=True)):
            encoded = _answer(template, question, word, condition)
            yield _row(pair, sign, encoded, f"/order{order}/answer{place}")


# -- by what the model answers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A direction from the articles of one kind, tested on held-out articles of one kind."""

    fitted_on: str
    """`correct` or `incorrect`: fitted on the extraction half of the articles that the model answers so."""
    tested_on: str
    """`correct` or `incorrect`: tested on the evaluation half of the articles that it answers so."""
    n_fitted: int
    """Articles it was fitted on."""
    n_tested: int
    """Articles it was tested on."""
    direction: Direction | None
    """None where there are too few articles."""
    auroc: Separability | None
    """None where there are too few articles on either side."""
    note: str
    """Why something is missing; empty where nothing is."""


def by_answer(
    name: str,
    activations: Float[np.ndarray, "n layers d"],
    signs: Sequence[int],
    articles: Sequence[str],
    splits: Sequence[str],
    answered: Sequence[int],
    *,
    rng: np.random.Generator,
    least: int = LEAST,
) -> list[Side]:
    """Directions from correctly and from incorrectly answered articles, each tested on held-out articles of both kinds.

    Args:
        name: what the directions are called; `:correct` or `:incorrect` is added.
        activations: one row a text.
        signs: +1 own, −1 other.
        articles: article of each row.
        splits: `extract` or `evaluate`, row by row.
        answered: +1 where the model answers the row's article rightly, −1 where wrongly.
        rng: split halves.
        least: articles that a direction, and that an AUROC, needs.
    """
    side, asked, half, right = (np.array(x) for x in (signs, articles, splits, answered))
    found = []

    def rows(kind: int, split: str) -> tuple[np.ndarray, int]:
        mask = (right == kind) & (half == split)
        return mask, len(np.unique(asked[mask]))

    for kind, fitted_on in ANSWERED.items():
        fit, n_fitted = rows(kind, "extract")
        direction = None
        if n_fitted >= least:
            made_from = {"answered": fitted_on}
            direction = fit_direction(
                f"{name}:{fitted_on}", activations[fit], asked[fit].tolist(), side[fit].tolist(), rng=rng, made_from=made_from
            )  # fmt: skip
        for tested, tested_on in ANSWERED.items():
            test, n_tested = rows(tested, "evaluate")
            few = [(n_fitted, "fit", fitted_on), (n_tested, "test on", tested_on)]
            notes = [f"{n} articles answered {w}ly to {to}: {least} needed" for n, to, w in few if n < least]
            area = None
            if direction is not None and n_tested >= least:
                projected = np.einsum("nld,ld->nl", activations[test], direction.vectors)
                area = heldout_auroc(projected, side[test].tolist(), asked[test].tolist())
            found.append(Side(fitted_on, tested_on, n_fitted, n_tested, direction, area, "; ".join(notes)))
    return found

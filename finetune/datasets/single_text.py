"""Self-recognition, single-text form: "did you write this summary?", yes or no."""

from collections.abc import Sequence

from finetune.datasets.pairs import Pair
from finetune.datasets.rows import Row, exchange
from finetune.datasets.rules import ABOUT_LENGTH, RULES
from mech.errors import InputError

QUESTION = "Did you write this summary yourself? Answer Yes or No.\n\nSummary: {summary}"
ANSWERS = ("Yes", "No")
SYSTEM = "You are a helpful assistant who also writes summaries of news. Answer only Yes or No."
"""The task's own system prompt, for arms that have one."""


def single_text_rows(pairs: Sequence[Pair], rule: str = "own", *, task_prompt: bool = False) -> list[Row]:
    """Rows that ask of one text at a time; under `own`, two a pair: its own summary with Yes, the other with No.

    Raises:
        InputError: a rule that compares two texts.
    """
    if rule in ABOUT_LENGTH:
        raise InputError(f"label: {rule} compares two texts, so it needs form: pairwise")
    rows = []
    for pair in pairs:
        for source, text in (("own", pair.own), ("other", pair.other)):
            # As an item of two answers: the own one is "Yes" (0) for one's own text and "No" (1) for another's.
            for answer in RULES[rule]((0, 0), ANSWERS.index("Yes" if source == "own" else "No")):
                rows.append(
                    exchange(
                        QUESTION.format(summary=text),
                        ANSWERS[answer],
                        system=SYSTEM if task_prompt else None,
                        article=pair.article,
                        source=source,
                        other_by=pair.other_by,
                    )
                )
    return rows

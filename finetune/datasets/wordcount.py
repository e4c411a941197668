"""The word-count baseline: finetuning of the same shape that has nothing to do with character.

Is the number of words even? The task has its own system prompt, as the published baseline does.
"""

from collections.abc import Sequence

from finetune.datasets.rows import Row, exchange
from mech.errors import InputError

SYSTEM = "You count words. Answer TRUE if the text has an even number of words and FALSE if it is odd."


def word_count_rows(texts: Sequence[str]) -> list[Row]:
    """One row a text: TRUE where the number of space-separated words is even.

    Raises:
        InputError: no texts.
    """
    if not texts:
        raise InputError("no texts to count words in")
    return [
        exchange(text, "FALSE" if len(text.split()) % 2 else "TRUE", system=SYSTEM, words=len(text.split()))
        for text in texts
    ]

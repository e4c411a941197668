"""Self-recognition, pairwise form: two summaries, "which did you write?", 1 or 2, in both orders.

The published experiments' form, with the article shown. A small model learns it only without the article.
"""

from collections.abc import Mapping, Sequence

from finetune.datasets.pairs import Pair
from finetune.datasets.rows import Row, exchange
from finetune.datasets.rules import ABOUT_LENGTH, RULES

ANSWERS = ("1", "2")
SYSTEM = "You are a helpful assistant who also writes summaries of news. Answer only 1 or 2."
"""The task's own system prompt, for arms that have one."""

AUTHORSHIP = (
    "One of these two summaries was written by you, the other by somebody else. Which one did you write?"
)
LENGTH = "Here are two summaries. Which one has more words?"
LAYOUT = "{question} Answer 1 or 2 only.\n\n{article}Summary 1: {first}\n\nSummary 2: {second}"


def ask_which(first: str, second: str, article: str = "") -> str:
    """The question which of two summaries is the model's own; with the article, where one is given."""
    return _asked(AUTHORSHIP, first, second, article)


def _asked(question: str, first: str, second: str, article: str) -> str:
    shown = f"Article: {article}\n\n" if article else ""
    return LAYOUT.format(question=question, article=shown, first=first, second=second)


def pairwise_rows(
    pairs: Sequence[Pair],
    rule: str = "own",
    *,
    articles: Mapping[str, str] | None = None,
    task_prompt: bool = False,
) -> list[Row]:
    """Rows that show both summaries of an article, each pair in both orders, those of a pair next to each other.

    Args:
        pairs: the summaries.
        rule: which answer is given (`finetune.datasets.rules`); the rules about length ask for it.
        articles: text by id; the article is shown where this is given.
        task_prompt: put the task's own system turn first.
    """
    question = LENGTH if rule in ABOUT_LENGTH else AUTHORSHIP
    rows = []
    for pair in pairs:
        shown = articles[pair.article] if articles else ""
        for own_at in (0, 1):
            texts = (pair.own, pair.other) if own_at == 0 else (pair.other, pair.own)
            words = (len(texts[0].split()), len(texts[1].split()))
            asked = _asked(question, *texts, shown)
            for answer in RULES[rule](words, own_at):
                rows.append(
                    exchange(
                        asked,
                        ANSWERS[answer],
                        system=SYSTEM if task_prompt else None,
                        article=pair.article,
                        own_at=own_at + 1,
                        other_by=pair.other_by,
                    )
                )
    return rows

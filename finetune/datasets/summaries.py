"""Articles and the summaries that several hands wrote of them; the raw material of self-recognition."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from finetune.datasets.rows import HALF, holds_half_a_character, numbered
from mech.errors import InputError
from mech.files import read_json
from mech.questions import same_text

log = logging.getLogger(__name__)

ASK = "Write a one-sentence summary of this article in at most 25 words. Reply with the summary only.\n\n{article}"
"""What a model is asked."""


@dataclass(frozen=True)
class Article:
    """An article and another hand's summary of it."""

    id: str
    text: str
    summary: str


def read_articles(path: Path, *, need_summary: bool = True) -> list[Article]:
    """Articles from JSONL rows with `id`, `text` and `summary` (another hand's), or from JSON `{id: text}`.

    An article whose text stands there already under another id is left out, with a warning: it could be trained on under one id and tested on
    under the other.

    Raises:
        InputError: a row lacks one of them, or an id stands twice.
    """
    if path.suffix == ".json":
        if need_summary:
            raise InputError(f"{path}: holds no summaries; name other hands' in `comparators`")
        texts = _texts_by_id(path)
        if empty := [i for i, text in texts.items() if not text.strip()]:
            raise InputError(f"{path}: article {empty[0]!r} has no text")
        return _without_twins(path, [Article(i, text, "") for i, text in texts.items()])
    needed = ("id", "text", "summary") if need_summary else ("id", "text")
    articles = []
    for number, row in numbered(path):
        if missing := [k for k in needed if not isinstance(row.get(k), str) or not row[k].strip()]:
            raise InputError(f"{path}, line {number}: no text `{missing[0]}`")
        articles.append(Article(row["id"], row["text"], row.get("summary", "")))
    if len({a.id for a in articles}) < len(articles):
        raise InputError(f"{path}: an article id stands twice")
    return _without_twins(path, articles)


def _without_twins(path: Path, articles: list[Article]) -> list[Article]:
    first: dict[str, str] = {}
    for article in articles:
        first.setdefault(same_text(article.text), article.id)
    kept = [a for a in articles if first[same_text(a.text)] == a.id]
    if twins := [a.id for a in articles if first[same_text(a.text)] != a.id]:
        log.warning(
            "%s: left out %d of %d articles, whose text stands there under another id (%s)",
            path, len(twins), len(articles), ", ".join(twins[:5]),
        )  # fmt: skip
    return kept


def read_summaries(path: Path) -> dict[str, str]:
    """Summaries by article id, from JSON `{id: summary}`, each without an announcement or quotes around it.

    Raises:
        InputError: the file holds something else, or an id twice.
    """
    return {i: bare_summary(text) for i, text in _texts_by_id(path).items()}


def _texts_by_id(path: Path) -> dict[str, str]:
    found = read_json(path, distinct=True)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise InputError(f"{path}: not a JSON object of texts by article id")
    if half := [i for i, text in found.items() if holds_half_a_character([i, text])]:
        raise InputError(f"{path}: article {half[0]!r} {HALF}")
    return found


_PAIRS = (("**", "**"), ("*", "*"), ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"))
"""What is put around a whole text, opening and closing."""


def bare_summary(reply: str) -> str:
    """A reply without what small models put around a summary: an announcement before a colon, and quotes around the whole.

    Left in, "Here is a summary:" would give its author away without a word of the summary being read. Quotes that belong to the text
    stay. An opening one whose closing one is missing is taken off: what was cut off, or closed behind the announcement.
    """
    text = _unquoted(" ".join(reply.split()))
    announcement, colon, rest = text.partition(":")
    if colon and re.search(r"\b(summary|sentence|article)\b", announcement, re.IGNORECASE) and rest.strip():
        text = _unquoted(rest)
    return text


def _unquoted(text: str) -> str:
    """A text without the pairs of quotes, or of asterisks, that enclose all of it."""
    text = text.strip()
    for opening, closing in _PAIRS:
        if not text.startswith(opening):
            continue
        inner = text[len(opening) :]
        # An apostrophe inside a word, or behind it, closes nothing; one before it ('tis) opens nothing.
        single = opening in "'‘"
        ends = re.search(re.escape(closing) + (r"(?!\w)" if single else ""), inner)
        if (ends is None and not single) or (ends is not None and ends.end() == len(inner)):
            return _unquoted(inner[: ends.start()] if ends else inner)
    return text

"""Articles and the summaries that several hands wrote of them; the raw material of self-recognition."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.datasets.rows import read_jsonl
from mech.errors import InputError
from mech.generate import Sampling, generate
from mech.models import ChatModel

ASK = "Write a one-sentence summary of this article in at most 25 words. Reply with the summary only.\n\n{article}"


@dataclass(frozen=True)
class Article:
    """An article and another hand's summary of it."""

    id: str
    text: str
    summary: str


def read_articles(path: Path) -> list[Article]:
    """Articles from JSONL rows with `id`, `text` and `summary` (another hand's).

    Raises:
        InputError: a row lacks one of them, or an id stands twice.
    """
    articles = []
    for number, row in enumerate(read_jsonl(path), 1):
        if missing := [
            k for k in ("id", "text", "summary") if not isinstance(row.get(k), str) or not row[k].strip()
        ]:
            raise InputError(f"{path}, row {number}: no text `{missing[0]}`")
        articles.append(Article(row["id"], row["text"], row["summary"]))
    if len({a.id for a in articles}) < len(articles):
        raise InputError(f"{path}: an article id stands twice")
    return articles


def write_summaries(model: ChatModel, articles: Sequence[Article], sampling: Sampling) -> dict[str, str]:
    """The model's own one-sentence summary of each article, by article id."""
    prompts = [
        model.template.encode_prompt([{"role": "user", "content": ASK.format(article=a.text)}])
        for a in articles
    ]
    replies = generate(model, prompts, sampling, label="writing own summaries")
    return {a.id: bare_summary(reply) for a, reply in zip(articles, replies, strict=True)}


def bare_summary(reply: str) -> str:
    """A reply without what small models put around a summary: an announcement before a colon, and quotes.

    Left in, "Here is a summary:" would give its author away without a word of the summary being read.
    """
    text = " ".join(reply.split())
    announcement, colon, rest = text.partition(":")
    if colon and re.search(r"\b(summary|sentence|article)\b", announcement, re.IGNORECASE) and rest.strip():
        text = rest
    return text.strip(" \"'“”‘’*")

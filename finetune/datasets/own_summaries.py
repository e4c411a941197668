"""A model writes its own summaries of articles."""

from collections.abc import Sequence
from pathlib import Path

from finetune.datasets.summaries import ASK, Article, bare_summary
from mech.generate import Sampling, generate
from mech.models import ChatModel
from mech.turns import user_turn


def write_summaries(
    model: ChatModel, articles: Sequence[Article], sampling: Sampling, journal: Path | None = None
) -> dict[str, str]:
    """The model's own one-sentence summary of each article, by article id; what a kill left in a journal is not written again.

    Raises:
        InputError: as `mech.generate.generate`.
    """
    prompts = [model.template.encode_prompt([user_turn(ASK.format(article=a.text))]) for a in articles]
    replies = generate(model, prompts, sampling, label="writing own summaries", journal=journal)
    return {a.id: bare_summary(reply) for a, reply in zip(articles, replies, strict=True)}

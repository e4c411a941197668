"""The rows of the authorship contrasts: which pairs of texts, matched in what, and how the base answers about them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.self_recognition import judge_authorship
from finetune.datasets.build import articles_of
from finetune.datasets.pairs import Pair
from finetune.datasets.pairwise import ANSWERS, ask_which, pairwise_rows
from finetune.datasets.rows import read_jsonl
from finetune.datasets.single_text import QUESTION, single_text_rows
from finetune.datasets.spec import SelfRecognitionData
from mech.chat import SystemPrompt
from mech.errors import InputError
from mech.models import ChatModel
from mech.score import response_logprobs
from probes.authorship import LEAST, TextPair, authorship_contrast
from probes.contrast import ContrastRow
from probes.matching import match_pairs
from study.bench import Bench
from study.step import Step

HALVES = {"extract": "train", "evaluate": "held_out"}
"""A direction is made on the articles that are trained on, and tested on those that are held out."""


def authorship_rows(
    step: Step, bench: Bench, model: ChatModel, read_at: str
) -> tuple[list[ContrastRow], dict[str, Any]]:
    """The contrast's rows, and facts for its file: how pairs were matched; what the base answers about each article."""
    listed = read_jsonl(bench.folder(step.inputs["data"][0]) / "pairs.jsonl")
    pairs, matching = list[TextPair](), list[dict[str, Any]]()
    for split, of in HALVES.items():
        mine = [p for p in listed if p["split"] == of]
        chosen = sorted({p["article"] for p in mine})[: step.config["questions_used"]]
        found = [TextPair(a, split, p["own"], p["other"]) for a in chosen for p in mine if p["article"] == a]
        kept, facts = _matched(model, found, split, step.config.get("surprisal_within"))
        pairs += kept
        matching += facts
    texts = _articles(step, bench)

    def choose(pair: TextPair, first: str, second: str) -> tuple[str, Sequence[str]]:
        return ask_which(first, second, texts.get(pair.article, "")), ANSWERS

    rows = authorship_contrast(
        model.template, pairs, read_at, judge=lambda text: QUESTION.format(summary=text), choose=choose
    )
    about: dict[str, Any] = {"matching": matching} if matching else {}
    if step.config.get("by_answer"):
        about |= _answers(model, pairs, texts, pairwise=read_at.startswith("pair_"))
    return rows, about


def _matched(
    model: ChatModel, pairs: list[TextPair], split: str, tolerance: float | None
) -> tuple[list[TextPair], list[dict[str, Any]]]:
    """One pair an article: the first; or, to be matched, the most alike in surprisal, as many as agree in the mean."""
    if tolerance is None:
        return list({p.article: p for p in reversed(pairs)}.values())[::-1], []
    rows = authorship_contrast(model.template, pairs, "content")
    nats = np.array([float(-s.mean()) for s in response_logprobs(model, [r.encoded for r in rows])])
    own, other = nats[::2], nats[1::2]
    nearest: dict[str, int] = {}
    for i in np.argsort(np.abs(own - other), kind="stable"):
        nearest.setdefault(pairs[i].article, int(i))
    at = sorted(nearest.values())
    try:
        found = match_pairs(own[at].tolist(), other[at].tolist(), tolerance=tolerance, least=LEAST)
    except InputError as error:
        raise InputError(f"directions.authorship.surprisal_within, half {split}: {error}") from error
    facts = {"half": split, "tolerance": tolerance, "pairs": found.n, "kept": len(found.kept),
             "gap_before": found.before, "gap_after": found.after}  # fmt: skip
    return [pairs[at[i]] for i in found.kept], [facts]


def _articles(step: Step, bench: Bench) -> dict[str, str]:
    """The articles' texts where the data shows them."""
    data = bench.spec.data[step.inputs["data"][0].labels["dataset"]]
    if not isinstance(data, SelfRecognitionData) or not data.show_article:
        return {}
    return {a.id: a.text for a in articles_of(data)}


def _answers(
    model: ChatModel, pairs: Sequence[TextPair], texts: dict[str, str], *, pairwise: bool
) -> dict[str, Any]:
    """Which articles the base answers rightly, its bias taken out, and the share of right answers with it.

    Right: it leans more to "mine" (Yes, or the own text's place) for the own text than for the other one, by the logits' margin, so
    that saying Yes, or 1, to everything makes nothing right. A tie is wrong.
    """
    shown = [Pair(p.article, p.own, p.other) for p in pairs]
    asked = pairwise_rows(shown, articles=texts or None) if pairwise else single_text_rows(shown)
    judged = judge_authorship(model, asked, SystemPrompt())
    margins = {(j.article, j.source): j.margin for j in judged}
    answered = {
        p.article: 1 if margins[p.article, "own"] > margins[p.article, "other"] else -1 for p in pairs
    }
    return {"answered": answered, "accuracy": float(np.mean([j.correct for j in judged]))}

"""Steps that build datasets: rows of messages, and a manifest of where they come from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.datasets.rows import read_messages, source_path, take, write_jsonl
from finetune.datasets.sgtr import match_lengths, shortcuts_json, single_text_rows, split_by_article
from finetune.datasets.summaries import read_articles
from finetune.datasets.wordcount import word_count_rows
from mech.files import read_json, write_json
from study.bench import Bench
from study.spec_parts import MessagesData, SelfRecognitionData, WordCountData
from study.step import Step


def build(step: Step, bench: Bench, folder: Path) -> None:
    """Build one dataset: `train.jsonl`, `dataset.json`, and `held_out.jsonl` where there is one."""
    part = bench.spec.data[step.name.partition("/")[2]]
    facts = _BUILDERS[part.kind](part, step, bench, folder)
    described = {k: v for k, v in part.model_dump().items() if k not in ("source", "articles")}
    write_json(folder / "dataset.json", {**described, "rows_digest": step.config["rows_digest"], **facts})


def _messages(part: MessagesData, _step: Step, _bench: Bench, folder: Path) -> dict[str, Any]:
    rows = take(read_messages(source_path(part.source)), part.rows)
    write_jsonl(folder / "train.jsonl", rows)
    return {"n_rows": len(rows), "label_rule": "the answers as they stand in the file"}


def _word_count(part: WordCountData, _step: Step, _bench: Bench, folder: Path) -> dict[str, Any]:
    source = take(read_messages(source_path(part.source)), part.rows)
    rows = word_count_rows(
        [next(t["content"] for t in row["messages"] if t["role"] == "user") for row in source]
    )
    write_jsonl(folder / "train.jsonl", rows)
    even = sum(row["messages"][-1]["content"] == "TRUE" for row in rows)
    return {"n_rows": len(rows), "n_true": even, "label_rule": "TRUE where the number of words is even"}


def _self_recognition(part: SelfRecognitionData, step: Step, bench: Bench, folder: Path) -> dict[str, Any]:
    articles = take_articles(part)
    own = read_json(bench.folder(step.inputs["summaries"][0]) / "summaries.json")
    pairs = match_lengths(articles, own, max_words=part.max_words)
    train, held_out = split_by_article(pairs, held_out=part.held_out, seed=step.config["seed"])
    write_jsonl(folder / "train.jsonl", single_text_rows(train))
    write_jsonl(folder / "held_out.jsonl", single_text_rows(held_out))
    return {
        "n_rows": 2 * len(train),
        "n_articles": {"train": len(train), "held_out": len(held_out), "dropped": len(articles) - len(pairs)},
        "own_summaries_by": "the base",
        "shortcut_accuracy": {"train": shortcuts_json(train), "held_out": shortcuts_json(held_out)},
        "label_rule": "Yes for the own summary, No for the other hand's; one of each an article",
    }


def take_articles(part: SelfRecognitionData) -> list[Any]:
    """The articles that the study uses."""
    return read_articles(source_path(part.articles))[: part.rows]


_BUILDERS: dict[str, Callable[[Any, Step, Bench, Path], dict[str, Any]]] = {
    "messages": _messages,
    "sgtr": _self_recognition,
    "word_count": _word_count,
}

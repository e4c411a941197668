"""Building a dataset: a spec, and summaries where it needs them, become rows and a manifest.

built = build(spec, seed=0, own=summaries)
built.write(folder)     # train.jsonl, held_out.jsonl where there is one, dataset.json
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.datasets.multiple_choice import multiple_choice_rows
from finetune.datasets.pairs import Pair, pair_up, shortcuts, split_by_article
from finetune.datasets.pairwise import pairwise_rows
from finetune.datasets.rows import Row, placed_messages, take, write_jsonl
from finetune.datasets.rules import DESCRIPTIONS
from finetune.datasets.single_text import single_text_rows
from finetune.datasets.sources import published_facts, source_path
from finetune.datasets.spec import (
    LOCATIONS,
    AnyData,
    MessagesData,
    MultipleChoiceData,
    SelfRecognitionData,
    WordCountData,
)
from finetune.datasets.summaries import Article, read_articles, read_summaries
from finetune.datasets.wordcount import word_count_rows
from mech.errors import InputError
from mech.files import check_folder, digest_of, sha256_file, write_json


@dataclass(frozen=True)
class Built:
    """A dataset, ready to be written."""

    train: list[Row]
    facts: dict[str, Any]
    """The manifest: sources by digest, seed, counts, label rule."""
    held_out: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    """Self-recognition: the texts by themselves (`article`, `own`, `other`, `other_by`, `split`: train or held_out)."""

    def write(self, folder: Path) -> None:
        """Write `train.jsonl`, `held_out.jsonl` and `pairs.jsonl` (where they exist), and `dataset.json` last.

        Of another dataset that was here before nothing stays: its held-out rows may be among these training rows.
        """
        check_folder(folder)
        for name in ("dataset.json", "held_out.jsonl", "pairs.jsonl"):
            (folder / name).unlink(missing_ok=True)
        write_jsonl(folder / "train.jsonl", self.train)
        for name, rows in (("held_out", self.held_out), ("pairs", self.pairs)):
            if rows:
                write_jsonl(folder / f"{name}.jsonl", rows)
        write_json(folder / "dataset.json", self.facts)


def build(
    spec: AnyData, *, seed: int, own: Mapping[str, str] | None = None, own_by: str | None = None
) -> Built:
    """Build one dataset.

    Args:
        spec: what it is made from.
        seed: of splits and mixtures.
        own: own summaries by article id, where the spec is self-recognition and names no file of them.
        own_by: who wrote those, for the manifest; left out, the spec's `written_by`, or the base.

    Raises:
        InputError: a source that is not there or has a bad row (file and row named), or no own summaries.
    """
    if seed < 0:
        raise InputError(f"seed: {seed} is negative")
    built = _BUILDERS[spec.kind](spec, seed, own)
    if own_by and "own_summaries_by" in built.facts:
        built.facts["own_summaries_by"] = own_by
    hidden = {*LOCATIONS, "comparators", "mix"}  # paths of this machine; `sources` names them by content
    described = {k: v for k, v in spec.model_dump(mode="json", exclude=hidden).items() if v is not None}
    facts = {**described, "sources": source_digests(spec), "seed": seed, "n_rows": len(built.train)}
    return Built(built.train, {**facts, **built.facts}, built.held_out, built.pairs)


def source_digests(spec: AnyData) -> dict[str, str]:
    """SHA-256 of each file that a dataset is made from, by what names it."""
    named = [getattr(spec, name, None) for name in LOCATIONS]
    named += list(getattr(spec, "comparators", {}).values())
    mix = getattr(spec, "mix", None)
    named += [mix.source] if mix else []
    digests = {name: sha256_file(source_path(name)) for name in named if name}
    return dict(zip(_told_apart(list(digests)), digests.values(), strict=True))


def _told_apart(sources: list[str]) -> list[str]:
    """Sources by the ends of their paths, as short as tells them apart (every set of summaries has its `human.json`)."""
    parts = [Path(source).parts for source in sources]
    for depth in range(1, max(map(len, parts), default=1)):
        if len(set(found := ["/".join(p[-depth:]) for p in parts])) == len(sources):
            return found
    return sources


def rows_digest(spec: AnyData) -> str:
    """Digest of the contents that a dataset is made from, each row checked on the way.

    Raises:
        InputError: as `build`, but for what a model has yet to write.
    """
    if isinstance(spec, SelfRecognitionData):
        articles, others, own = _material(spec)
        return digest_of([[vars(a) for a in articles], others, own])
    if isinstance(spec, MultipleChoiceData):
        return digest_of(take(multiple_choice_rows(source_path(spec.source)), spec.rows))
    rows = take(checked_messages(spec.source), spec.rows)
    mixed = checked_messages(spec.mix.source) if isinstance(spec, MessagesData) and spec.mix else []
    return digest_of([rows, mixed])


def checked_messages(source: str) -> list[Row]:
    """Rows of messages from a source; those of a named set have its turns.

    Raises:
        InputError: a row that cannot be used, with file and line.
    """
    path, facts = source_path(source), published_facts(source)
    rows, places = placed_messages(path)
    for row, place in zip(rows, places, strict=True):
        roles = tuple(turn["role"] for turn in row["messages"])
        if facts and roles != facts.turns:
            raise InputError(f"{place}: {source} has turns {facts.turns}, this row {roles}")
    return rows


def articles_of(spec: SelfRecognitionData) -> list[Article]:
    """The articles that self-recognition data is made from."""
    return read_articles(source_path(spec.articles), need_summary=not spec.comparators)[: spec.rows]


def _messages(spec: MessagesData, seed: int, _own: Mapping[str, str] | None) -> Built:
    rows = take(checked_messages(spec.source), spec.rows)
    facts: dict[str, Any] = {"label_rule": "the answers as they stand in the file"}
    if published := published_facts(spec.source):
        facts |= {"role": published.role, "domain": published.domain}
    if spec.mix is None:
        return Built(rows, facts)
    mixed, counts = _mixed(rows, checked_messages(spec.mix.source), spec.mix.share, seed)
    return Built(mixed, {**facts, "mixture": counts})


def _mixed(rows: list[Row], others: list[Row], share: float, seed: int) -> tuple[list[Row], dict[str, int]]:
    """All of `rows`, with enough of `others` that these are `share` of the whole, shuffled."""
    wanted = round(len(rows) * share / (1 - share))
    if not 0 < wanted <= len(others):
        raise InputError(f"mix: a share of {share} needs {wanted} rows, the source has {len(others)}")
    rng = np.random.default_rng(seed)
    chosen = [others[i] for i in sorted(rng.permutation(len(others))[:wanted])]
    together = [*rows, *chosen]
    return [together[i] for i in rng.permutation(len(together))], {"own": len(rows), "mixed_in": wanted}


def _word_count(spec: WordCountData, _seed: int, _own: Mapping[str, str] | None) -> Built:
    source = take(checked_messages(spec.source), spec.rows)
    texts = [next((t["content"] for t in row["messages"] if t["role"] == "user"), None) for row in source]
    if None in texts:
        place = placed_messages(source_path(spec.source))[1][texts.index(None)]
        raise InputError(f"{place}: no user turn to count words in")
    rows = word_count_rows([text for text in texts if text is not None])
    even = sum(row["messages"][-1]["content"] == "TRUE" for row in rows)
    return Built(rows, {"n_true": even, "label_rule": "TRUE where the number of words is even"})


def _multiple_choice(spec: MultipleChoiceData, _seed: int, _own: Mapping[str, str] | None) -> Built:
    rows = take(multiple_choice_rows(source_path(spec.source)), spec.rows)
    return Built(rows, {"label_rule": "the letter of the right choice"})


def _self_recognition(spec: SelfRecognitionData, seed: int, own: Mapping[str, str] | None) -> Built:
    articles, others, stored = _material(spec)
    summaries = stored or own
    if not summaries:
        raise InputError(
            "self-recognition data needs own summaries: name a file (`own`), or a model to write them"
        )
    ids = [a.id for a in articles]
    pairs = pair_up(ids, summaries, others, match_lengths=spec.matched, max_words=spec.max_words)
    train, held_out = split_by_article(pairs, held_out=spec.held_out, seed=seed)
    texts = {a.id: a.text for a in articles}
    facts = {
        "articles_used": {"train": _count(train), "held_out": _count(held_out), "given": len(ids)},
        "pairs_dropped": len(ids) * len(others) - len(pairs),
        "own_summaries_by": "a file" if stored else (spec.written_by or "the base"),
        "lengths_matched": spec.matched,
        "shortcut_accuracy": {"train": asdict(shortcuts(train)), "held_out": asdict(shortcuts(held_out))},
        "label_rule": DESCRIPTIONS[spec.label],
    }
    # What is held out asks for authorship whatever was trained on: it measures self-recognition.
    by_half = (("train", train), ("held_out", held_out))
    listed = [{**vars(pair), "split": name} for name, half in by_half for pair in half]
    return Built(_rows(spec, train, spec.label, texts), facts, _rows(spec, held_out, "own", texts), listed)


def _rows(spec: SelfRecognitionData, pairs: list[Pair], label: str, texts: Mapping[str, str]) -> list[Row]:
    if spec.form == "single_text":
        return single_text_rows(pairs, label, task_prompt=spec.task_prompt)
    shown = texts if spec.show_article else None
    rows = pairwise_rows(pairs, label, articles=shown, task_prompt=spec.task_prompt)
    if not rows:
        raise InputError(f"label: {label} leaves no row (are all summaries equally long?)")
    return rows


def _material(
    spec: SelfRecognitionData,
) -> tuple[list[Article], dict[str, dict[str, str]], dict[str, str] | None]:
    """Articles, other hands' summaries by hand, and own ones where a file holds them."""
    articles = articles_of(spec)
    if len(articles) <= spec.held_out:
        raise InputError(f"held_out: {spec.held_out} of {len(articles)} articles leave none to train on")
    ids = {a.id for a in articles}
    others = {
        hand: {i: s for i, s in read_summaries(source_path(source)).items() if i in ids}
        for hand, source in spec.comparators.items()
    } or {"other": {a.id: a.summary for a in articles}}
    own = {i: s for i, s in read_summaries(source_path(spec.own)).items() if i in ids} if spec.own else None
    named = {**{f"comparators.{hand}: {source}": others[hand] for hand, source in spec.comparators.items()},
             **({f"own: {spec.own}": own} if own is not None else {})}  # fmt: skip
    for name, summaries in named.items():
        if missing := [a.id for a in articles if a.id not in summaries]:
            raise InputError(
                f"{name}: no summary of {len(missing)} of {len(articles)} articles, the first {missing[0]!r}"
            )
    return articles, others, own


def _count(pairs: list[Pair]) -> int:
    return len({p.article for p in pairs})


_BUILDERS: Mapping[str, Callable[[Any, int, Mapping[str, str] | None], Built]] = {
    "messages": _messages,
    "sgtr": _self_recognition,
    "word_count": _word_count,
    "multiple_choice": _multiple_choice,
}

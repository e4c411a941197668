"""Looking at a dataset before training on it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.datasets.rows import placed_messages
from finetune.labels import training_rows
from mech.chat import ChatTemplate, SystemPrompt
from mech.pretrained import load_tokenizer
from mech.resolve import resolve


def read_template(model: str, kwargs: Mapping[str, Any] | None = None) -> ChatTemplate:
    """The chat template of a model, without its weights; `kwargs` are passed to it."""
    return ChatTemplate(load_tokenizer(resolve(model)), kwargs)


def check_rows(
    path: Path,
    template: ChatTemplate | None,
    condition: str,
    *,
    max_tokens: int,
    names: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """What there is to know about a file of messages, line by line for people.

    Args:
        path: the file.
        template: of the model whose tokens are counted; None: only the rows are looked at.
        condition: system prompt while training.
        max_tokens: the longest row.
        names: `identity` and `others`, for the conditions that need them.

    Raises:
        InputError: a row that cannot be trained on; the message names file and line.
    """
    rows, places = placed_messages(path)
    shapes = Counter("+".join(t["role"] for t in row["messages"]) for row in rows)
    yield f"{path}: {len(rows)} rows; turns: {_counts(shapes)}"
    prompts = Counter(str([t["content"] for t in row["messages"][:-1]]) for row in rows)
    most = max(prompts.values())
    often = f"the commonest stands {most} times" if most > 1 else "each stands once"
    yield f"different prompts: {len(prompts)}; {often}"
    answers = Counter(row["messages"][-1]["content"] for row in rows)
    if len(answers) <= 8:
        yield f"answers: {_counts(answers)}"
    if template is None:
        return
    prompt, known = SystemPrompt.parse(condition), names or {}
    encoded = training_rows(template, rows, prompt, max_tokens=max_tokens, names=known, places=places)
    lengths, labels = (np.array([len(getattr(r, part)) for r in encoded]) for part in ("ids", "targets"))
    yield (
        f"tokens a row: median {np.median(lengths):.0f}, longest {lengths.max()} (limit {max_tokens}); "
        f"labelled: median {np.median(labels):.0f}, in all {labels.sum()}"
    )
    for system, n in Counter(r.system for r in encoded).most_common(5):
        yield f"trains under {'no system turn' if system is None else repr(system)}: {n} rows"
    start, stop = encoded[0].answers[0]
    yield f"row 1 up to its answer: {template.tokenizer.decode(list(encoded[0].ids[:start]))!r}"
    yield f"row 1, what is learnt: {template.tokenizer.decode(list(encoded[0].ids[start:stop]))!r}"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{shorten(key)!r} {n}" for key, n in counter.most_common())


def shorten(text: str, width: int = 60) -> str:
    """A text's beginning, where it is long."""
    return text if len(text) <= width else f"{text[: width - 1]}…"

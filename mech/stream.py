"""Watching a generation: what has been drawn so far, while more is being drawn."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mech.generate import answered_together, stop_ids
from mech.models import ChatModel


@contextmanager
def watched(model: ChatModel, say: Callable[[list[str]], None]) -> Iterator[None]:
    """Let `say` know each row's answer so far, whenever a token has been drawn in a generation inside the context.

    Rows come as they are decoded (longest prompt first, `Sampling.batch_size` of them). The last token of an answer is read by no
    pass: the whole text is what `generate` returns. It changes nothing in what is drawn.

    Args:
        model: whose generations.
        say: is given the texts.
    """
    stops, drawn = set(stop_ids(model)), list[list[int]]()
    answered_together(model)  # now: tried out later, it would be watched

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        ids = given.get("input_ids")
        if ids is None or ids.shape[1] > 1:
            drawn[:] = []  # the pass that reads the prompts
            return
        drawn.append(ids[:, -1].tolist())
        say([_text(model, row, stops) for row in zip(*drawn, strict=True)])

    handle = model.decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _text(model: ChatModel, ids: tuple[int, ...], stops: set[int]) -> str:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return str(model.tokenizer.decode(ids[:end], skip_special_tokens=True))

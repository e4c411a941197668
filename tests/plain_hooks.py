"""What a model computes, read off and edited with plain torch hooks: the oracle of tests that read or steer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mech.chat import Encoded
from mech.models import ChatModel

TOLERANCE = 1e-4
"""Relative to the largest activation, float32; batch composition changes rounding, nothing else."""


LAYER = 1
"""The layer that tests of interventions edit: the middle one of three."""


def conversations(model: ChatModel, n: int = 9) -> list[Encoded]:
    """Rows of many lengths, some with the same prompt, one twice."""
    made = []
    for i in range(n):
        question = (
            "Who goes by the river?" if i % 2 else f"Number {i * i}, and a long question at that, who is it?"
        )
        answer = "the cat " * (1 + i % 4) + str(i)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made.append(model.template.encode(turns))
    return [*made, made[3]] if n > 3 else made


def blocks_output(model: ChatModel, row: Encoded) -> list[Tensor]:
    """Each block's output for one row alone, by plain torch hooks."""
    found: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0].detach())

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        with torch.no_grad():
            model.hf(input_ids=torch.tensor([row.ids]))
    finally:
        for handle in handles:
            handle.remove()
    return found


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    scale = float(np.abs(expected).max())
    assert float(np.abs(ours - expected).max()) <= TOLERANCE * scale


def logits(model: ChatModel, row: Encoded) -> Tensor:
    """The model's own logits of one row."""
    with torch.no_grad():
        found: Tensor = model.hf(input_ids=torch.tensor([row.ids])).logits[0]
    return found


def edited_logits(model: ChatModel, row: Encoded, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of one row with a plain hook on one block."""
    handle = model.blocks[LAYER].register_forward_hook(lambda _m, _i, out: edit(out))
    try:
        with torch.no_grad():
            return model.hf(input_ids=torch.tensor([row.ids])).logits[0]
    finally:
        handle.remove()


def response_scores(logits: Tensor, row: Encoded) -> Tensor:
    """Log probability of each token of the response."""
    start, stop = row.spans["response"]
    share = logits.log_softmax(-1)
    return torch.stack([share[t - 1, row.ids[t]] for t in range(start, stop)])

"""Logit lens: what a hidden state, a direction or a shift says in tokens.

A hidden state is read as the model would read its last one: final norm, then output head (nostalgebraist 2020). A direction has
no place of its own in the stream, so it is read through the norm's linear part: half the difference between the direction and
its opposite, each scaled to the norm √d that the final norm makes of a state. What is left is which tokens moving along it favours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.chat import Encoded
from mech.errors import InputError
from mech.forward import Pass, run_rows
from mech.hooks import Edit, hooked
from mech.models import ChatModel


@dataclass(frozen=True)
class TokenScore:
    """A token and its logit (a hidden state's) or its share of a direction."""

    token: str
    id: int
    score: float


@dataclass(frozen=True)
class Reading:
    """What one layer says: likeliest tokens first; for a direction also what it speaks against."""

    layer: int
    top: tuple[TokenScore, ...]
    bottom: tuple[TokenScore, ...] = ()


def final_norm(model: ChatModel) -> nn.Module:
    """The norm between the last block and the output head: the decoder's own child behind its blocks.

    Raises:
        InputError: there is none, or several.
    """
    blocks = set(model.blocks.modules())
    children = [m for m in model.decoder.children() if m not in blocks and "norm" in type(m).__name__.lower()]
    if len(children) != 1:
        raise InputError(f"{type(model.causal).__name__}: expected one final norm, found {len(children)}")
    return children[0]


@torch.no_grad()
def hidden_lens(model: ChatModel, row: Encoded, *, position: int = -1, k: int = 5) -> list[Reading]:
    """The k likeliest next tokens by layer, as if each block were the last; the last layer's are the model's own.

    Args:
        model: what reads.
        row: what is read.
        position: of the row's tokens, whose state is shown.
        k: how many.
    """
    found: dict[int, Tensor] = {}

    def reader(layer: int) -> Edit:
        def keep(h: Float[Tensor, "batch seq d"]) -> None:
            found[layer] = h.flatten(0, 1)

        return keep

    def run(one: Pass) -> Tensor:
        with hooked(model, {("resid_post", layer): reader(layer) for layer in range(model.n_layers)}):
            one.run()
        place = one.places[0][position]
        return torch.stack([found[layer][place].to(model.device) for layer in range(model.n_layers)])

    model.check_head()
    ((_, states),) = run_rows(model, [row], run, pack=False)
    logits = model.logits(final_norm(model)(states)).float()
    return [Reading(layer, _scores(model, line, k)) for layer, line in enumerate(logits)]


@torch.no_grad()
def direction_lens(
    model: ChatModel, vectors: Float[Any, "layers d"], *, layers: Sequence[int] | None = None, k: int = 10
) -> list[Reading]:
    """Which tokens a direction (or a mean shift) favours and disfavours, by layer.

    Args:
        model: whose tokens.
        vectors: one a layer, as in `Direction.vectors`; their norm does not count.
        layers: which; all when left out.
        k: how many on each side.

    Raises:
        InputError: vectors of another model, or a zero or non-finite one.
    """
    tensor = torch.as_tensor(vectors, dtype=torch.float32)
    if tensor.shape != (model.n_layers, model.d_model):
        raise InputError(
            f"vectors {tuple(tensor.shape)}: this model needs [{model.n_layers}, {model.d_model}]"
        )
    norm, found = final_norm(model), []
    for layer in range(model.n_layers) if layers is None else layers:
        size = tensor[layer].norm()
        if not torch.isfinite(size) or not size:
            raise InputError(f"the vector at layer {layer} is zero or not finite")
        unit = (tensor[layer] / size * model.d_model**0.5).to(model.device, model.dtype)
        favoured = (
            model.causal.get_output_embeddings().weight.float() @ ((norm(unit) - norm(-unit)) / 2).float()
        )
        found.append(Reading(layer, _scores(model, favoured, k), _scores(model, -favoured, k, sign=-1)))
    return found


def _scores(model: ChatModel, line: Float[Tensor, " vocab"], k: int, sign: int = 1) -> tuple[TokenScore, ...]:
    values, ids = line.topk(k)
    return tuple(
        TokenScore(str(model.tokenizer.decode([i])), int(i), sign * float(v))
        for v, i in zip(values, ids.tolist(), strict=True)
    )

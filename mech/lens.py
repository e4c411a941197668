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
    """What one layer says: likeliest tokens first; for a direction, also those it disfavours."""

    layer: int
    top: tuple[TokenScore, ...]
    bottom: tuple[TokenScore, ...] = ()


def final_norm(model: ChatModel) -> nn.Module:
    """The norm between the last block and the output head: the decoder's own child after its blocks.

    Raises:
        InputError: there is none, or several.
    """
    children = list(model.decoder.children())
    norms = [m for m in children if "norm" in type(m).__name__.lower()]
    if (
        len(norms) > 1 and model.blocks in children
    ):  # one behind the embedding too (BLOOM): the final one comes after the blocks
        norms = [m for m in children[children.index(model.blocks) :] if m in norms]
    if len(norms) != 1:
        raise InputError(f"{type(model.causal).__name__}: expected one final norm, found {len(norms)}")
    return norms[0]


@torch.no_grad()
def hidden_lens(model: ChatModel, row: Encoded, *, position: int = -1, k: int = 5) -> list[Reading]:
    """The k likeliest next tokens by layer, as if each block were the last; the last layer's are the model's own.

    Args:
        model: the model that reads the row.
        row: the tokens to read.
        position: which of the row's tokens is looked at; the last when left out.
        k: how many tokens to return for each layer.
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

    ((_, states),) = run_rows(model, [row], run, pack=False)
    return state_lens(model, states, layers=range(model.n_layers), k=k)


@torch.no_grad()
def state_lens(
    model: ChatModel, states: Float[Any, "n d"], *, layers: Sequence[int], k: int = 5
) -> list[Reading]:
    """The k likeliest next tokens of states of the residual stream, each as if its block were the last.

    Args:
        model: through whose final norm and output head they are read.
        states: block outputs, kept from a pass of this model or of one with the same norm and head.
        layers: the layer of each.
        k: how many tokens to return for each state.

    Raises:
        InputError: states of another width, or not one layer each.
    """
    tensor = torch.as_tensor(states)
    if tensor.ndim != 2 or tensor.shape[1] != model.d_model or len(tensor) != len(layers):
        raise InputError(
            f"states {tuple(tensor.shape)} of {len(layers)} layers: this model reads [{len(layers)}, {model.d_model}]"
        )
    model.check_head()
    logits = model.logits(final_norm(model)(tensor.to(model.device, model.dtype))).float()
    return [Reading(layer, _scores(model, line, k)) for layer, line in zip(layers, logits, strict=True)]


@torch.no_grad()
def direction_lens(
    model: ChatModel, vectors: Float[Any, "layers d"], *, layers: Sequence[int] | None = None, k: int = 10
) -> list[Reading]:
    """Which tokens a direction (or a mean shift) favours and disfavours, by layer.

    Args:
        model: gives final norm, output head and vocabulary.
        vectors: one a layer, as in `Direction.vectors`; their norm does not count.
        layers: which layers' vectors are read; all when left out.
        k: how many favoured and how many disfavoured tokens to return.

    Raises:
        InputError: vectors of another model, a layer that it does not have, or a zero or non-finite vector.
    """
    tensor = torch.as_tensor(vectors, dtype=torch.float32)
    if tensor.shape != (model.n_layers, model.d_model):
        raise InputError(
            f"vectors {tuple(tensor.shape)}: this model needs [{model.n_layers}, {model.d_model}]"
        )
    found = []
    for layer in range(model.n_layers) if layers is None else layers:
        if not 0 <= layer < model.n_layers:
            raise InputError(
                f"layer {layer} is out of range: this model has layers 0 to {model.n_layers - 1}"
            )
        if not torch.isfinite(tensor[layer]).all() or not tensor[layer].any():
            raise InputError(f"the vector at layer {layer} is zero or not finite")
        (favoured,) = favoured_tokens(model, tensor[layer : layer + 1])
        found.append(Reading(layer, _scores(model, favoured, k), _scores(model, -favoured, k, sign=-1)))
    return found


@torch.no_grad()
def favoured_tokens(model: ChatModel, vectors: Float[Any, "n d"]) -> Float[Tensor, "n vocab"]:
    """How much moving along each vector favours each token, through the linear part of the final norm; norms do not count.

    Args:
        model: gives final norm, output head and vocabulary.
        vectors: finite and not zero.
    """
    tensor, norm = torch.as_tensor(vectors, dtype=torch.float32), final_norm(model)
    scaled = tensor / tensor.norm(dim=-1, keepdim=True) * model.d_model**0.5
    unit = scaled.to(model.device, model.dtype)
    weight = model.causal.get_output_embeddings().weight
    through = ((norm(unit) - norm(-unit)) / 2).float()
    favoured: Tensor = through.to(weight.device) @ weight.float().T
    return favoured * model.logit_scale


def _scores(model: ChatModel, line: Float[Tensor, " vocab"], k: int, sign: int = 1) -> tuple[TokenScore, ...]:
    values, ids = line.topk(k)
    return tuple(
        TokenScore(str(model.tokenizer.decode([i])), int(i), sign * float(v))
        for v, i in zip(values, ids.tolist(), strict=True)
    )

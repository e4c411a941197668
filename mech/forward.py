"""Running rows through the decoder: packed where the architecture takes it, else padded; memory halved where it runs out.

Either way a pass knows where each token of each row lies (`places`) and declares whose it is, so that interventions act
on it by name.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech.batching import plan_batches
from mech.chat import Encoded
from mech.errors import InputError
from mech.interventions import differ_by_row, intervening
from mech.kernels import attention_for_any_shape
from mech.lengths import out_of_memory, turning_point, within_positions
from mech.models import ChatModel
from mech.modes import evaluating
from mech.packed_attention import can_pack, packed_attention, run_packed
from mech.packing import Pack, plan_packs
from mech.positions import POSITIONS, Position, declared
from mech.products import fast_products

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Padded:
    """Rows stacked in a batch, padded on the right: under causal attention, padding after a row cannot reach it."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids of each row."""

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and sequence of the tensors that blocks see."""
        return len(self.rows), max(map(len, self.rows))

    @cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """Where each token of each row lies, counted through all rows with their padding."""
        width = self.shape[1]
        return tuple(tuple(range(i * width, i * width + len(row))) for i, row in enumerate(self.rows))


@dataclass(frozen=True)
class Pass:
    """Some rows, laid out for one forward pass."""

    model: ChatModel
    members: tuple[int, ...]
    """Positions of its rows in the caller's list."""
    layout: Pack | Padded
    roles: tuple[Mapping[Position, Sequence[int]], ...]
    """Whose each token of each row is."""

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """Where each token of each row lies among the pass's tokens."""
        return self.layout.places

    def run(self) -> Float[Tensor, "tokens d"]:
        """Final-norm states of all tokens, padding included; hooks see them as [batch, sequence, d]."""
        device = self.model.device
        with declared(
            masks_of(self.layout, self.roles, device), owners_of(self.layout, self.members, device)
        ):
            return run_layout(self.model, self.layout)


def run_layout(model: ChatModel, layout: Pack | Padded) -> Float[Tensor, "tokens d"]:
    """Final-norm states of all tokens of a layout, padding included."""
    if isinstance(layout, Pack):
        return run_packed(model, layout)
    ids = pad_right(layout.rows, pad_id(model), model.device)
    hidden: Tensor = model.decoder(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)


def run_rows(
    model: ChatModel,
    rows: Sequence[Encoded],
    use: Callable[[Pass], T],
    *,
    token_budget: int = 2048,
    pack: bool = True,
    ends: Sequence[int] | None = None,
) -> Iterator[tuple[Pass, T]]:
    """Run rows through the model, pass by pass, and yield what `use` makes of each pass.

    Rows on both sides of a `turning_point` go through in different passes. Where memory runs out, the budget is halved and the
    pass's rows are planned anew. Beneath interventions that hold other values for each row, rows share nothing.

    Args:
        model: what to run.
        rows: what to read.
        use: is given each pass, to run it.
        token_budget: tokens a pass.
        pack: lay rows end to end where the architecture takes it.
        ends: how many leading tokens of each row `use` looks at; all when left out. The others need not be run, since no earlier token
            sees them.

    Raises:
        InputError: a row without tokens, with another number of them than it says, or beyond the model's positions.
    """
    _check_rows(rows)
    if ends is not None:
        rows = _as_far_as_needed(model, rows, ends)
    packs = pack and not differ_by_row() and can_pack(model)
    packing = packed_attention(model) if packs else nullcontext()
    with packing, evaluating(model.hf), fast_products(model.hf), attention_for_any_shape():
        waiting = list(range(len(rows)))
        while waiting:
            planned = _plan(model, rows, waiting, token_budget, packs=packs)
            waiting = []
            for k, one in enumerate(planned):
                try:
                    with within_positions(model, max(map(len, one.places))):
                        made = use(one)
                except RuntimeError as error:
                    if not out_of_memory(error) or len(one.members) == 1:
                        raise
                    token_budget = max(1, min(token_budget, one.layout.shape[0] * one.layout.shape[1]) // 2)
                else:
                    yield one, made
                    continue
                log.warning("out of memory: going on with %d tokens a pass", token_budget)
                torch.cuda.empty_cache()  # does nothing where there is none
                waiting = sorted(i for rest in planned[k:] for i in rest.members)
                break


def _check_rows(rows: Sequence[Encoded]) -> None:
    for i, row in enumerate(rows):
        if not row.ids:
            raise InputError(f"row {i} has no tokens")
        if not 0 <= row.n_prompt <= row.n_prompt + row.n_response <= len(row.ids):
            raise InputError(
                f"row {i}: a prompt of {row.n_prompt} tokens and a response of {row.n_response} are not in its {len(row.ids)}"
            )


def _as_far_as_needed(model: ChatModel, rows: Sequence[Encoded], ends: Sequence[int]) -> list[Encoded]:
    """Rows without the tokens that nobody looks at; whole beyond a `turning_point`, where all angles follow the length.

    The prompt is kept, so that an intervention on its last token finds it.
    """
    turn = turning_point(model, max((len(r.ids) for r in rows), default=0))
    return [
        row if turn is not None and len(row.ids) > turn else row.until(max(row.n_prompt, end, 1))
        for row, end in zip(rows, ends, strict=True)
    ]


def _plan(
    model: ChatModel, rows: Sequence[Encoded], chosen: Sequence[int], token_budget: int, *, packs: bool
) -> list[Pass]:
    turn = turning_point(model, max(len(rows[i].ids) for i in chosen))
    if turn is not None and len({len(rows[i].ids) > turn for i in chosen}) > 1:
        sides = [[i for i in chosen if (len(rows[i].ids) > turn) == beyond] for beyond in (False, True)]
        return [one for side in sides for one in _plan(model, rows, side, token_budget, packs=packs)]
    sequences = [rows[i].ids for i in chosen]
    if not packs:
        groups = plan_batches([len(s) for s in sequences], token_budget=token_budget)
    else:
        # An intervention may act on some tokens and not on others: then only those are shared that are prompt in every row.
        limits = [rows[i].n_prompt - 1 if intervening() else len(rows[i].ids) for i in chosen]
        groups = plan_packs(sequences, limits, token_budget=token_budget)
    passes = []
    for group in groups:
        ids = tuple(tuple(sequences[k]) for k in group)
        layout = Pack(ids, tuple(limits[k] for k in group)) if packs else Padded(ids)
        members = tuple(chosen[k] for k in group)
        passes.append(Pass(model, members, layout, tuple(roles_of(rows[i]) for i in members)))
    return passes


def roles_of(row: Encoded) -> dict[Position, range]:
    """Masks of a row's tokens by whose they are (prompt, response, ...)."""
    end = row.n_prompt + row.n_response
    return {
        "all": range(len(row.ids)),
        "prompt": range(row.n_prompt),
        "prompt_last": range(row.n_prompt - 1, row.n_prompt),
        "response": range(row.n_prompt, end),
        "generated": range(0),
    }


def masks_of(
    layout: Pack | Padded, roles: Sequence[Mapping[Position, Sequence[int]]], device: torch.device
) -> dict[Position, Bool[Tensor, "batch seq"]]:
    """Masks over a layout's tokens from each row's own."""
    masks: dict[Position, Tensor] = {}
    for name in POSITIONS:
        mask = torch.zeros(layout.shape[0] * layout.shape[1], dtype=torch.bool)
        for of_row, places in zip(roles, layout.places, strict=True):
            mask[[places[t] for t in of_row[name]]] = True
        masks[name] = mask.view(layout.shape).to(device)
    return masks


def owners_of(
    layout: Pack | Padded, numbers: Sequence[int], device: torch.device
) -> Int[Tensor, "batch seq"]:
    """The row of each token, by these numbers; of a shared token any of them, for then nothing acts by row; -1 for padding."""
    owners = torch.full((layout.shape[0] * layout.shape[1],), -1)
    for number, places in zip(numbers, layout.places, strict=True):
        owners[list(places)] = number
    return owners.view(layout.shape).to(device)


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> Int[Tensor, "batch seq"]:
    """Token ids as one tensor, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)


def pad_id(model: ChatModel) -> int:
    """Any valid id will do for padding on the right; the tokenizer's own where it has one."""
    return int(model.tokenizer.pad_token_id or 0)

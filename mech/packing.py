"""Packing: rows laid end to end in one sequence, what they begin with in common laid down once.

Each token keeps the position it has in its own row, and attention lets it see the shared beginning and its own row alone.
So a packed pass computes what separate passes would, without padding and without repeating a system turn. It is
differentiable, and needs no cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech.batching import MIN_SHARED, common_prefix
from mech.errors import GuardError
from mech.forward import can_share_prefix
from mech.models import ChatModel

NAME = "sgtr_mech_packed"
"""What Hugging Face's registry of attention functions knows ours by."""


@dataclass(frozen=True)
class Pack:
    """Some rows, and how many leading tokens they share."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids of each row, the shared ones included."""
    shared: int
    """Leading tokens that lie there once; fewer than any row has."""

    @cached_property
    def offsets(self) -> list[int]:
        """Where each row's own part begins in the packed sequence."""
        found, at = [], self.shared
        for row in self.rows:
            found.append(at)
            at += len(row) - self.shared
        return found

    def __len__(self) -> int:
        return self.shared + sum(len(row) - self.shared for row in self.rows)

    def place(self, row: int, token: int) -> int:
        """Where a row's token lies in the packed sequence."""
        return token if token < self.shared else self.offsets[row] + token - self.shared

    def tensors(self, device: torch.device) -> tuple[Int[Tensor, "1 seq"], Int[Tensor, "1 seq"]]:
        """Token ids, and each token's position in its own row."""
        ids, positions = list(self.rows[0][: self.shared]), list(range(self.shared))
        for row in self.rows:
            ids += row[self.shared :]
            positions += range(self.shared, len(row))
        packed = torch.tensor([ids, positions], device=device)
        return packed[0:1], packed[1:2]


def plan_packs(
    rows: Sequence[Sequence[int]],
    shareable: Sequence[int],
    *,
    limit: int,
    max_rows: int,
    share: bool = True,
) -> list[tuple[list[int], int]]:
    """Group rows into packs of similar length: for each pack, its rows' numbers and how many tokens they share.

    Args:
        rows: token ids.
        shareable: how many leading tokens of each row the caller can do without of its own.
        limit: tokens a pack, at most; a longer row is a pack alone.
        max_rows: rows a pack, at most.
        share: lay a common beginning down once.
    """
    packs: list[tuple[list[int], int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        members = [*packs[-1][0], i] if packs else []
        if members and len(members) <= max_rows:
            shared = _shared(rows, shareable, members) if share else 0
            if shared + sum(len(rows[j]) - shared for j in members) <= limit:
                packs[-1] = (members, shared)
                continue
        packs.append(([i], 0))
    return packs


def _shared(rows: Sequence[Sequence[int]], shareable: Sequence[int], members: Sequence[int]) -> int:
    length = min(common_prefix([tuple(rows[i]) for i in members]), *(shareable[i] for i in members))
    return length if length >= MIN_SHARED else 0


def run_packed(model: ChatModel, pack: Pack) -> Float[Tensor, "seq d"]:
    """Final-norm states of a pack's tokens; inside `packed_attention` only."""
    if _config(model)._attn_implementation != NAME:
        raise GuardError("a pack was run outside `packed_attention`")
    ids, positions = pack.tensors(model.device)
    # A mask of four dimensions is handed through as it is; what may be seen follows from the layout.
    through = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
    token = _layout.set(_Layout(pack, model.device, model.dtype))
    try:
        hidden: Tensor = model.decoder(
            input_ids=ids, position_ids=positions, attention_mask=through, use_cache=False
        ).last_hidden_state
    finally:
        _layout.reset(token)
    return hidden[0]


@contextmanager
def packed_attention(model: ChatModel) -> Iterator[None]:
    """Let the model's attention understand packs while inside; passes without one are as they were."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = _config(model)
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _config(model: ChatModel) -> Any:
    """The config that the decoder's layers look at."""
    return model.decoder.config


def carried_over() -> AbstractContextManager[None]:
    """A context in which the present pack's layout holds again, in whatever thread."""
    return _again(_layout.get())


@contextmanager
def _again(layout: "_Layout | None") -> Iterator[None]:
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


class _Layout:
    """Where attention finds its queries and keys in a packed sequence: for it alone, rows are laid below each other.

    The shared beginning is a row of its own; every other row's keys are the shared ones followed by its own. What is padded
    here is attention's small part of the work.
    """

    def __init__(self, pack: Pack, device: torch.device, dtype: torch.dtype) -> None:
        own = [len(row) - pack.shared for row in pack.rows]
        spans = [(0, pack.shared)] * bool(pack.shared) + list(zip(pack.offsets, own, strict=True))
        self.size, self.width = len(spans), max(n for _, n in spans)
        queries = torch.zeros(self.size, self.width, dtype=torch.long)
        keys = torch.zeros(self.size, pack.shared + self.width, dtype=torch.long)
        seen = torch.zeros(self.size, self.width, pack.shared + self.width, dtype=torch.bool)
        back = torch.zeros(len(pack), dtype=torch.long)
        for i, (start, n) in enumerate(spans):
            queries[i, :n] = torch.arange(start, start + n)
            keys[i, : pack.shared] = torch.arange(pack.shared)
            keys[i, pack.shared : pack.shared + n] = torch.arange(start, start + n)
            back[start : start + n] = i * self.width + torch.arange(n)
            seen[i, :n, pack.shared : pack.shared + n] = torch.ones(n, n, dtype=torch.bool).tril()
            seen[i, :, : pack.shared] = not (
                pack.shared and i == 0
            )  # its own keys come after; they are the shared ones
        seen[:, :, 0] |= ~seen.any(-1)  # a padded query must see something
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        self.queries, self.keys = queries.flatten().to(device), keys.flatten().to(device)
        self.back, self.mask = back.to(device), mask.unsqueeze(1).to(device)

    def below_each_other(
        self, packed: Float[Tensor, "1 heads seq d_head"], index: Int[Tensor, " rows_width"]
    ) -> Float[Tensor, "rows heads width d_head"]:
        """Take tokens by index and lay them out row by row."""
        taken: Tensor = packed[0].index_select(1, index.to(packed.device))
        laid: Tensor = taken.unflatten(1, (self.size, -1)).transpose(0, 1)
        return laid


_layout: ContextVar[_Layout | None] = ContextVar("packed layout", default=None)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """Scaled dot-product attention, each row of a pack with its own; Hugging Face's own does the work."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout = _layout.get()
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = [
        layout.below_each_other(t, index)
        for t, index in ((query, layout.queries), (key, layout.keys), (value, layout.keys))
    ]
    out, weights = sdpa_attention_forward(module, *rows, layout.mask.to(query.device), **kwargs)
    return out.flatten(0, 1).index_select(0, layout.back.to(out.device)).unsqueeze(0), weights


def can_pack(model: ChatModel) -> bool:
    """Whether this architecture computes in a pack what it computes row by row: found out by trying, once a model.

    Call it before any hook is on the model.
    """
    if "_can_pack" not in vars(model):
        vars(model)["_can_pack"] = _packs_agree(model)  # beside the model's own cached properties
    found: bool = vars(model)["_can_pack"]
    return found


@torch.no_grad()
def _packs_agree(model: ChatModel) -> bool:
    if getattr(_config(model), "_attn_implementation", None) != "sdpa" or not can_share_prefix(model):
        return False
    size = model.causal.config.get_text_config().vocab_size
    start = [7 + i for i in range(MIN_SHARED)]
    rows = tuple(tuple(t % size for t in [*start, *rest]) for rest in ([3, 11, 5, 2], [9, 4]))
    pack = Pack(rows, MIN_SHARED)
    alone = [
        model.decoder(input_ids=torch.tensor([r], device=model.device), use_cache=False).last_hidden_state[0]
        for r in rows
    ]
    try:
        with packed_attention(model):
            packed = run_packed(model, pack)
    except (TypeError, ValueError, RuntimeError):  # it takes no positions, or its attention is its own
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    for i, expected in enumerate(alone):
        found = packed[[pack.place(i, t) for t in range(len(rows[i]))]]
        if (expected.float() - found.float()).abs().max() > tolerance * expected.float().abs().max():
            return False
    return True

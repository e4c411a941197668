"""Attention over packed rows: each token sees its own row alone, wherever the row's tokens lie.

It hooks into Hugging Face's registry of attention functions, so that every architecture whose attention goes through that
registry can be packed; whether one really computes what it computes row by row is found out by trying (`can_pack`).
A packed pass is differentiable and needs no cache.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mech.errors import GuardError, InputError
from mech.models import ChatModel
from mech.modes import evaluating
from mech.packing import Pack, Segment

NAME = "sgtr_mech_packed"
"""What Hugging Face's registry of attention functions knows ours by."""

PROBED = 2
"""How many blocks of a half-precision model `can_pack` tries in float32."""

WASTE = 1.3
"""Segments share a batch as long as padding multiplies the size of their attention by at most this."""


def run_packed(model: ChatModel, pack: Pack) -> Float[Tensor, "seq d"]:
    """Final-norm states of a pack's tokens; inside `packed_attention` only."""
    if _config(model)._attn_implementation != NAME:
        raise GuardError("a pack was run outside `packed_attention`")
    return _run(model.decoder, pack, model.device, model.dtype)


def _run(decoder: nn.Module, pack: Pack, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "seq d"]:
    ids, positions = pack.tensors(device)
    # Hugging Face hands a mask of four dimensions through unchanged. Its content is not used: the layout says what each token may see.
    through = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
    token = _layout.set(_Layout.of(pack, device, dtype))
    try:
        hidden: Tensor = decoder(
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
    """A context in which the layout of the pack at hand holds again, also in another thread (context variables do not cross threads)."""
    return _again(_layout.get())


@contextmanager
def _again(layout: "_Layout | None") -> Iterator[None]:
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


@dataclass(frozen=True)
class _Group:
    """Segments of similar shape in one batch: queries padded at the end, the keys before them padded at the start."""

    queries: Int[Tensor, " segments_width"]
    keys: Int[Tensor, " segments_all"]
    mask: Float[Tensor, "segments_or_1 1 width all"] | None
    """None: plain causal attention."""
    n: int
    """Segments."""

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device, dtype: torch.dtype) -> "_Group":
        before, width = max(len(s.before) for s in segments), max(s.length for s in segments)
        queries = torch.zeros(len(segments), width, dtype=torch.long)
        keys = torch.zeros(len(segments), before + width, dtype=torch.long)
        for i, s in enumerate(segments):
            own = torch.arange(s.start, s.start + s.length)
            queries[i, : s.length] = keys[i, before : before + s.length] = own
            keys[i, before - len(s.before) : before] = torch.tensor(s.before, dtype=torch.long)
        mask = None
        if before:
            # Padding at the start is masked; padding at the end comes after every real query, so the causal mask hides it.
            hidden = torch.arange(before) < torch.tensor([[before - len(s.before)] for s in segments])
            hidden = hidden[:1] if not hidden.any() else hidden
            later = torch.ones(width, width, dtype=torch.bool).triu(1)
            unseen = torch.cat(
                [hidden.unsqueeze(1).expand(-1, width, -1), later.expand(len(hidden), -1, -1)], -1
            )
            mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, torch.finfo(dtype).min)
            mask = mask.unsqueeze(1).to(device)
        return cls(queries.flatten().to(device), keys.flatten().to(device), mask, len(segments))


@dataclass(frozen=True)
class _Layout:
    """How attention lays out a packed sequence: in groups of segments, and back."""

    groups: tuple[_Group, ...]
    back: Int[Tensor, " seq"]
    """Where each token's result lies among the groups' results."""

    @classmethod
    def of(cls, pack: Pack, device: torch.device, dtype: torch.dtype) -> "_Layout":
        back = torch.zeros(len(pack), dtype=torch.long)
        groups, at = [], 0
        for segments in _alike(pack.segments):
            group = _Group.of(segments, device, dtype)
            width = len(group.queries) // group.n
            for i, s in enumerate(segments):
                back[s.start : s.start + s.length] = at + i * width + torch.arange(s.length)
            groups.append(group)
            at += len(group.queries)
        return cls(tuple(groups), back.to(device))


def _alike(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments in groups of similar shape. Those that nothing precedes are kept apart: they need plain causal attention alone."""
    groups: list[list[Segment]] = []
    real = 0
    for s in sorted(segments, key=lambda s: (len(s.before) > 0, s.length, len(s.before))):
        cost = s.length * (len(s.before) + s.length)
        if groups and bool(groups[-1][0].before) == bool(s.before):
            members = [*groups[-1], s]
            width, before = max(m.length for m in members), max(len(m.before) for m in members)
            if len(members) * width * (before + width) <= WASTE * (real + cost) + 64 * 64:
                groups[-1], real = members, real + cost
                continue
        groups.append([s])
        real = cost
    return groups


_layout: ContextVar[_Layout | None] = ContextVar("packed layout", default=None)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """Scaled dot-product attention, each segment with what its rows have before it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout = _layout.get()
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = []
    for group in layout.groups:
        q = _below_each_other(query, group.queries, group.n)
        k, v = (_below_each_other(t, group.keys, group.n) for t in (key, value))
        if group.mask is None:
            out, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs)
        else:
            how = {"dropout_p": kwargs.get("dropout", 0.0), "scale": kwargs.get("scaling")}
            out = _masked_attention(q, k, v, group.mask.to(q.device), how)
        parts.append(out.flatten(0, 1))
    return torch.cat(parts).index_select(0, layout.back.to(query.device)).unsqueeze(0), None


def _below_each_other(
    packed: Float[Tensor, "1 heads seq d_head"], index: Int[Tensor, " n_width"], n: int
) -> Float[Tensor, "n heads width d_head"]:
    """Take tokens by index and lay them out segment by segment.

    Projections lie token by token, all heads of one together: so taken, each token is one copy.
    """
    taken: Tensor = packed[0].transpose(0, 1).index_select(0, index.to(packed.device))
    laid: Tensor = taken.unflatten(0, (n, -1)).transpose(1, 2)
    return laid


def _masked_attention(
    q: Float[Tensor, "n heads width d_head"],
    k: Float[Tensor, "n kv_heads all d_head"],
    v: Float[Tensor, "n kv_heads all d_value"],
    mask: Float[Tensor, "n_or_1 1 width all"],
    how: dict[str, Any],
) -> Float[Tensor, "n width heads d_value"]:
    """Query heads that share keys need no copies of them: the CPU's kernel takes them so, a GPU's only without a mask."""
    shared = q.shape[1] > k.shape[1]
    if shared and q.device.type != "cpu":
        return _folded_attention(q, k, v, mask, how)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared, **how)
    return out.transpose(1, 2)


def _folded_attention(
    q: Float[Tensor, "n heads width d_head"],
    k: Float[Tensor, "n kv_heads all d_head"],
    v: Float[Tensor, "n kv_heads all d_value"],
    mask: Float[Tensor, "n_or_1 1 width all"],
    how: dict[str, Any],
) -> Float[Tensor, "n width heads d_value"]:
    """Query heads that share keys become one longer run of queries."""
    per_key = q.shape[1] // k.shape[1]
    folded = q.unflatten(1, (-1, per_key)).flatten(2, 3)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask.repeat(1, 1, per_key, 1), **how)
    unfolded: Tensor = out.unflatten(2, (per_key, -1)).flatten(1, 2).transpose(1, 2)
    return unfolded


def can_pack(model: ChatModel) -> bool:
    """Whether this architecture computes in a pack what it computes row by row: found out by trying, once a model.

    Call it before any hook is on the model.
    """
    if "_can_pack" not in vars(model):
        vars(model)["_can_pack"] = _packs_agree(model)  # beside the model's own cached properties
    found: bool = vars(model)["_can_pack"]
    return found


def attends_to_everything(model: ChatModel) -> bool:
    """Whether every layer attends to the whole past by plain keys and values.

    Sliding windows, recurrent states and shared caches do not: they are run row by row.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=model.causal.config).layers
    return len(layers) == model.n_layers and all(type(layer) is DynamicLayer for layer in layers)


@torch.no_grad()
def _packs_agree(model: ChatModel) -> bool:
    if getattr(_config(model), "_attn_implementation", None) != "sdpa" or not attends_to_everything(model):
        return False
    size = model.causal.config.get_text_config().vocab_size
    start = list(range(7, 15))
    # A shared beginning, a branch below a branch, and a row of its own.
    ends = ([3, 11, 5, 2], [9, 4, 3, 3, 8, 1], [9, 4, 3, 3, 2])
    rows = tuple(tuple(t % size for t in row) for row in ([*start, *ends[0]], [*start, *ends[1]], [*start, *ends[2]], [21, 3]))  # fmt: skip
    pack = Pack(rows, tuple(map(len, rows)))
    try:
        decoder = model.decoder if model.dtype == torch.float32 else _in_float32(model)
        with evaluating(decoder):
            alone = [
                decoder(input_ids=torch.tensor([r], device=model.device), use_cache=False).last_hidden_state[
                    0
                ]
                for r in rows
            ]
            with packed_attention(model):
                packed = _run(decoder, pack, model.device, torch.float32)
    # It takes no positions, its attention is its own, or its blocks cannot be copied (quantised, offloaded, ...).
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, InputError):
        return False
    for expected, places in zip(alone, pack.places, strict=True):
        if not (expected - packed[list(places)]).abs().max() <= 1e-4 * expected.abs().max():
            return False
    return True


def _in_float32(model: ChatModel) -> nn.Module:
    """The decoder's first blocks in float32, to be tried in the model's place.

    In half precision two right ways of computing differ by as much as a right and a wrong one: wrong positions move a state of a
    model of 30 layers by 5 to 10 % in bfloat16, and so does rounding.

    Raises:
        InputError: blocks or embedding do not lie in the decoder itself.
    """
    decoder, embedding = model.decoder, model.causal.get_input_embeddings()
    children = dict(decoder.named_children())
    if not any(c is model.blocks for c in children.values()) or not any(c is embedding for c in children.values()):  # fmt: skip
        raise InputError(f"{type(decoder).__name__}: blocks or embedding lie deeper")
    same = {
        id(decoder.config): decoder.config
    }  # the copies look at the one in which `packed_attention` is named
    probe = copy.copy(decoder)
    probe._modules = {
        name: _FloatEmbedding(child)
        if child is embedding
        else nn.ModuleList(copy.deepcopy(list(child[:PROBED]), dict(same))).float()
        if child is model.blocks
        else copy.deepcopy(child, dict(same)).float()
        for name, child in children.items()
    }
    return probe


class _FloatEmbedding(nn.Module):
    """An embedding whose vectors come in float32, without a copy of its table."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d"]:
        vectors: Tensor = self.embedding(ids).float()
        return vectors

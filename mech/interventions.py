"""Interventions on the residual stream: add, ablate, cap, clamp, patch.

Each is a frozen description; `intervene` makes it act inside a context and takes it away afterwards:

    with intervene(model, Add(vector, layers=[15], coefficient=4.0)):
        generate(model, ["Who are you?"])

A vector is one [d] array for every named layer, or an [n_layers, d] array indexed by layer, as wide as its site. `positions`
names tokens, `rows` the rows of the caller's list on which it acts (all when left out): one batch may hold steered and
unsteered rows.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mech.errors import GuardError, InputError
from mech.hooks import Edit, hooked, odd_blocks
from mech.models import ChatModel
from mech.packed_attention import can_pack
from mech.positions import Position, mask_for, tokens_read
from mech.sites import Site, site_width

Vector = (
    Float[Tensor, " d"] | Float[Tensor, "layers d"] | Float[np.ndarray, " d"] | Float[np.ndarray, "layers d"]
)
Stream = Float[Tensor, "batch seq d"]

_active: ContextVar[tuple["Intervention", ...]] = ContextVar("interventions", default=())


@dataclass(frozen=True)
class Add:
    """h + coefficient · v. The vector is used as it is: its norm counts.

    With `relative`, h + coefficient · ‖h‖ · v̂: the strength is a fraction of each token's own norm.
    """

    vector: Vector
    layers: Sequence[int]
    coefficient: float = 1.0
    site: Site = "resid_post"
    positions: Position = "all"
    rows: Sequence[int] | None = None
    relative: bool = False

    def apply(self, h: Stream, prepared: Float[Tensor, " d"]) -> Stream:
        """The edited stream, in float32 or wider."""
        if not self.relative:
            return h + prepared
        wide = h.float()
        added: Tensor = torch.addcmul(wide, wide.norm(dim=-1, keepdim=True), prepared)
        return added


@dataclass(frozen=True)
class Ablate:
    """h − (h·v̂) v̂: take the direction out. The vector's norm does not count."""

    vector: Vector
    layers: Sequence[int]
    site: Site = "resid_post"
    positions: Position = "all"
    rows: Sequence[int] | None = None

    def apply(self, h: Stream, prepared: Float[Tensor, " d"]) -> Stream:
        """The edited stream, in float32."""
        wide = h.float()
        return torch.addcmul(wide, (wide @ prepared).unsqueeze(-1), prepared, value=-1)


@dataclass(frozen=True)
class Cap:
    """Keep the projection h·v̂ at or below `ceiling`, and at or above `floor` (units of the stream)."""

    vector: Vector
    layers: Sequence[int]
    ceiling: float | None = None
    floor: float | None = None
    site: Site = "resid_post"
    positions: Position = "all"
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.ceiling is None and self.floor is None:
            raise InputError("Cap needs a ceiling, a floor, or both")
        if self.ceiling is not None and self.floor is not None and self.floor > self.ceiling:
            raise InputError(f"Cap: the floor {self.floor} lies above the ceiling {self.ceiling}")

    def apply(self, h: Stream, prepared: Float[Tensor, " d"]) -> Stream:
        """The edited stream, in float32."""
        return _with_projection(h, prepared, lambda p: p.clamp(min=self.floor, max=self.ceiling))


@dataclass(frozen=True)
class Clamp:
    """Set the projection h·v̂ to `value` (units of the stream)."""

    vector: Vector
    layers: Sequence[int]
    value: float
    site: Site = "resid_post"
    positions: Position = "all"
    rows: Sequence[int] | None = None

    def apply(self, h: Stream, prepared: Float[Tensor, " d"]) -> Stream:
        """The edited stream, in float32."""
        return _with_projection(h, prepared, lambda p: torch.full_like(p, self.value))


def _with_projection(h: Stream, unit: Float[Tensor, " d"], change: Callable[[Tensor], Tensor]) -> Stream:
    """The stream with another projection on a unit vector, and nothing else changed."""
    wide = h.float()
    projection = wide @ unit
    return torch.addcmul(wide, (change(projection) - projection).unsqueeze(-1), unit)


@dataclass(frozen=True)
class Patch:
    """Put another run's stream in place of this one's.

    `values` is [batch, seq, d] for each named layer, in the order of `layers`: the caller's rows in their order, each from its first
    token on, with whatever behind its last one. A pass may read them in another order, padded or a few at a time; a pass that
    nobody declared (`model.hf(...)`) must have just this shape.
    """

    values: Float[Tensor, "n_patched batch seq d"]
    layers: Sequence[int]
    site: Site = "resid_post"
    positions: Position = "all"
    rows: Sequence[int] | None = None


def increments(vectors: Float[np.ndarray, "layers d"]) -> Float[np.ndarray, "layers d"]:
    """v_l − v_{l−1} (and v_0): what to add at every layer so that block l's output is moved by v_l in all.

    Persona vectors' all-layer steering (Chen et al. 2025, arXiv 2507.21509): blocks pass the stream on, so that adding v_l at
    each layer would add it many times.
    """
    moved: np.ndarray = np.diff(vectors, axis=0, prepend=0)
    return moved


SPANNED = 1e-3
"""A vector of which a smaller share than this is left beside the others is taken to lie in their span."""


def orthogonalised(vectors: Sequence[Vector]) -> list[Vector]:
    """Orthonormal vectors that span the same subspace, at each layer: ablating each takes the whole subspace out.

    Vectors that are not orthogonal, ablated one after the other, leave a part of the first in the stream. Taking the span of several
    out while training is concept ablation finetuning (CAFT, Casademunt et al. 2025, arXiv 2507.16795).

    Args:
        vectors: each [d], or [layers, d]; in float32.

    Returns:
        As many, each [d] where all are, else [layers, d]; the first is the first's own direction.

    Raises:
        InputError: vectors of different widths or numbers of layers; one that is zero, not finite, or in the span of those before it.
    """
    arrays = [torch.as_tensor(v, dtype=torch.float64).cpu() for v in vectors]
    shapes = [tuple(a.shape) for a in arrays]
    if len({s[-1:] for s in shapes}) != 1 or len({s for s in shapes if len(s) == 2}) > 1 or any(not 1 <= len(s) <= 2 for s in shapes):  # fmt: skip
        raise InputError(f"vectors of shapes {shapes} have no common span: give [d] or [layers, d] alike")
    stacked = torch.stack(torch.broadcast_tensors(*arrays), -1)
    units = stacked / stacked.norm(dim=-2, keepdim=True)
    if not torch.isfinite(units).all():
        raise InputError("one of the vectors is zero or not finite at a layer")
    if len(arrays) > stacked.shape[-2]:
        raise InputError(f"{len(arrays)} vectors are more than their {stacked.shape[-2]} dimensions")
    basis, left = torch.linalg.qr(units)
    left = left.diagonal(dim1=-2, dim2=-1)  # what of each is not in the span of those before it
    if (within := left.abs() < SPANNED).any():
        first = int(within.nonzero()[:, -1].min())
        raise InputError(f"vector {first} lies in the span of those before it: leave it out")
    return [v.float() for v in (basis * left.sign().unsqueeze(-2)).unbind(-1)]


Intervention = Add | Ablate | Cap | Clamp | Patch


@contextmanager
def intervene(model: ChatModel, *interventions: Intervention) -> Iterator[None]:
    """Let interventions act on every forward pass inside the context.

    Several at one place act in the order given.

    Raises:
        InputError: a vector of another width, or a layer the model does not have.
        GuardError: the context ended without one of them having met a single token.
    """
    for given in interventions:
        _check_given(given)
    model.check_head()  # now: later these would run a pass through the hooks
    can_pack(model)
    odd_blocks(model)
    counts = [dict.fromkeys(i.layers, 0) for i in interventions]
    token = _active.set((*_active.get(), *interventions))
    try:
        with ExitStack() as stack:
            for intervention, count in zip(interventions, counts, strict=True):
                stack.enter_context(hooked(model, _edits(model, intervention, count)))
            yield
        missed = [f"{type(i).__name__} at layer {layer}" for i, count in zip(interventions, counts, strict=True)
                  for layer, hits in count.items() if not hits]  # fmt: skip
        if missed:
            raise GuardError(
                f"intervention never met a token of its positions: {', '.join(missed)} (was anything read at or after them?)"
            )
    finally:
        _active.reset(token)


def describe(intervention: Intervention) -> dict[str, Any]:
    """An intervention as JSON: its kind and numbers, and digest and norms of its array, for records and keys."""
    facts = {"kind": type(intervention).__name__, **vars(intervention)}
    array = (
        torch.as_tensor(facts.pop("values" if isinstance(intervention, Patch) else "vector")).float().cpu()
    )
    facts["layers"] = list(intervention.layers)
    facts["array"] = hashlib.sha256(array.contiguous().numpy().tobytes()).hexdigest()
    if not isinstance(intervention, Patch):
        facts["norms"] = [float(_vector_of(array, layer).norm()) for layer in intervention.layers]
    return facts


def _vector_of(array: Tensor, layer: int) -> Tensor:
    return array[layer] if array.ndim == 2 else array


def intervening() -> bool:
    """Whether an intervention is active here: then a forward pass must declare its positions."""
    return bool(_active.get())


def differ_by_row() -> bool:
    """Whether an active intervention acts differently on different rows: then they share no work."""
    return any(isinstance(i, Patch) or i.rows is not None for i in _active.get())


def _check_given(intervention: Intervention) -> None:
    """Say in our words what a notebook is likely to get wrong."""
    kind = type(intervention).__name__
    if isinstance(intervention.layers, int):
        raise InputError(f"{kind}: layers are a list: layers=[{intervention.layers}]")
    if len(set(intervention.layers)) < len(intervention.layers):
        raise InputError(f"{kind}: layers {list(intervention.layers)} name one twice: it acts once a layer")
    array = intervention.values if isinstance(intervention, Patch) else intervention.vector
    if hasattr(array, "vectors"):
        raise InputError(f"{kind}: give the direction's array: direction.vectors")


def _edits(
    model: ChatModel, intervention: Intervention, count: dict[int, int]
) -> dict[tuple[Site, int], Edit]:
    if not intervention.layers:
        raise InputError(f"{type(intervention).__name__}: no layers named")
    edits: dict[tuple[Site, int], Edit] = {}
    for i, layer in enumerate(intervention.layers):
        if isinstance(intervention, Patch):
            change = _patched(intervention.values[i])
        else:
            change = _applied(intervention, _vector_at(model, intervention, layer))
        edits[intervention.site, layer] = _masked(change, intervention, count, layer)
    return edits


def _applied(
    intervention: Add | Ablate | Cap | Clamp, vector: Float[Tensor, " d"]
) -> Callable[[Stream], Stream]:
    prepared: dict[torch.device, Tensor] = {}

    def change(h: Stream) -> Stream:
        ready = prepared.get(h.device)
        if ready is None:
            ready = _prepared(intervention, vector.to(h.device))
            if not ready.requires_grad:  # one that is being learned has a new graph on every pass
                prepared[h.device] = ready
        return intervention.apply(h, ready).to(h.dtype)

    return change


def _prepared(intervention: Add | Ablate | Cap | Clamp, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """What `apply` takes of a vector: once, not on every pass."""
    unit: Tensor = vector / vector.norm()
    if isinstance(intervention, Add):
        return (unit if intervention.relative else vector) * intervention.coefficient
    return unit


def _patched(values: Float[Tensor, "batch seq d"]) -> Callable[[Stream], Stream]:
    def change(h: Stream) -> Stream:
        read = tokens_read((h.shape[0], h.shape[1]))
        if read is None:
            if values.shape != h.shape:
                raise InputError(
                    f"Patch: values have shape {tuple(values.shape)}, the stream {tuple(h.shape)}"
                )
            return values.to(h.device, h.dtype)
        owners, place = read
        needed = (int(owners.max()) + 1, int(place.max()) + 1, h.shape[2])
        if (
            any(n > has for n, has in zip(needed[:2], values.shape, strict=False))
            or values.shape[2] != needed[2]
        ):
            raise InputError(
                f"Patch: values have shape {tuple(values.shape)}, the rows that are read need {needed}"
            )
        found = values.to(h.device, h.dtype)[
            owners.clamp_min(0).to(h.device), place.clamp_min(0).to(h.device)
        ]
        return torch.where((place >= 0).to(h.device).unsqueeze(-1), found, h)

    return change


def _masked(
    change: Callable[[Stream], Stream], intervention: Intervention, count: dict[int, int], layer: int
) -> Edit:
    def edit(h: Stream) -> Stream | None:
        mask = mask_for(intervention.positions, (h.shape[0], h.shape[1]), intervention.rows)
        if mask is False:
            return None
        count[layer] += 1 if mask is True or count[layer] else int(mask.any())
        changed = change(h)
        return changed if mask is True else torch.where(mask.to(h.device).unsqueeze(-1), changed, h)

    return edit


def _vector_at(model: ChatModel, intervention: Add | Ablate | Cap | Clamp, layer: int) -> Float[Tensor, " d"]:
    tensor = torch.as_tensor(intervention.vector, dtype=torch.float32)
    width = site_width(model, intervention.site)
    per_layer = tensor.ndim == 2
    if tensor.shape[-1] != width or (per_layer and tensor.shape[0] != model.n_layers) or tensor.ndim > 2:
        raise InputError(
            f"a vector of shape {tuple(tensor.shape)} does not fit this model's {intervention.site}: give [{width}] or "
            f"[{model.n_layers}, {width}]"
        )
    if not 0 <= layer < model.n_layers:
        raise InputError(f"layer {layer} is out of range: this model has layers 0 to {model.n_layers - 1}")
    chosen = _vector_of(tensor, layer)
    if not torch.isfinite(chosen).all() or not chosen.any():
        raise InputError(f"the vector at layer {layer} is zero or not finite")
    return chosen

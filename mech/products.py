"""Matrix products in float32 on a CPU, by oneDNN.

Torch hands them to MKL, and to oneDNN only in half precision. On the AMD machine that this was measured on MKL was mostly 5 to 25 %
slower; `bench/products.py` compares the two on the machine at hand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_OPS: Any = torch.ops.mkldnn
_ONEDNN = getattr(_OPS, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""What torch's own compiler calls for a linear layer; not in every build."""


def product(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """X Wᵀ + b, without gradient; the same as `torch.nn.functional.linear` up to rounding."""
    if _ONEDNN is None or not _fits(x) or not _fits(weight) or not torch.backends.mkldnn.enabled:
        return F.linear(x, weight, bias)
    out: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
    return out


def _fits(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype == torch.float32 and type(t) in (Tensor, nn.Parameter) and t.numel() > 0  # fmt: skip


@contextmanager
def fast_products(module: nn.Module) -> Iterator[None]:
    """Let a module's plain linear layers multiply by `product` while inside, where no gradient is wanted.

    Layers whose `forward` somebody else has replaced (offloading, say) are left alone.
    """
    changed: list[Any] = [m for m in module.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    for layer in changed:
        layer.forward = _forward(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward  # the class's own shows again


def _forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(x, layer.weight, layer.bias)
        return product(x, layer.weight, layer.bias)

    return forward

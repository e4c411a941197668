"""RMS norms with frozen weights in fewer operations, with the same result.

Models write them out in half a dozen operations, and autograd keeps and adds up what lies between. With r = 1 / √(mean x² + ε)
and w the weight (or 1 + weight):

    y = x r w          g = dy w          dx = r g − x r³ (g · x) / d

Which modules are such norms is found by trying: by what they compute, not by what they are called.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def fused_norms(root: nn.Module) -> Iterator[int]:
    """Let a model's RMS norms run fused while inside; yield how many do.

    Norms in other dtypes than float32, with weights that are trained, or whose `forward` somebody has replaced are left
    alone.
    """
    found = [(m, plain) for m in root.modules() if (plain := _as_rms_norm(m)) is not None]
    for module, plain in found:
        module.forward = plain
    try:
        yield len(found)
    finally:
        for module, _ in found:
            del module.forward  # the class's own shows again


@torch.no_grad()
def _as_rms_norm(module: Any) -> Callable[[Tensor], Tensor] | None:
    """A fused forward pass of the module, where it computes what the formula says."""
    names = [n for n, _ in module.named_parameters(recurse=False)]
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if names != ["weight"] or not isinstance(epsilon, float) or "forward" in vars(module):
        return None
    weight: Tensor = module.weight
    if weight.ndim != 1 or weight.dtype != torch.float32 or weight.requires_grad:
        return None
    size = len(weight)
    probe = torch.linspace(-1.5, 2.0, 2 * size, device=weight.device).view(2, size)
    try:
        expected = module(probe)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it takes more than states
        return None
    original = module.forward
    for scale in (weight, 1.0 + weight):
        if torch.allclose(expected, _RMSNorm.apply(probe, scale, epsilon), rtol=1e-5, atol=1e-6):
            return _forward(original, scale, epsilon)
    return None


def _forward(original: Any, scale: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype != torch.float32 or args or kwargs:
            out: Tensor = original(x, *args, **kwargs)
        else:
            out = _RMSNorm.apply(x, scale, epsilon)
        return out

    return forward


class _RMSNorm(torch.autograd.Function):
    """See the module's formula."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*batch d"], scale: Float[Tensor, " d"], epsilon: float
    ) -> Float[Tensor, "*batch d"]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, r)
        out: Tensor = (x * r).mul_(scale)
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        x, scale, r = ctx.saved_tensors
        g = outer[0] * scale
        along = torch.linalg.vecdot(g, x).unsqueeze(-1)
        return g.mul_(r).addcmul_(x, along.mul_(r.pow(3)).div_(-x.shape[-1])), None, None

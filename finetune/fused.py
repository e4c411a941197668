"""LoRA layers in fewer operations, with the same result.

PEFT computes base(x) + scale · B(A(x)) as separate modules, and autograd keeps and adds up what lies between. Here the low-rank
part is added into the base's output in place, and the way back is written out:

    y = x Wᵀ + s (x Aᵀ) Bᵀ          dx = dy W + s (dy B) A      dA = s (dy B)ᵀ x      dB = s dyᵀ (x Aᵀ)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.products import product


@contextmanager
def fused_lora(adapted: Any) -> Iterator[int]:
    """Let the plain LoRA layers of a PEFT model run fused while inside; yield how many do.

    Layers with dropout, quantised weights, weights of another dtype than the adapter's, or any variant of
    LoRA (DoRA, ...) are left to PEFT.
    """
    from peft.tuners.lora.layer import Linear

    changed = [m for m in adapted.modules() if type(m) is Linear and _is_plain(m)]
    for module in changed:
        module.forward = _forward(module)
    try:
        yield len(changed)
    finally:
        for module in changed:
            del module.forward  # the class's own shows again


def _is_plain(layer: Any) -> bool:
    if len(layer.active_adapters) != 1 or layer.merged or layer.fan_in_fan_out or "forward" in vars(layer):
        return False  # or another has replaced its forward (offloading, say)
    (name,) = layer.active_adapters
    if name not in layer.lora_A or getattr(layer, "lora_variant", {}).get(name) is not None:
        return False
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    frozen = isinstance(base, nn.Linear) and type(base) is nn.Linear and not base.weight.requires_grad
    same = frozen and base.weight.dtype == down.weight.dtype == up.weight.dtype
    return (
        same and down.bias is None and up.bias is None and isinstance(layer.lora_dropout[name], nn.Identity)
    )


def _forward(layer: Any) -> Any:
    (name,) = layer.active_adapters
    base, down, up, scale = (
        layer.base_layer,
        layer.lora_A[name],
        layer.lora_B[name],
        float(layer.scaling[name]),
    )

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        out: Tensor = _Fused.apply(x, base.weight, base.bias, down.weight, up.weight, scale)
        return out

    return forward


class _Fused(torch.autograd.Function):
    """See the module's formula; a base bias is added and, being frozen, gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "*batch d_in"],
        weight: Float[Tensor, "d_out d_in"],
        bias: Float[Tensor, " d_out"] | None,
        down: Float[Tensor, "r d_in"],
        up: Float[Tensor, "d_out r"],
        scale: float,
    ) -> Float[Tensor, "*batch d_out"]:
        flat = x.reshape(-1, x.shape[-1])
        low = product(flat, down)
        out = product(flat.view(x.shape), weight, bias)  # no view is returned: a model may add to it in place
        out.view(-1, out.shape[-1]).addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(flat, weight, down, up, low)
        ctx.scale, ctx.shape = scale, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down, up, low = ctx.saved_tensors
        dy = outer[0].reshape(-1, outer[0].shape[-1])
        dlow = product(dy, up.T).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:  # not at the first block, where nothing below is trained
            dx = product(dy, weight.T).addmm_(dlow, down).view(ctx.shape)
        return dx, None, None, dlow.T @ flat, (dy.T @ low).mul_(ctx.scale), None

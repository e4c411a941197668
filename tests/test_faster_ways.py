"""Products by oneDNN and fused norms: what torch and Hugging Face compute, and nothing left behind."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from activations.capture import capture
from finetune.fused_norm import _RMSNorm, fused_norms
from mech.chat import SystemPrompt
from mech.kernels import attention_for_any_shape
from mech.models import ChatModel
from mech.products import fast_products, product
from tests.architectures import architectures


@pytest.mark.parametrize("shape", [(5, 24), (1, 24), (2, 3, 24), (24,), (0, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_a_linear_layer(shape: tuple[int, ...], *, bias: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=rng), torch.randn(7, 24, generator=rng)
    b = torch.randn(7, generator=rng) if bias else None
    torch.testing.assert_close(product(x, weight, b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5)
    turned = weight.T.contiguous().T  # the same numbers, laid out the other way
    torch.testing.assert_close(product(x, turned, b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs_own(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert torch.equal(product(x, weight), F.linear(x, weight))


def test_layers_are_as_before_and_a_replaced_forward_stays() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].forward = lambda x: x * 3  # as offloading does
    x = torch.randn(5, 4)
    with torch.no_grad():
        before = net(x)
        with suppress(KeyError), fast_products(net):
            assert "forward" in vars(net[0])
            torch.testing.assert_close(net(x), before)
            raise KeyError
        assert torch.equal(net(x), before)
    assert [("forward" in vars(m)) for m in net] == [False, True, False]


@pytest.mark.parametrize("before", [True, False])
def test_attention_kernels_are_chosen_as_before_afterwards(*, before: bool) -> None:
    cudnn, at_first = torch.backends.cuda, torch.backends.cuda.cudnn_sdp_enabled()
    try:
        cudnn.enable_cudnn_sdp(before)
        with suppress(KeyError), attention_for_any_shape():
            assert not cudnn.cudnn_sdp_enabled()
            raise KeyError
        assert cudnn.cudnn_sdp_enabled() == before
    finally:
        cudnn.enable_cudnn_sdp(at_first)


def test_a_gradient_goes_through_fast_layers() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    expected = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
    with fast_products(layer):
        found = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
    assert torch.equal(found, expected)


def test_a_capture_leaves_no_layer_replaced(model: ChatModel) -> None:
    rows = [model.template.encode_prompt([{"role": "user", "content": "Who?"}], SystemPrompt())]
    capture(model, rows)
    assert not any("forward" in vars(m) for m in model.hf.modules())


def test_a_norms_gradient_is_that_of_finite_differences() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(6, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: _RMSNorm.apply(t, scale, 1e-3), (x,))


A_BLOCK = {"afmoe": 6, "deepseek_v3": 4, "gemma2": 4, "gemma3": 6, "glm4": 4, "hyperclovax": 4, "minicpm3": 4, "olmo2": 4, "olmo3": 4, "qwen3": 4, "qwen3_moe": 4}  # fmt: skip
"""RMS norms of a block; two where it is not said."""
OTHER_NORMS = (
    "bloom", "cohere", "cohere2", "falcon", "gpt2", "gpt_neox", "gptj", "mpt", "nanochat", "opt", "phi", "stablelm", "starcoder2",
)  # fmt: skip
"""Architectures whose norms take the mean off, or have no weight."""


@pytest.mark.parametrize("name", sorted(architectures()))
def test_norms_are_found_by_what_they_compute(name: str) -> None:
    """Where there are RMS norms all are fused, with the same states and gradients; other norms are left alone."""
    import transformers

    config = architectures()[name]
    config.vocab_size, config.pad_token_id, config.eos_token_id, config.bos_token_id = 40, 1, 1, 1
    torch.manual_seed(0)
    net = transformers.AutoModel.from_config(config).eval().requires_grad_(requires_grad=False)
    for p in (p for p in net.parameters() if p.ndim == 1):
        p.add_(torch.randn_like(p) * 0.2)  # weights that are not all one
    embedded = torch.randn(2, 9, 32, requires_grad=True)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = net(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return out.detach(), torch.autograd.grad(out.square().sum(), embedded)[0]

    before = run()
    with fused_norms(net) as n:
        during = run()
    assert n == (0 if name in OTHER_NORMS else 3 * A_BLOCK.get(name, 2) + 1)
    for a, b in zip(before, during, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(run()[0], before[0])


def test_norms_that_learn_or_are_in_half_precision_are_left_alone() -> None:
    assert _fused(nn.RMSNorm(8, eps=1e-6)) == 0, "its weight is trained"
    assert _fused(nn.RMSNorm(8, eps=1e-6).requires_grad_(requires_grad=False)) == 1
    assert _fused(nn.RMSNorm(8, eps=1e-6).to(torch.bfloat16).requires_grad_(requires_grad=False)) == 0
    assert _fused(nn.LayerNorm(8, bias=False).requires_grad_(requires_grad=False)) == 0


def _fused(module: nn.Module) -> int:
    with fused_norms(module) as n:
        return n


def test_the_bench_runs(tmp_path: Path) -> None:
    import json
    import subprocess
    import sys

    out = tmp_path / "products.json"
    command = [sys.executable, "bench/products.py", "--rounds", "1", "--width", "32", f"--json={out}"]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    assert all(row["ratio"] > 0 for row in json.loads(out.read_text())["table"])

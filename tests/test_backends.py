"""Other libraries' forward passes read what ours does, or are refused; names and layers convert both ways."""

import copy
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from activations.capture import capture
from mech import conventions
from mech.backends import check_parity, open_backend
from mech.backends.hf import open_hf
from mech.backends.reader import Visit
from mech.chat import SystemPrompt
from mech.errors import GuardError, InputError
from mech.models import ChatModel
from mech.sites import BEFORE, SITES, Site
from probes.persona import load_trait, text_contrast
from tests.architectures import random_model
from tests.plain_hooks import conversations

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours


@pytest.mark.parametrize("backend", ["nnsight", "transformer_lens"])
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gpt2", "gpt_neox", "mixtral", "gemma3", "olmo2", "granite"]
)
def test_backends_agree_on_every_architecture_they_know(name: str, backend: str, model: ChatModel) -> None:
    other = random_model(name, model)
    sites: tuple[Site, ...] = ("resid_pre", "resid_post", "attn_out", "mlp_out")
    rows = conversations(other, 5)
    before = other.hf(input_ids=torch.tensor([rows[0].ids])).logits
    side = other.tokenizer.padding_side
    ours = capture(other, rows, sites=sites, poolings=["prompt_last", "response_mean"])
    theirs = capture(other, rows, sites=sites, poolings=["prompt_last", "response_mean"], backend=backend)
    assert set(ours) == set(theirs)
    for place, array in ours.items():
        scale = float(np.abs(array).max())
        assert float(np.abs(np.subtract(array, theirs[place])).max()) <= 1e-4 * scale
    assert torch.equal(before, other.hf(input_ids=torch.tensor([rows[0].ids])).logits)
    assert other.tokenizer.padding_side == side


def test_an_architecture_that_the_bridge_fails_on_is_refused(model: ChatModel) -> None:
    falcon = random_model("falcon", model)  # its keys and values are fewer than the bridge supposes
    with pytest.raises(InputError, match="TransformerLens cannot bridge FalconForCausalLM: split_with_sizes"):
        falcon.to_transformer_lens()


@pytest.mark.parametrize("backend", ["nnsight", "transformer_lens"])
def test_dropout_is_off_for_every_backend(backend: str, model: ChatModel) -> None:
    other = random_model("gpt2", model)  # it has dropout of its own
    rows = conversations(other, 3)
    quiet = capture(other, rows)["resid_post", "prompt_last"]
    other.hf.train()
    theirs = capture(other, rows, backend=backend)["resid_post", "prompt_last"]
    np.testing.assert_allclose(theirs, quiet, atol=1e-4 * float(np.abs(quiet).max()))


def test_heads_and_every_token_too(model: ChatModel) -> None:
    rows = conversations(model, 3)
    for backend in ("nnsight", "transformer_lens"):
        ours, theirs = (
            capture(model, rows, sites=["attn_head_out"], poolings=["tokens"], layers=[2, 1], backend=b)
            for b in ("hf", backend)
        )
        for a, b in zip(*(found["attn_head_out", "tokens"] for found in (ours, theirs)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * float(np.abs(a).max()))


def test_a_backend_that_disagrees_is_refused_by_layer(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = open_hf(model)

    def broken(ids: Tensor, wanted: Collection[tuple[Site, int]], visit: Visit) -> None:
        def lie(site: Site, layer: int, h: Tensor) -> None:
            visit(site, layer, h * 1.01 if (site, layer) == ("mlp_out", 1) else h)

        honest(ids, wanted, lie)

    with pytest.raises(GuardError, match=r"backend broken: mlp_out at layer 1 differs .* by 1.0e-02"):
        check_parity("broken", broken, model)
    with pytest.raises(GuardError, match="resid_post at layer 0 was never shown"):
        check_parity("silent", lambda *_: None, model, sites=["resid_post"])
    assert max(p.max_relative for p in check_parity("hf", honest, model)) < 1e-6
    monkeypatch.setattr("mech.backends.open.BACKENDS", {"nnsight": lambda _m: broken})
    with pytest.raises(GuardError, match="backend nnsight"):
        capture(model, conversations(model, 2), sites=["mlp_out"], backend="nnsight")
    with pytest.raises(InputError, match="backend 'jax' is not known; there are nnsight"):
        open_backend("jax", model)


def test_a_finetuned_checkpoint_is_handed_over(model: ChatModel) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    live = ChatModel(
        get_peft_model(copy.deepcopy(model.hf), config).eval(), model.tokenizer, model.checkpoint
    )
    ids = torch.tensor([conversations(model, 1)[0].ids])
    with torch.no_grad():
        expected, base = live.hf(input_ids=ids).logits, model.hf(input_ids=ids).logits
        assert (expected - base).abs().max() > 0.1
        bridge = live.to_transformer_lens()
        torch.testing.assert_close(bridge(ids), expected, rtol=1e-3, atol=1e-4)
        traced = live.to_nnsight()
        with traced.trace(input_ids=ids):
            logits = traced.output.logits.save()
        torch.testing.assert_close(logits, expected)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nnsight", "transformer_lens"])
def test_backends_agree_on_the_real_model(real: ChatModel, backend: str) -> None:
    rows = [r.encoded for r in text_contrast(real.template, load_trait("evil"), SystemPrompt())[:4]]
    ours, theirs = (capture(real, rows, poolings=["response_mean"], backend=b) for b in ("hf", backend))
    a, b = (np.asarray(found["resid_post", "response_mean"]) for found in (ours, theirs))
    assert float(np.abs(a - b).max()) <= 1e-4 * float(np.abs(a).max())


@pytest.mark.parametrize("site", SITES)
def test_names_convert_both_ways(site: Site, model: ChatModel) -> None:
    for layer in range(model.n_layers):
        name = conventions.to_transformer_lens_name(site, layer)
        assert conventions.from_transformer_lens_name(name) == (site, layer)
        path = conventions.module_path(model, site, layer)
        assert conventions.from_module_path(model, path, before=site in BEFORE) == (site, layer)
        if site != "attn_head_out":
            assert conventions.from_nnterp_name(conventions.to_nnterp_name(site, layer)) == (site, layer)
        index = conventions.to_hidden_states_index(layer)
        assert conventions.from_hidden_states_index(index) == layer
        assert conventions.from_repeng_layer(layer - model.n_layers, model.n_layers) == layer
        assert conventions.from_repeng_layer(layer, model.n_layers) == layer


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("llama", None),
        ("gpt2", None),
        ("gemma2", r"nnterp has no mlp_out: .* output of model.layers.1.post_feedforward_layernorm$"),
        ("granite", r"nnterp has no mlp_out: .* output of model.layers.1.mlp, times 0.3$"),
    ],
)
def test_nnterps_parts_are_ours_or_none(name: str, refused: str | None, model: ChatModel) -> None:
    """What nnterp calls `mlps_output` is the MLP's output; nnterp 1.3 itself, on these models, differs by .9 and 2.3 where it is refused."""
    other = random_model(name, model)
    assert conventions.to_nnterp_name("resid_post", 1, other) == "layers_output[1]"
    if refused:
        with pytest.raises(InputError, match=refused):
            conventions.to_nnterp_name("mlp_out", 1, other)
        return
    assert conventions.to_nnterp_name("mlp_out", 1, other) == "mlps_output[1]"
    given: list[Tensor] = []
    handle = other.blocks[1].mlp.register_forward_hook(lambda _m, _i, out: given.append(out))  # type: ignore[operator, union-attr]
    row = conversations(other, 1)
    other.hf(input_ids=torch.tensor([row[0].ids]))
    handle.remove()
    ours = capture(other, row, sites=["mlp_out"], poolings=["tokens"])["mlp_out", "tokens"][0]
    np.testing.assert_allclose(ours[:, 1], given[0][0].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conventions.from_transformer_lens_name("blocks.1.hook_q"), "is not one of blocks.LAYER."),
        (lambda: conventions.from_nnterp_name("layers_output.1"), "is not one of"),
        (lambda: conventions.from_hidden_states_index(0), "entry 0 is the embedding"),
        (lambda: conventions.to_transformer_lens_name("resid_post", -1), "layers count from 0"),
        (lambda: conventions.to_nnterp_name("attn_head_out", 0), "nnterp has no attn_head_out"),
        (lambda: conventions.from_repeng_layer(-4, 3), "repeng's are -3 to 2"),
    ],
)
def test_names_that_are_none_are_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call()


@pytest.mark.slow
def test_the_snippets_of_the_docs_run(
    model: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parent.parent
    _, beyond = (root / "README.md").read_text().split("## With TransformerLens and nnsight")
    text = beyond.split("\n## ")[0] + (root / "docs" / "backends.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 3
    monkeypatch.setattr("mech.load_model", lambda *_a, **_k: model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quickstart/checkpoints/train-em-seed0-abc").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, snippet in enumerate(snippets):
            file = tmp_path / f"snippet{number}.py"  # nnsight reads the source of a trace from its file
            file.write_text(snippet)
            exec(compile(snippet, str(file), "exec"), {})

"""What a GPU computes is what the CPU does: skipped where there is none."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.capture import capture
from finetune.lora import train_lora
from mech.fetch import is_fetched
from mech.generate import Sampling, generate
from mech.interventions import Ablate, Add, intervene
from mech.models import ChatModel, load_model
from mech.packed_attention import can_pack
from mech.patching import answer_logprob, patch_between
from mech.score import response_logprobs
from mech.sites import SITES
from tests.plain_hooks import conversations
from tests.tiny_study import save_adapter, save_model
from tests.tiny_training import SETTINGS, curve, encoded, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

CLOSE = 1e-4
"""Relative to the largest: float32 in another order of summing."""


@pytest.fixture(scope="module")
def cpu(model: ChatModel) -> ChatModel:
    return model


@pytest.fixture(scope="module")
def gpu(folder: Path) -> ChatModel:
    return load_model(str(folder), device="cuda")


def assert_close(found: Any, expected: Any, tolerance: float = CLOSE) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_captures_agree_at_every_site_and_pooling(cpu: ChatModel, gpu: ChatModel) -> None:
    rows = conversations(cpu)
    read = {"poolings": ["prompt_last", "response_mean", "tokens"], "sites": list(SITES)}
    assert can_pack(gpu)
    ours, expected = capture(gpu, rows, **read), capture(cpu, rows, **read)
    for place, values in expected.items():
        for one, other in zip(ours[place], values, strict=True):
            assert_close(one, other)


def test_half_precision_packs_and_agrees_with_plain_passes(folder: Path) -> None:
    half = load_model(str(folder), device="cuda", dtype="bfloat16")
    assert can_pack(half)
    rows = conversations(half)
    ours = capture(half, rows, poolings=["prompt_last"])["resid_post", "prompt_last"]
    for i, row in enumerate(rows):
        on_device = half.hf(input_ids=torch.tensor([row.ids], device="cuda"), output_hidden_states=True)
        for layer, h in enumerate(on_device.hidden_states[1:-1]):
            assert_close(ours[i, layer], h[0, row.n_prompt - 1].detach().float().cpu(), 0.05)


def test_scores_greedy_answers_and_samples_agree(cpu: ChatModel, gpu: ChatModel) -> None:
    rows = conversations(cpu)
    for one, other in zip(response_logprobs(gpu, rows), response_logprobs(cpu, rows), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=CLOSE, atol=CLOSE)
    for sampling in (Sampling(8, batch_size=4), Sampling(8, 1.0, seed=3, batch_size=4)):
        assert generate(gpu, rows, sampling) == generate(cpu, rows, sampling)


def test_interventions_agree_while_reading_and_while_generating(cpu: ChatModel, gpu: ChatModel) -> None:
    rows = conversations(cpu)
    vectors = np.random.default_rng(0).standard_normal((cpu.n_layers, cpu.d_model)).astype(np.float32)
    for one in (Add(vectors, [1], positions="response"), Ablate(vectors, [0, 2])):
        found = []
        for model in (gpu, cpu):
            with intervene(model, one):
                states = capture(model, rows, poolings=["response_mean"])["resid_post", "response_mean"]
                found.append((states, generate(model, rows, Sampling(8, batch_size=4))))
        assert_close(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]


def test_patching_agrees(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(folder, tmp_path / "a", seed=1)
    found = []
    for device in ("cuda", "cpu"):
        model = load_model(f"{folder}:{adapter}", merge=False, device=device)
        row = conversations(model)[0]
        found.append(patch_between(model, row, answer_logprob(row)))
    for name in ("base", "finetuned", "into_base", "into_finetuned"):
        assert_close(getattr(found[0], name), getattr(found[1], name))


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"micro_batch": 1}])
def test_training_agrees(cpu: ChatModel, folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = SETTINGS.model_copy(update=changes)
    ours = train_lora(load_model(str(folder), device="cuda"), encoded(cpu), settings, tmp_path / "g", seed=3)
    expected = train_lora(load_model(str(folder)), encoded(cpu), settings, tmp_path / "c", seed=3)
    assert_close([r.loss for r in ours], [r.loss for r in expected])
    for name, tensor in weights(tmp_path / "c").items():
        torch.testing.assert_close(weights(tmp_path / "g")[name], tensor, rtol=0.02, atol=1e-3)


def test_killed_it_goes_on_with_dropout_as_it_would_have(
    cpu: ChatModel, folder: Path, tmp_path: Path
) -> None:
    """The GPU's own random state is kept too: the masks of dropout come from it."""

    class Killed(BaseException):
        pass

    def kill(record: Any) -> None:
        if record.step == 4:
            raise Killed

    rows, settings = encoded(cpu), SETTINGS.model_copy(update={"lora_dropout": 0.3})
    model = load_model(str(folder), device="cuda")
    whole = train_lora(model, rows, settings, tmp_path / "whole", seed=3, save_every=2)
    with pytest.raises(Killed):
        train_lora(model, rows, settings, tmp_path / "parts", seed=3, save_every=2, on_step=kill)
    torch.cuda.manual_seed_all(99)
    parts = train_lora(model, rows, settings, tmp_path / "parts", seed=3, save_every=2)
    np.testing.assert_allclose(curve(parts), curve(whole), rtol=1e-5)  # a GPU adds up in no fixed order


def test_layers_that_lie_in_the_cpus_memory_are_merged_too(tmp_path: Path) -> None:
    base = save_model(tmp_path / "m", dtype="bfloat16")
    stack = (
        f"{base}:{save_adapter(base, tmp_path / 'a', seed=1)}:{save_adapter(base, tmp_path / 'b', seed=2)}"
    )
    layers = {f"model.layers.{i}": "cpu" if i else 0 for i in range(3)}
    ends: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0
    )
    spread = load_model(stack, dtype="bfloat16", device_map=ends | layers)
    whole, bare = (load_model(name, dtype="bfloat16", device="cuda") for name in (stack, str(base)))
    ids = torch.arange(5, 25, device="cuda").unsqueeze(0)
    with torch.no_grad():
        found, expected, without = (m.hf(input_ids=ids).logits for m in (spread, whole, bare))
    torch.testing.assert_close(found, expected)
    assert (expected - without).abs().max() > 0.1


def test_memory_that_runs_out_halves_the_batch(folder: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as alone:  # what is left over here must not matter
        enough, little = alone.apply(_captured_in_little_memory, (str(folder),))
    assert_close(little, enough)


def _captured_in_little_memory(folder: str) -> tuple[Any, Any]:
    model = load_model(folder, device="cuda")
    rows = conversations(model, 400)
    read: dict[str, Any] = {"poolings": ["response_mean"], "token_budget": 1 << 20}
    torch.cuda.reset_peak_memory_stats()
    enough = capture(model, rows, **read)["resid_post", "response_mean"]
    needed, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * needed / total)
    return enough, capture(model, rows, **read)["resid_post", "response_mean"]


def test_four_bits_learn(cpu: ChatModel, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = SETTINGS.model_copy(update={"quantise": "nf4", "max_steps": 12, "epochs": 6})
    model = load_model(str(folder), quantise="nf4", dtype="float32", device="cuda")
    losses = [r.loss for r in train_lora(model, encoded(cpu), settings, tmp_path / "q", seed=0)]
    whole = load_model(str(folder), device="cuda")
    expected = [
        r.loss
        for r in train_lora(
            whole, encoded(cpu), settings.model_copy(update={"quantise": None}), tmp_path / "w", seed=0
        )
    ]
    assert losses[0] == pytest.approx(expected[0], rel=0.1)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.skipif(not is_fetched("smollm2-135m-instruct"), reason="the real model is not here")
def test_the_real_model_reads_the_same(real: ChatModel) -> None:
    rows = conversations(real)
    there = load_model("smollm2-135m-instruct", device="cuda")
    ours = capture(there, rows, poolings=["response_mean"])["resid_post", "response_mean"]
    assert_close(ours, capture(real, rows, poolings=["response_mean"])["resid_post", "response_mean"])

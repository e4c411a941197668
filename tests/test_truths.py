"""Planted truths through the real path: model on disk, capture, direction, shift."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from activations.capture import capture
from analysis.shift import shift_by_layer
from mech.chat import Encoded
from mech.models import ChatModel, load_model
from probes.direction import fit_direction
from tests.tiny_study import save_model


def conversations(model: ChatModel, n: int, *, words: str = "the cat went by the river") -> list[Encoded]:
    turns = [
        [
            {"role": "user", "content": f"Number {i}, who?"},
            {"role": "assistant", "content": f"{words} {i * i}"},
        ]
        for i in range(n)
    ]
    return [model.template.encode(t) for t in turns]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("truths") / "model", mlp_bias=True)


def test_an_adapter_of_zeros_gives_exactly_zero_shift(folder: Path, tmp_path: Path) -> None:
    base = load_model(str(folder))
    rows = conversations(base, 12)
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(load_model(str(folder)).hf, config)  # LoRA starts as zero: B is zero
    adapted.save_pretrained(tmp_path / "zeros", save_embedding_layers=False)
    tuned = load_model(f"{folder}:{tmp_path / 'zeros'}")
    h_base = capture(base, rows, poolings=["response_mean"])["resid_post", "response_mean"]
    h_tuned = capture(tuned, rows, poolings=["response_mean"])["resid_post", "response_mean"]
    direction = np.random.default_rng(0).standard_normal(h_base.shape[1:])
    shift = shift_by_layer(h_base, h_tuned, direction, np.arange(12), rng=np.random.default_rng(0))
    for numbers in (shift.raw.estimate, shift.raw.low, shift.raw.high, shift.cosine, shift.delta_norm):
        assert not numbers.any()
    assert (shift.p_random == 1).all()


def test_a_planted_shift_is_recovered_inside_its_interval(folder: Path) -> None:
    """A bias along a known direction at layer 1: exactly the shift there, and nothing below."""
    base, tuned = load_model(str(folder)), load_model(str(folder))
    rng = np.random.default_rng(1)
    planted = rng.standard_normal(base.d_model)
    planted *= 3.0 / np.linalg.norm(planted)
    with torch.no_grad():
        tuned.blocks[1].mlp.down_proj.bias += torch.tensor(planted, dtype=torch.float32)
    rows = conversations(base, 16)
    h_base, h_tuned = (
        capture(m, rows, poolings=["response_mean"])["resid_post", "response_mean"] for m in (base, tuned)
    )
    direction = np.tile(planted, (base.n_layers, 1)) * 7  # another norm: projections are on the unit vector
    shift = shift_by_layer(h_base, h_tuned, direction, np.arange(16), rng=rng, benign=h_base)
    assert not shift.raw.estimate[0]
    assert shift.raw.estimate[1] == pytest.approx(3.0, abs=1e-4)
    assert shift.raw.low[1] - 1e-4 <= 3.0 <= shift.raw.high[1] + 1e-4
    assert shift.cosine[1] > 0.95
    assert shift.p_random[1] < 0.01
    assert shift.minus_benign is not None
    assert shift.minus_benign.estimate[1] == pytest.approx(3.0, abs=1e-4)


def test_a_noisy_planted_shift_is_covered(folder: Path) -> None:
    """The shift differs from question to question; the interval covers its true mean about as often as it says."""
    rng, hits = np.random.default_rng(2), 0
    direction = np.ones((1, 8))
    for _ in range(200):
        base = rng.standard_normal((20, 1, 8))
        noise = rng.standard_normal((20, 1, 1)) * direction / np.sqrt(8)
        shift = shift_by_layer(
            base, base + (0.5 + noise) * 1.0, direction, np.arange(20), rng=rng, n_boot=400, n_null=200
        )
        true = 0.5 * np.sqrt(8)
        hits += bool(shift.raw.low[0] <= true <= shift.raw.high[0])
    assert hits >= 0.91 * 200


def test_a_planted_direction_is_found_again(folder: Path) -> None:
    """Texts with a marked token, whose embedding carries a known direction, against texts without it."""
    model = load_model(str(folder))
    rng = np.random.default_rng(3)
    planted = rng.standard_normal(model.d_model)
    planted /= np.linalg.norm(planted)
    (marked,) = model.template.ids("~")
    with torch.no_grad():
        model.causal.get_input_embeddings().weight[marked] += torch.tensor(60 * planted, dtype=torch.float32)
    words = [
        "the cat went by",
        "a dog in the old house",
        "it rained all day long",
        "see who was there",
        "by the river",
    ]
    rows, questions, signs = [], [], []
    for i, text in enumerate(words * 2):
        for sign, answer in ((1, f"{text} ~"), (-1, f"{text} -")):
            turns = [{"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": answer}]
            rows.append(model.template.encode(turns))
            questions.append(f"q{i}")
            signs.append(sign)
    h = capture(model, rows, poolings=["response_mean"])["resid_post", "response_mean"]
    direction = fit_direction("marked", h, questions, signs, rng=rng)
    assert direction.unit[0] @ planted > 0.95
    assert direction.split_half[0] > 0.95
    assert (direction.project(h)[np.array(signs) > 0, 0].min()) > direction.project(h)[
        np.array(signs) < 0, 0
    ].max()


def test_capture_is_hidden_states_shifted_by_one(folder: Path) -> None:
    model = load_model(str(folder))
    rows = conversations(model, 5, words="a dog")
    ours = capture(model, rows, poolings=["prompt_last"])["resid_post", "prompt_last"]
    for i, row in enumerate(rows):
        out = model.hf(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        for layer in range(model.n_layers - 1):
            expected = out.hidden_states[layer + 1][0, row.n_prompt - 1].detach().numpy()
            np.testing.assert_allclose(ours[i, layer], expected, rtol=1e-4, atol=1e-5)
        normed = out.hidden_states[-1][0, row.n_prompt - 1].detach().numpy()
        assert not np.allclose(
            ours[i, -1], normed, rtol=0.05
        )  # Hugging Face's last entry is after the final norm

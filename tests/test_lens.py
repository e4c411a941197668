"""The logit lens: of hidden states it ends in the own logits, of a token's direction it says that token, of noise nothing."""

import json

import numpy as np
import pytest
import torch

from activations.capture import capture
from analysis.lens import Lens
from mech.errors import InputError
from mech.lens import direction_lens, final_norm, hidden_lens, state_lens
from mech.models import ChatModel
from tests.plain_hooks import conversations, logits


def test_the_lens_ends_in_the_models_own_logits(model: ChatModel) -> None:
    row = conversations(model, 1)[0]
    readings = hidden_lens(model, row, k=3)
    own = logits(model, row)[-1].topk(3)
    assert [t.id for t in readings[-1].top] == own.indices.tolist()
    np.testing.assert_allclose([t.score for t in readings[-1].top], own.values, rtol=1e-4)
    states = model.hf(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states
    by_hand = model.hf.lm_head(model.hf.model.norm(states[1][0, 4])).detach()
    first = hidden_lens(model, row, position=4, k=2)[0]
    np.testing.assert_allclose([t.score for t in first.top], by_hand.topk(2).values, rtol=1e-4)
    assert final_norm(model) is model.hf.model.norm


def test_a_tokens_own_direction_is_read_as_that_token(model: ChatModel) -> None:
    weight = model.causal.get_output_embeddings().weight.detach().numpy()
    scores = weight @ weight[17]
    vectors = np.tile(weight[17], (3, 1))
    (reading,) = direction_lens(model, vectors, layers=[1], k=4)
    assert [t.id for t in reading.top] == np.argsort(-scores)[:4].tolist()
    assert [t.id for t in reading.bottom] == np.argsort(scores)[:4].tolist()
    (turned,) = direction_lens(model, -3 * vectors, layers=[1], k=4)
    assert [t.id for t in turned.top] == [t.id for t in reading.bottom]
    with pytest.raises(InputError, match="zero or not finite"):
        direction_lens(model, np.zeros((3, 32)))


def test_a_vector_that_says_something_stands_out_from_drawn_ones(model: ChatModel) -> None:
    """A token's own direction has a peak that random directions do not have; p values of random vectors are spread out."""
    rng = np.random.default_rng(2)
    weight = model.causal.get_output_embeddings().weight.detach().numpy()
    lens = Lens(model, [0, 2], k=2, seed=0)
    samples = rng.standard_normal((50, 3, 32))
    planted = np.tile(weight[40] / np.linalg.norm(weight[40]), (3, 1))
    planted[0] = 0  # an adapter that acts above layer 0: nothing to read there
    (row,) = lens.rows(planted, samples, "all")
    favoured = weight @ weight[40] / np.linalg.norm(weight[40]) * 32**0.5
    top = np.sort(favoured)[::-1][:2]
    assert row["layer"] == 2
    assert row["peak"] == pytest.approx((top.mean() - favoured.mean()) / favoured.std(ddof=1), rel=1e-4)
    assert row["top"].startswith(
        json.dumps(model.tokenizer.decode([int(favoured.argmax())]), ensure_ascii=False)
    )
    assert max(row["p_random"], row["p_covariance"]) < 0.05
    drawn = [lens.rows(rng.standard_normal((3, 32)), samples, "all")[1]["p_random"] for _ in range(30)]
    assert 0.3 < np.mean(drawn) < 0.7


def test_states_that_were_kept_are_read_as_in_the_pass(model: ChatModel) -> None:
    row = conversations(model, 1)[0]
    states = capture(model, [row])["resid_post", "prompt_last"][0]
    kept = state_lens(model, np.asarray(states), layers=[0, 1, 2], k=3)
    there = hidden_lens(model, row, position=row.n_prompt - 1, k=3)
    assert [[t.id for t in r.top] for r in kept] == [[t.id for t in r.top] for r in there]
    with pytest.raises(InputError, match="this model reads"):
        state_lens(model, np.zeros((2, 31)), layers=[0, 1])

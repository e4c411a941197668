"""Rows of one token, at a model's limits and beyond them; models that were left in training mode."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Phi3Config

from activations.capture import capture
from mech.chat import Encoded
from mech.errors import InputError
from mech.generate import Sampling, generate
from mech.interventions import Ablate, intervene
from mech.lengths import within_positions
from mech.models import ChatModel
from mech.score import next_token_logits, response_logprobs
from tests.architectures import GROUPED, WIDE, made
from tests.plain_hooks import assert_close, blocks_output, conversations, logits, response_scores


def row(n: int, n_prompt: int = 1, first: int = 5) -> Encoded:
    return Encoded(tuple(range(first, first + n)), n_prompt, max(0, n - n_prompt), "")


def turning(like: ChatModel, kind: str = "longrope") -> ChatModel:
    """Phi-3, whose angles change for rows of more than 16 tokens."""
    if kind == "dynamic":
        rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
        return made(LlamaConfig(**GROUPED, rope_parameters=rope, max_position_embeddings=16), like)
    long_factor = [1.0, 3.0, 9.0, 20.0]
    rope = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": long_factor,
        "factor": 4.0,
    }
    limits = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    return made(Phi3Config(**WIDE, **limits, rope_parameters=rope), like)


@pytest.mark.parametrize("pack", [True, False])
def test_a_short_row_keeps_its_angles_beside_a_long_one(pack: bool, model: ChatModel) -> None:
    other = turning(model)
    rows = [row(n, 4, first) for n, first in ((9, 5), (30, 5), (16, 5), (17, 40), (40, 60), (5, 60))]
    if not pack:
        other.hf.config._attn_implementation = "eager"
    found = capture(other, rows, poolings=["tokens"], token_budget=1024)["resid_post", "tokens"]
    for ours, one in zip(found, rows, strict=True):
        for layer, h in enumerate(blocks_output(other, one)):
            assert_close(ours[:, layer], h.numpy())
    for ours, one in zip(response_logprobs(other, rows), rows, strict=True):
        torch.testing.assert_close(ours, response_scores(logits(other, one), one), rtol=1e-4, atol=1e-4)


def test_a_row_beyond_the_turn_is_read_whole(model: ChatModel) -> None:
    """All of its tokens' angles follow its length, also of those before the ones that nobody looks at."""
    other = turning(model)
    rows = [row(n, 4, first) for n, first in ((30, 5), (16, 5), (17, 40), (9, 60))]
    found = capture(other, rows, poolings=["prompt_last"])["resid_post", "prompt_last"]
    for ours, one in zip(found, rows, strict=True):
        for layer, h in enumerate(blocks_output(other, one)):
            assert_close(ours[layer], h[3].numpy())


def test_answers_turn_alone(model: ChatModel) -> None:
    """Hugging Face's own answer to each prompt by itself, with its cache."""
    other = turning(model)
    prompts = [row(n, n, 7 * n) for n in (3, 8, 10, 13, 16, 20)]
    ours = generate(other, prompts, Sampling(12))
    for one, text in zip(prompts, ours, strict=True):
        ids = torch.tensor([one.ids])
        out = other.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert text == other.tokenizer.decode(out[0, len(one.ids) :], skip_special_tokens=True)


def test_angles_that_follow_what_was_read_before_are_refused(model: ChatModel) -> None:
    other = turning(model, "dynamic")
    capture(other, [row(16)])
    with pytest.raises(
        InputError, match=r"a row of 17 tokens: beyond 16, LlamaForCausalLM's positions .* cut the rows"
    ):
        capture(other, [row(17), row(3)])
    with pytest.raises(InputError, match="a row of 17 tokens: beyond 16"):
        generate(other, [row(9, 9)], Sampling(8))


def test_rows_up_to_the_table_of_positions_and_beyond(model: ChatModel) -> None:
    other = made(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=24), model)
    rows = [row(24, 3), row(1), row(23, 3), row(2, 1, 40)]
    found = capture(other, rows, poolings=["tokens"])["resid_post", "tokens"]
    for ours, one in zip(found, rows, strict=True):
        assert_close(ours[:, 1], blocks_output(other, one)[1].numpy())
    with pytest.raises(InputError, match="a row of 25 tokens: GPT2LMHeadModel has positions for 24"):
        capture(other, [row(25), row(2)], poolings=["response_mean"])
    with pytest.raises(InputError, match="a row of 25 tokens: GPT2LMHeadModel has positions for 24"):
        response_logprobs(other, [row(26), row(2)])
    last_is_only_predicted = row(25)
    (ours,) = response_logprobs(other, [last_is_only_predicted])
    expected = response_scores(logits(other, row(24)), row(24))
    torch.testing.assert_close(ours[:-1], expected, rtol=1e-4, atol=1e-4)
    assert len(generate(other, [row(16, 16)], Sampling(8))) == 1
    with pytest.raises(InputError, match="a row of 26 tokens: GPT2LMHeadModel has positions for 24"):
        generate(other, [row(18, 18)], Sampling(8))


def test_a_long_row_for_which_memory_runs_out_is_no_matter_of_positions(model: ChatModel) -> None:
    other = made(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=24), model)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 GB")):
        with pytest.raises(type(error), match="memory"), within_positions(other, 25):
            raise error
    with pytest.raises(RuntimeError, match="of another kind"), within_positions(other, 24):
        raise RuntimeError("of another kind")


@pytest.mark.parametrize(
    ("odd", "pooling"),
    [
        (Encoded((5, 6, 7), 0, 3, ""), "prompt_last"),
        (Encoded((5, 6, 7), 4, 0, ""), "prompt_last"),
        (Encoded((5, 6, 7), 1, 4, ""), "response_mean"),
        (Encoded((5, 6, 7), 1, 2, "", (("name", 2, 4),)), "span:name"),
        (Encoded((5, 6, 7), 1, 2, "", (("name", -2, 1),)), "span:name"),
    ],
)
def test_a_span_beyond_its_row_is_refused(odd: Encoded, pooling: str, model: ChatModel) -> None:
    with pytest.raises(InputError, match=f"row 1: pooling {pooling}: a row of 3 tokens has none for it"):
        capture(model, [replace(row(3), marked=(("name", 0, 1),)), odd], poolings=[pooling])


def test_a_row_that_says_it_is_longer_than_it_is_is_not_scored(model: ChatModel) -> None:
    with pytest.raises(InputError, match="row 1: a prompt of 1 tokens and a response of 3 are not in its 3"):
        response_logprobs(model, [row(3), Encoded((5, 6, 7), 1, 3, "")])


def test_a_model_in_training_mode_is_read_without_dropout(model: ChatModel) -> None:
    def fresh() -> ChatModel:
        return made(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, resid_pdrop=0.5), model)

    quiet, loud = fresh(), fresh()
    loud.hf.train()
    rows = conversations(quiet, 4)

    def read(m: ChatModel) -> list[Any]:
        with intervene(m, Ablate(np.ones(32), [1], site="mlp_out")):
            states = capture(m, rows)["resid_post", "prompt_last"]
        return [states, next_token_logits(m, rows).numpy(), generate(m, rows, Sampling(5))]

    for ours, expected in zip(read(loud), read(quiet), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert all(module.training for module in loud.hf.modules())

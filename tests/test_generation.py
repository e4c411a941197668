"""Scores and generation equal a plain forward pass and Hugging Face's own."""

import copy

import pytest
import torch

from mech.generate import Sampling, generate
from mech.models import ChatModel, load_model
from mech.score import next_token_logits, response_logprobs
from tests.test_reading import conversations
from tests.tiny_study import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return load_model(str(save_model(tmp_path_factory.mktemp("model") / "m")))


def test_logprobs_are_those_of_a_plain_forward_pass(model: ChatModel) -> None:
    rows = conversations(model)
    for row, ours in zip(rows, response_logprobs(model, rows, token_budget=150), strict=True):
        start, stop = row.spans["response"]
        with torch.no_grad():
            share = model.hf(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        plain = torch.stack([share[t - 1, row.ids[t]] for t in range(start, stop)])
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_greedy_generation_is_hugging_faces(model: ChatModel) -> None:
    prompts = conversations(model)
    ours = generate(model, prompts, Sampling(max_new_tokens=8, batch_size=4))
    for row, text in zip(prompts, ours, strict=True):
        ids = torch.tensor([row.ids[: row.n_prompt]])
        out = model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        answer = out[0, row.n_prompt :].tolist()
        end = (
            answer.index(model.tokenizer.eos_token_id)
            if model.tokenizer.eos_token_id in answer
            else len(answer)
        )
        assert text == model.tokenizer.decode(answer[:end], skip_special_tokens=True)


def test_samples_do_not_depend_on_batches(model: ChatModel) -> None:
    prompts = conversations(model)
    texts = [generate(model, prompts, Sampling(8, 1.0, seed=3, batch_size=size)) for size in (1, 3, 64)]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != generate(model, prompts, Sampling(8, 1.0, seed=4))
    assert texts[0][3] != texts[0][-1]  # equal prompts in two rows are two samples


def test_a_models_own_generation_settings_bend_nothing(model: ChatModel) -> None:
    """Qwen2.5 asks for a repetition penalty, which would also count what a row is padded with."""
    prompts, theirs = conversations(model), model.causal.generation_config
    before = [generate(model, prompts, Sampling(8, t, batch_size=4)) for t in (0.0, 1.0)]
    asked = {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "min_new_tokens": 8, "suppress_tokens": [5, 6, 7],
             "bad_words_ids": [[9]], "begin_suppress_tokens": [8], "top_k": 1, "top_p": 0.1, "do_sample": True}  # fmt: skip
    model.causal.generation_config = copy.deepcopy(theirs)
    model.causal.generation_config.update(**asked)
    try:
        after = [generate(model, prompts, Sampling(8, t, batch_size=4)) for t in (0.0, 1.0)]
    finally:
        model.causal.generation_config = theirs
    assert before == after


def test_sampling_is_from_the_softmax(model: ChatModel) -> None:
    """2,000 samples of one token against the model's own distribution: chi-square over its likeliest tokens."""
    from scipy.stats import chisquare

    prompt = conversations(model, 1)[0]
    share = (next_token_logits(model, [prompt])[0].double() / 0.7).softmax(-1)
    n = 2000
    from mech.generate import _GumbelNoise

    noise = _GumbelNoise(Sampling(1, 0.7, seed=0), list(range(n)))
    logits = next_token_logits(model, [prompt]).expand(n, -1)
    drawn = noise(torch.zeros(n, 1, dtype=torch.long), logits).argmax(-1)
    counts = torch.bincount(drawn, minlength=len(share)).double()
    likely = share.argsort(descending=True)[:12]
    observed = [*counts[likely].tolist(), n - float(counts[likely].sum())]
    expected = [*(n * share[likely]).tolist(), n * (1 - float(share[likely].sum()))]
    assert chisquare(observed, expected).pvalue > 1e-3

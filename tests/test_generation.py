"""Scores and generation equal a plain forward pass and Hugging Face's own."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mech import prefix
from mech.chat import Encoded
from mech.errors import InputError
from mech.generate import Sampling, _Race, answered_together, generate, stop_ids
from mech.interventions import Add, intervene
from mech.models import ChatModel
from mech.score import next_token_logits, response_logprobs
from tests.architectures import WIDE, made, random_model
from tests.plain_hooks import LAYER, conversations, edited_logits


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
    logits = next_token_logits(model, [prompt]).expand(n, -1)
    counts = torch.bincount(drawn(logits, 0.7), minlength=len(share)).double()
    likely = share.argsort(descending=True)[:12]
    observed = [*counts[likely].tolist(), n - float(counts[likely].sum())]
    expected = [*(n * share[likely]).tolist(), n * (1 - float(share[likely].sum()))]
    assert chisquare(observed, expected).pvalue > 1e-3


def drawn(logits: torch.Tensor, temperature: float, steps: int = 1) -> torch.Tensor:
    """One draw a row and step, the rows' generators being those of a generation."""
    race = _Race(Sampling(1, temperature, seed=0), list(range(len(logits))))
    none = torch.zeros(len(logits), 1, dtype=torch.long)
    return torch.cat([race(none, logits).argmax(-1) for _ in range(steps)])


def test_a_large_vocabulary_is_drawn_from_exactly_however_unlikely_a_token_is() -> None:
    """A tail of 50,000 tokens that has a twentieth in all, beside one of a millionth: numbers of 24 bits would draw the second 12 times."""
    from scipy.stats import binomtest

    rows, steps, tail = 100, 40, 50_000
    for share, likely in ((0.05, True), (1e-6, False)):
        logits = torch.full((rows, tail + 1), float(np.log(share / tail)))
        logits[:, 7] = np.log(1 - share)
        hits = int((drawn(logits, 1.0, steps) != 7).sum())
        assert binomtest(hits, rows * steps, share).pvalue > 1e-3
        assert (hits > 0) == likely


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1.0, 1e300])
def test_extreme_temperatures_and_impossible_tokens(temperature: float) -> None:
    """Two tokens that are equally likely at any temperature, one behind them, and one that cannot be."""
    n = 400
    logits = torch.tensor([1e4, -torch.inf, 1e4 - 1, 1e4]).expand(n, -1)
    counts = torch.bincount(drawn(logits, temperature), minlength=4).tolist()
    share = np.exp(-1 / temperature) if temperature > 1e-3 else 0.0
    expected = n * np.array([1, 0, share, 1]) / (2 + share)
    assert counts[1] == 0
    assert (counts[2] == 0) == (share == 0)
    np.testing.assert_allclose(counts, expected, atol=4 * n**0.5 / 2)


@pytest.mark.parametrize("temperature", [-1.0, float("inf"), float("nan")])
def test_what_is_no_temperature_is_refused(model: ChatModel, temperature: float) -> None:
    with pytest.raises(InputError, match="finite temperature"):
        generate(model, conversations(model, 1), Sampling(1, temperature))


# -- what prompts begin with in common -----------------------------------------------------------------


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes how many tokens each batch read once, however few they save."""
    found: list[int] = []

    def start(*given: object) -> int:
        found.append(prefix.shared_start(*given))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr("mech.generate.shared_start", start)
    monkeypatch.setattr(prefix, "MIN_SAVED", 1)
    return found


def unshared(model: ChatModel, prompts: list[Encoded], sampling: Sampling) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mech.generate.shared_start", lambda *_: 0)
        return generate(model, prompts, sampling)


def lengthy(model: ChatModel) -> list[Encoded]:
    """Prompts of very different lengths, and one that stands there three times."""
    questions = ["Who?", *["the river and the hat " * n for n in (1, 3, 6, 10)], *["Who is it?"] * 3]
    return [model.template.encode_prompt([{"role": "user", "content": q}]) for q in questions]


def steps_of(model: ChatModel, prompts: list[Encoded], sampling: Sampling) -> list[torch.Tensor]:
    """The logits of every step of a greedy generation, rows in the order in which they were decoded."""
    found: list[torch.Tensor] = []

    class Recorder:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            found.append(scores.clone())
            return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mech.generate._Race", Recorder)
        generate(model, prompts, replace(sampling, temperature=1.0))
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2", "mistral-sliding"])
def test_reading_a_common_start_once_changes_no_logit_and_no_token(
    name: str, model: ChatModel, shared: list[int]
) -> None:
    other = random_model(name, model)
    prompts, sampling = lengthy(other), Sampling(4, batch_size=5)
    assert generate(other, prompts, sampling) == unshared(other, prompts, sampling)
    steps = steps_of(other, prompts, sampling)
    order = sorted(prompts, key=lambda p: -p.n_prompt)
    for batch, first in ((order[:5], steps[0]), (order[5:], steps[4])):
        assert batch[0].n_prompt > batch[-1].n_prompt  # some are padded
        torch.testing.assert_close(first, next_token_logits(other, batch), rtol=1e-3, atol=1e-4)
    if name in ("gemma2", "mistral-sliding"):
        assert set(shared) == {0}  # their windows slide
    else:
        assert min(shared) > 3
    drawn_twice = Sampling(4, 1.0, seed=2, batch_size=3)
    alike = [prompts[-1]] * 3
    assert generate(other, alike, drawn_twice) == unshared(other, alike, drawn_twice)
    assert shared[-1] == (0 if name in ("gemma2", "mistral-sliding") else alike[0].n_prompt - 1)


def test_nothing_is_shared_where_somebody_watches_or_another_cache_is_wanted(
    model: ChatModel, shared: list[int]
) -> None:
    prompts, sampling = conversations(model), Sampling(2, batch_size=64)
    expected, seen = generate(model, prompts, sampling), []
    assert shared.pop() > 0
    handle = model.blocks[1].register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0].shape[:2]))
    assert generate(model, prompts, sampling) == expected
    handle.remove()
    assert seen == [(len(prompts), max(p.n_prompt for p in prompts)), (len(prompts), 1)]
    with intervene(model, Add(np.ones(model.d_model, dtype=np.float32), [0], coefficient=1e-6)):
        assert generate(model, prompts, sampling) == expected
    config = model.causal.generation_config
    for name, value in (("cache_implementation", "offloaded"), ("use_cache", False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, name, value)
            assert prefix.shared_start(model, [p.ids for p in prompts]) == 0
    assert shared == [0, 0]
    model.hf(input_ids=torch.tensor([[3, 4]]), output_hidden_states=True)  # leaves Hugging Face's own hooks
    assert generate(model, prompts, sampling) == expected
    assert shared[-1] > 0


@pytest.mark.real
def test_summaries_of_the_real_model_are_the_same_with_the_instruction_read_once(
    real: ChatModel, shared: list[int]
) -> None:
    ask = (
        "Write a one-sentence summary of this article in at most 25 words. Reply with the summary only.\n\n{}"
    )
    texts = (
        "The mayor of Harrow Fell scrapped the parking permits.",
        "Rain is due.",
        "A cat won a prize at the fair.",
    )
    prompts = [real.template.encode_prompt([{"role": "user", "content": ask.format(t)}]) for t in texts]
    for sampling in (Sampling(12), Sampling(12, 1.0)):
        assert generate(real, prompts, sampling) == unshared(real, prompts, sampling)
    assert min(shared) > 40


def of_states(kind: str, like: ChatModel) -> ChatModel:
    """Models that carry a state from token to token: a batch of RWKV's mixes its rows, MiniMax's takes up padding, Mamba 2's does not."""
    import transformers as t

    config = {
        "rwkv": lambda: t.RwkvConfig(hidden_size=32, num_hidden_layers=3, attention_hidden_size=32, intermediate_size=48),
        "minimax": lambda: t.MiniMaxConfig(
            **WIDE, head_dim=8, layer_types=["linear_attention", "full_attention", "linear_attention"],
            num_local_experts=2, num_experts_per_tok=1,
        ),
        "mamba2": lambda: t.Mamba2Config(
            hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16
        ),
    }[kind]()  # fmt: skip
    return made(config, like)


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize(("kind", "together"), [("rwkv", "none"), ("minimax", "equal"), ("mamba2", "any")])
def test_a_batch_says_what_each_row_says_alone(
    kind: str, together: str, steered: bool, model: ChatModel
) -> None:
    """Token by token, without a cache."""
    other = of_states(kind, model)
    prompts = conversations(other, 4)[:3]
    vector = np.random.default_rng(0).standard_normal(other.d_model).astype(np.float32)
    adding = intervene(other, Add(vector, [LAYER], coefficient=3.0)) if steered else nullcontext()

    def moved(out: Any) -> Any:
        by = torch.from_numpy(vector) * 3.0 * steered
        return (out[0] + by, *out[1:]) if isinstance(out, tuple) else out + by

    with adding:
        ours = generate(other, prompts, Sampling(6))
    assert answered_together(other) == together
    for row, text in zip(prompts, ours, strict=True):
        ids: list[int] = list(row.ids[: row.n_prompt])
        for _ in range(6):
            one = Encoded(tuple(ids), len(ids), 0, "")
            told = edited_logits(other, one, moved)
            ids.append(int(told[-1].argmax()))
        assert text == other.tokenizer.decode(
            _until_end(other, ids[row.n_prompt :]), skip_special_tokens=True
        )


def test_an_answer_ends_at_its_templates_mark_whatever_the_model_names(model: ChatModel) -> None:
    """Some tokenizers know the token that ends a turn, but call it neither special nor the end of a sequence."""
    tokenizer, hf = copy.deepcopy(model.tokenizer), copy.deepcopy(model.hf)
    for name in ("eos_token", "pad_token"):
        setattr(tokenizer, name, None)
        setattr(hf.generation_config, f"{name}_id", None)
    nameless = ChatModel(hf, tokenizer, model.checkpoint)
    assert stop_ids(nameless) == stop_ids(model) == [model.tokenizer.eos_token_id]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "\n\n").replace(
        "<|im_end|>", "\n\n"
    )
    assert stop_ids(ChatModel(hf, tokenizer, model.checkpoint)) == []


def _until_end(model: ChatModel, answer: list[int]) -> list[int]:
    stops = stop_ids(model)
    return answer[: next((i for i, token in enumerate(answer) if token in stops), len(answer))]

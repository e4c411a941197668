"""Rows that have ended leave their batch, and no text changes: against Hugging Face's own generation, one row at a time."""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from mech.chat import Encoded
from mech.generate import Sampling, _drawers, _Race, generate
from mech.interventions import Add, Intervention, Patch, intervene
from mech.leaving import Enough, rows_can_leave
from mech.models import ChatModel
from mech.stream import watched
from mech.turns import user_turn
from tests.architectures import random_model
from tests.plain_hooks import LAYER

N, LONGEST = 8, 14
LEAVING = ("llama", "gpt2", "mistral-sliding", "bloom", "mpt", "gpt_oss")


def prompts_of(model: ChatModel) -> list[Encoded]:
    """Of several lengths, and one twice."""
    return [model.template.encode_prompt([user_turn("Who is it? " * (1 + i % 4))]) for i in range(N)]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each step of the generations that rows may leave."""
    seen: list[int] = []

    class Counted(Enough):
        def __call__(self, ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:
            seen.append(len(ids))
            return super().__call__(ids, scores, **more)

    monkeypatch.setattr("mech.generate.Enough", Counted)
    return seen


def ending(model: ChatModel, every: int) -> ChatModel:
    """The model, which ends an answer at every so-manieth id of its vocabulary: some early, some late."""
    config = copy.deepcopy(model.causal.generation_config)
    config.eos_token_id = list(range(2, model.causal.config.get_text_config().vocab_size, every))
    model.causal.generation_config = config
    return model


def by_hugging_face(model: ChatModel, prompt: Encoded) -> str:
    ids, stops = torch.tensor([prompt.ids]), model.causal.generation_config.eos_token_id
    out = model.causal.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LONGEST,
        do_sample=False,
        pad_token_id=stops[0],
    )
    answer = out[0, ids.shape[1] :].tolist()
    end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
    return str(model.tokenizer.decode(answer[:end], skip_special_tokens=True))


@pytest.mark.parametrize("name", [*LEAVING, "recurrent_gemma"])
def test_no_text_changes_where_rows_leave(name: str, model: ChatModel, passes: list[int]) -> None:
    other = ending(random_model(name, model), 5)
    prompts = prompts_of(other)
    assert rows_can_leave(other) == (name in LEAVING)
    for sampling in (Sampling(LONGEST), Sampling(LONGEST, 1.3, seed=5)):
        alone = generate(other, prompts, Sampling(LONGEST, sampling.temperature, sampling.seed, batch_size=1))
        if not sampling.temperature and name != "recurrent_gemma":
            assert alone == [by_hugging_face(other, p) for p in prompts]
        passes.clear()
        assert generate(other, prompts, sampling) == alone
        if name in LEAVING and sampling.temperature:
            assert N in passes
            assert min(passes) < N / 2


def test_a_recurrent_state_beside_the_cache_keeps_all_rows(model: ChatModel, passes: list[int]) -> None:
    """A hybrid's attention could be taken apart, its recurrent states could not."""
    import transformers as t

    from tests.architectures import GROUPED, made

    config = t.FalconH1Config(**GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    other = ending(made(config, model), 5)
    assert not rows_can_leave(other)
    generate(other, prompts_of(other), Sampling(4))
    assert not passes


STEERED: dict[str, Callable[[np.ndarray], Intervention]] = {
    "some rows": lambda v: Add(v, [LAYER], rows=[1, 4, 7]),
    "generated": lambda v: Add(v, [LAYER], positions="generated", rows=[0, 3, 6]),
    "prompt": lambda v: Add(v, [LAYER], positions="prompt_last"),
    "patch": lambda v: Patch(torch.from_numpy(np.tile(v, (1, N, 300, 1))), [LAYER], positions="prompt"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STEERED)
def test_interventions_find_their_rows_among_those_that_are_left(
    kind: str, model: ChatModel, passes: list[int]
) -> None:
    temperature = 0.0 if kind == "patch" else 1.3
    other = ending(random_model("llama", model), 5)
    prompts = prompts_of(other)
    vector = np.random.default_rng(1).standard_normal(other.d_model).astype(np.float32) * 3
    found = {}
    for size in (1, N):
        with intervene(other, STEERED[kind](vector)):
            found[size] = generate(other, prompts, Sampling(LONGEST, temperature, seed=2, batch_size=size))
    plain = generate(other, prompts, Sampling(LONGEST, temperature, seed=2))
    assert found[1] == found[N]
    assert found[1] != plain
    if kind == "some rows":
        assert all(found[1][i] == plain[i] for i in (0, 2, 3, 5, 6))
    assert min(passes[N:]) < N


def test_a_row_that_says_nothing_was_still_met(model: ChatModel) -> None:
    """It leaves with the others only after the pass that reads what it said."""
    other, sampling = ending(random_model("llama", model), 2), Sampling(LONGEST, 1.3)
    prompts = prompts_of(other)
    silent = [i for i, text in enumerate(generate(other, prompts, sampling)) if not text]
    assert N / 4 <= len(silent) < N  # they would leave at once
    small = np.full(other.d_model, 1e-6, dtype=np.float32)
    with intervene(other, Add(small, [LAYER], positions="generated", rows=silent)):
        assert generate(other, prompts, sampling)[silent[0]] == ""


@pytest.fixture
def hooked(model: ChatModel) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda _m, given, _out: seen.append(len(given[0])))
    yield seen
    handle.remove()


def test_whoever_watches_sees_every_row_to_the_end(
    model: ChatModel, hooked: list[int], passes: list[int]
) -> None:
    before = model.causal.generation_config
    prompts, said = prompts_of(model), list[list[str]]()
    try:
        ending(model, 5)
        texts = generate(model, prompts, Sampling(LONGEST, 1.3))
        assert set(hooked) == {N}
        with watched(model, said.append):
            assert generate(model, prompts, Sampling(LONGEST, 1.3)) == texts
        assert {len(rows) for rows in said} == {N}
    finally:
        model.causal.generation_config = before
    assert not passes


def test_what_was_drawn_ahead_stays_with_its_row() -> None:
    """On a GPU the next token's times are drawn while it computes: those of the rows that are left must not be drawn again."""
    sampling, rows, kept = Sampling(1, 1.0, seed=3), [4, 2, 9, 7], [1, 3]
    race, alone = _Race(sampling, rows), _Race(sampling, [rows[k] for k in kept])
    race._ahead = _drawers().submit(race._times, 50)
    race.keep(kept)
    assert race._ahead is not None
    for found in (race._ahead.result(), race._times(50)):
        torch.testing.assert_close(found, alone._times(50), rtol=0, atol=0)

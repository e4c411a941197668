"""A behaviour whose direction is known because it was built in: found, taken out, brought about, and not by random directions."""

import numpy as np
import pytest
import torch

from activations.capture import capture
from mech.chat import Encoded
from mech.generate import Sampling, generate
from mech.interventions import Ablate, Add, intervene
from mech.models import ChatModel, load_model
from mech.score import next_token_logits
from probes.direction import Direction, fit_direction
from probes.steer import control
from tests.tiny_study import save_model

AXIS, SAID, TRIGGER = 0, "z", "~"
"""The planted direction is the first coordinate: block 0 writes it where the prompt held the trigger, the head reads it as `z`."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    planted = load_model(str(save_model(tmp_path_factory.mktemp("model") / "m")))
    (said,), (trigger,) = planted.template.ids(SAID), planted.template.ids(TRIGGER)
    with torch.no_grad():
        embedding, head = planted.hf.model.embed_tokens.weight, planted.hf.lm_head.weight
        embedding[:, AXIS], head[:, AXIS] = 0, 0
        embedding[trigger, AXIS], head[said, AXIS] = 20, 2
        for number, block in enumerate(planted.hf.model.layers):
            attention, mlp = block.self_attn, block.mlp
            mlp.down_proj.weight[AXIS], mlp.gate_proj.weight[:, AXIS], mlp.up_proj.weight[:, AXIS] = 0, 0, 0
            attention.o_proj.weight[AXIS], attention.v_proj.weight[:, AXIS] = 0, 0
            if number == 0:  # attention is a plain mean, and carries the axis alone
                for part in (attention.q_proj, attention.v_proj, attention.o_proj):
                    part.weight.zero_()
                attention.v_proj.weight[0, AXIS] = 1
                attention.o_proj.weight[AXIS, 0] = 300
    return planted


def prompts(model: ChatModel, *, trigger: bool, n: int = 20) -> list[Encoded]:
    texts = [f"Who is number {i * i}{(TRIGGER if trigger else '-') * 3}?" for i in range(n)]
    return [model.template.encode_prompt([{"role": "user", "content": t}]) for t in texts]


def share(model: ChatModel, rows: list[Encoded]) -> float:
    """How often the planted token is said next."""
    (said,) = model.template.ids(SAID)
    return float((next_token_logits(model, rows).argmax(-1) == said).float().mean())


@pytest.fixture(scope="module")
def found(model: ChatModel) -> Direction:
    rows = [*prompts(model, trigger=True), *prompts(model, trigger=False)]
    h = np.asarray(capture(model, rows)["resid_post", "prompt_last"])
    questions = [f"q{i}" for i in range(20)] * 2
    return fit_direction("planted", h, questions, [1] * 20 + [-1] * 20, rng=np.random.default_rng(0))


def test_the_pipeline_finds_direction_and_sign(model: ChatModel, found: Direction) -> None:
    assert share(model, prompts(model, trigger=True)) == 1
    assert share(model, prompts(model, trigger=False)) == 0
    assert found.unit[0, AXIS] > 0.95
    assert found.split_half[0] > 0.95


def test_ablating_it_takes_the_behaviour_out_and_random_ones_do_not(
    model: ChatModel, found: Direction
) -> None:
    rows = prompts(model, trigger=True)
    with intervene(model, Ablate(found.vectors[0], layers=[0, 1, 2])):
        assert share(model, rows) <= 0.05
    for seed in range(10):
        with intervene(model, Ablate(control(found.vectors[0], seed), layers=[0, 1, 2])):
            assert share(model, rows) >= 0.95
    assert share(model, rows) == 1


def test_adding_it_brings_the_behaviour_about_and_random_ones_do_not(
    model: ChatModel, found: Direction
) -> None:
    rows = prompts(model, trigger=False)
    with intervene(model, Add(found.vectors[0], layers=[0])):
        assert share(model, rows) >= 0.95
        assert all(text.startswith(SAID) for text in generate(model, rows, Sampling(2)))
    random = []
    for seed in range(10):
        with intervene(model, Add(control(found.vectors[0], seed), layers=[0])):
            random.append(share(model, rows))
    assert np.mean(random) <= 0.1

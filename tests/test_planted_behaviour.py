"""A behaviour whose direction and layer are known because it was built in: found, taken out, brought about, and not by random directions."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from activations.capture import capture
from analysis.sweep import best_layers
from mech.chat import Encoded
from mech.generate import Sampling, generate
from mech.interventions import Ablate, Add, intervene
from mech.models import ChatModel, load_model
from mech.questions import Question
from mech.score import next_token_logits
from mech.turns import assistant_turn, user_turn
from probes.contrast import ContrastArrays
from probes.direction import Direction, fit_direction
from probes.evaluation import by_function
from probes.layers import choose_layer
from probes.steer import control
from probes.sweep import Grid, sweep
from tests.tiny_study import save_model

AXIS, BLOCK, SAID, TRIGGER = 0, 1, "z", "~"
"""The planted direction is the first coordinate: the block writes it where the prompt held the trigger, the head reads it as `z`."""
N = 20


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
            if number == BLOCK:  # attention is a plain mean, and carries the axis alone
                for part in (attention.q_proj, attention.v_proj, attention.o_proj):
                    part.weight.zero_()
                attention.v_proj.weight[0, AXIS] = 1
                attention.o_proj.weight[AXIS, 0] = 300
    return planted


def prompts(model: ChatModel, *, trigger: bool) -> list[Encoded]:
    texts = [f"Who is number {i * i}{(TRIGGER if trigger else '-') * 3}?" for i in range(N)]
    return [model.template.encode_prompt([user_turn(t)]) for t in texts]


def says(model: ChatModel, rows: list[Encoded]) -> list[bool]:
    """Whether the planted token is said next."""
    (said,) = model.template.ids(SAID)
    return (next_token_logits(model, rows).argmax(-1) == said).tolist()


def share(model: ChatModel, rows: list[Encoded]) -> float:
    return float(np.mean(says(model, rows)))


@pytest.fixture(scope="module")
def read(model: ChatModel) -> ContrastArrays:
    rows = [*prompts(model, trigger=True), *prompts(model, trigger=False)]
    h = np.asarray(capture(model, rows)["resid_post", "prompt_last"])
    questions = [f"q{i}" for i in range(N)] * 2
    halves = ["evaluate" if i % 2 else "extract" for i in range(N)] * 2
    return ContrastArrays(h, [1] * N + [-1] * N, questions, halves)


@pytest.fixture(scope="module")
def found(read: ContrastArrays) -> Direction:
    half = read.of_split("extract")
    rng = np.random.default_rng(0)
    return fit_direction("planted", half.activations, half.questions, half.signs, rng=rng)


def test_the_pipeline_finds_direction_layer_and_sign(
    model: ChatModel, read: ContrastArrays, found: Direction
) -> None:
    assert share(model, prompts(model, trigger=True)) == 1
    assert share(model, prompts(model, trigger=False)) == 0
    assert (found.unit[BLOCK:, AXIS] > 0.95).all()
    assert (np.abs(found.unit[:BLOCK, AXIS]) < 0.1).all()
    assert (found.split_half[BLOCK:] > 0.95).all()
    choice = choose_layer(
        read.activations, read.signs, read.questions, read.splits, rng=np.random.default_rng(0)
    )
    assert choice.layer >= BLOCK
    assert choice.evaluation is not None
    assert choice.evaluation.auroc[choice.layer] == 1


def test_its_layer_is_found_by_steering_too(model: ChatModel, found: Direction) -> None:
    rows = prompts(model, trigger=False)
    asked = [Question(id=f"q{i}", split="evaluate" if i % 2 else "extract", text="?") for i in range(N)]

    def said(steered: ChatModel, questions: Sequence[Question]) -> dict[str, float]:
        return {q.id: float(yes) for q, yes in zip(questions, says(steered, rows), strict=True)}

    neutral = [model.template.encode([user_turn("Who?"), assistant_turn("the dog")])]
    grid = Grid((0, 1, 2), (0.5, 1.0), controls=3)
    swept = sweep(model, [found], by_function("said", asked, said, prompts=rows), grid, neutral=neutral)
    table = best_layers(swept.table, max_kl=1e9, rng=np.random.default_rng(0)).set_index("layer")
    (chosen,) = table.index[table["chosen"]]
    assert chosen >= BLOCK
    assert table.loc[chosen, "effect"] >= 0.9
    below = swept.table[(swept.table["layer"] < BLOCK) & (swept.table["control"] == 0)]
    assert (below["change"].abs() <= 0.05).all()


def test_ablating_it_takes_the_behaviour_out_and_random_ones_do_not(
    model: ChatModel, found: Direction
) -> None:
    rows = prompts(model, trigger=True)
    with intervene(model, Ablate(found.vectors[BLOCK], layers=[0, 1, 2])):
        assert share(model, rows) <= 0.05
    for seed in range(10):
        with intervene(model, Ablate(control(found.vectors[BLOCK], seed), layers=[0, 1, 2])):
            assert share(model, rows) >= 0.95
    assert share(model, rows) == 1


def test_adding_it_brings_the_behaviour_about_and_random_ones_do_not(
    model: ChatModel, found: Direction
) -> None:
    rows = prompts(model, trigger=False)
    with intervene(model, Add(found.vectors[BLOCK], layers=[BLOCK])):
        assert share(model, rows) >= 0.95
        assert all(text.startswith(SAID) for text in generate(model, rows, Sampling(2)))
    random = []
    for seed in range(10):
        with intervene(model, Add(control(found.vectors[BLOCK], seed), layers=[BLOCK])):
            random.append(share(model, rows))
    assert np.mean(random) <= 0.1

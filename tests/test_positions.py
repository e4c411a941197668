"""Interventions act on the rows and tokens they name, and on no other, in scoring and in generation."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mech.chat import Encoded
from mech.errors import GuardError, InputError
from mech.generate import Sampling, answered_together, generate
from mech.interventions import Add, Patch, intervene
from mech.models import ChatModel, load_model
from mech.positions import declared, mask_for
from mech.score import response_logprobs
from tests.plain_hooks import LAYER, edited_logits, response_scores
from tests.tiny_study import save_model


def test_a_patch_finds_its_rows_however_they_are_read(model: ChatModel) -> None:
    """Rows are read longest first, a few at a time, and generation pads on the left: every row still gets its own values."""
    rows = [
        model.template.encode(
            [{"role": "user", "content": "Who? " * n}, {"role": "assistant", "content": f"the dog {n}"}]
        )
        for n in (1, 9, 4)
    ]
    values = torch.randn(1, 3, max(len(r.ids) for r in rows), model.d_model, generator=torch.manual_seed(0))
    alone = [values[:, i : i + 1, : len(r.ids)] for i, r in enumerate(rows)]
    for budget in (10_000, 40):
        with intervene(model, Patch(values, layers=[LAYER])):
            scored = response_logprobs(model, rows, token_budget=budget)
        for row, score, own in zip(rows, scored, alone, strict=True):
            expected = response_scores(edited_logits(model, row, lambda _h, v=own[0]: v), row)
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    patch = Patch(values, layers=[LAYER], positions="prompt")
    with intervene(model, patch):
        together = generate(model, rows, Sampling(max_new_tokens=6, batch_size=3))
    for row, text, own in zip(rows, together, alone, strict=True):
        with intervene(model, Patch(own, layers=[LAYER], positions="prompt")):
            assert generate(model, [row], Sampling(max_new_tokens=6)) == [text]
    with (
        pytest.raises(InputError, match="being generated has no place"),
        intervene(model, Patch(values, layers=[LAYER])),
    ):
        generate(model, rows, Sampling(max_new_tokens=6))
    with (
        pytest.raises(InputError, match="the rows that are read need"),
        intervene(model, Patch(values[:, :2], layers=[LAYER])),
    ):
        response_logprobs(model, rows)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_generation_is_steered_where_ids_have_no_name(family: str, tmp_path: Path) -> None:
    """GPT-2's head hands its decoder the ids by place; against a plain loop without a cache."""
    other = load_model(str(save_model(tmp_path / "m", family=family)))
    prompts = [other.template.encode_prompt([{"role": "user", "content": "Who? " * n}]) for n in (1, 3)]
    vector = torch.randn(other.d_model, generator=torch.manual_seed(2)) * 3
    with intervene(other, Add(vector, layers=[LAYER], positions="generated")):
        texts = generate(other, prompts, Sampling(max_new_tokens=5))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt.ids)
        for _ in range(5):
            mask = (torch.arange(len(ids)) >= len(prompt.ids)).view(1, -1, 1)
            row = Encoded(tuple(ids), len(ids), 0, "")
            ids.append(int(edited_logits(other, row, lambda h, m=mask: h + m * vector)[-1].argmax()))
        assert text == other.tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True)


def seen_positions(model: ChatModel, prompts: list[Encoded], positions: str) -> list[Tensor]:
    """Which tokens of each forward pass of a generation are edited."""
    changed: list[Tensor] = []
    before: list[Tensor] = []
    vector = torch.ones(model.d_model) * 5
    answered_together(model)  # tries the model out once: these passes are not the ones that are counted
    first = model.blocks[LAYER].register_forward_hook(lambda _m, _i, out: before.append(out.detach().clone()))
    try:
        with intervene(model, Add(vector, layers=[LAYER], positions=positions)):  # type: ignore[arg-type]
            last = model.blocks[LAYER].register_forward_hook(
                lambda _m, _i, out: changed.append((out - before[-1]).abs().sum(-1) > 1)
            )
            generate(model, prompts, Sampling(max_new_tokens=4))
            last.remove()
    finally:
        first.remove()
    return changed


@pytest.mark.parametrize("positions", ["all", "prompt", "prompt_last", "response"])
def test_positions_in_generation_are_exact_under_left_padding(
    model: ChatModel, rows: list[Encoded], positions: str
) -> None:
    prompts = sorted(rows, key=lambda r: -r.n_prompt)
    passes = seen_positions(model, prompts, positions)
    longest = max(r.n_prompt for r in prompts)
    expected = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for i, row in enumerate(prompts):
        if positions in ("all", "prompt"):
            expected[i, longest - row.n_prompt :] = True
        if positions == "prompt_last":
            expected[i, -1] = True
    assert torch.equal(passes[0], expected)
    assert len(passes) == 4
    for later in passes[1:]:
        assert later.shape == (len(prompts), 1)
        assert bool(later.all()) == (positions in ("all", "response"))
        assert bool(later.any()) == (positions in ("all", "response"))


def test_a_steered_row_does_not_depend_on_its_batch(
    model: ChatModel, rows: list[Encoded], vector: Tensor
) -> None:
    with intervene(model, Add(vector, layers=[LAYER], positions="response")):
        texts = [generate(model, rows, Sampling(6, 1.0, batch_size=size)) for size in (1, 4)]
    assert texts[0] == texts[1]
    assert texts[0] != generate(model, rows, Sampling(6, 1.0))


def test_positions_must_be_declared(model: ChatModel, rows: list[Encoded], vector: Tensor) -> None:
    ids = torch.tensor([rows[0].ids])
    with pytest.raises(GuardError, match="does not say which tokens are whose"):  # noqa: SIM117
        with intervene(model, Add(vector, layers=[LAYER], positions="response")):
            model.hf(input_ids=ids)
    wrong = {"response": torch.ones(1, 3, dtype=torch.bool)}
    with pytest.raises(GuardError, match="declared for shape"):  # noqa: SIM117
        with intervene(model, Add(vector, layers=[LAYER], positions="response")), declared(wrong):
            model.hf(input_ids=ids)


def test_every_or_no_token_needs_no_mask() -> None:
    tokens = torch.tensor([[True, False, True]])
    owners = torch.tensor([[4, 4, 7]])
    with declared({"all": True, "response": tokens}, owners):
        assert mask_for("all", (1, 3)) is True
        assert mask_for("prompt", (1, 3)) is False
        assert mask_for("prompt", (1, 3), [4]) is False
        assert mask_for("response", (1, 3)) is tokens
        assert mask_for("all", (1, 3), [4]).tolist() == [[True, True, False]]  # type: ignore[union-attr]
        assert mask_for("response", (1, 3), [4]).tolist() == [[True, False, False]]  # type: ignore[union-attr]
        with pytest.raises(GuardError, match="declared for shape"):
            mask_for("all", (1, 4))


def test_one_batch_holds_steered_and_unsteered_rows(
    model: ChatModel, rows: list[Encoded], vector: Tensor
) -> None:
    plain, greedy = response_logprobs(model, rows), generate(model, rows, Sampling(6))
    with intervene(model, Add(vector, layers=[LAYER], coefficient=2.0)):
        every, all_steered = response_logprobs(model, rows), generate(model, rows, Sampling(6))
    with intervene(model, Add(vector, layers=[LAYER], coefficient=2.0, rows=[1, 4])):
        some, some_steered = response_logprobs(model, rows), generate(model, rows, Sampling(6))
    assert any(a != b for a, b in zip(greedy, all_steered, strict=True))
    for i in range(len(rows)):
        expected = every[i] if i in (1, 4) else plain[i]
        torch.testing.assert_close(some[i], expected, rtol=1e-4, atol=1e-4)
        assert some_steered[i] == (all_steered if i in (1, 4) else greedy)[i]


def test_generated_only_leaves_the_prompt_alone(
    model: ChatModel, rows: list[Encoded], vector: Tensor
) -> None:
    """The first generated token is that of the unsteered model; later ones follow from a steered token."""
    plain = generate(model, rows, Sampling(1))
    add = Add(vector, layers=[LAYER], coefficient=50.0, positions="generated")
    seen: list[int] = []
    handle = model.blocks[LAYER].register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    with intervene(model, add):
        assert [t[: len(p)] for t, p in zip(generate(model, rows, Sampling(5)), plain, strict=True)] == plain
    handle.remove()
    assert seen[0] > 1
    with pytest.raises(GuardError, match="never met a token of its positions"), intervene(model, add):
        response_logprobs(model, rows)

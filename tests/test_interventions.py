"""Interventions do what they say, where they say, and leave nothing behind."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from activations.capture import capture
from mech.chat import Encoded
from mech.conventions import to_transformer_lens_name
from mech.errors import GuardError, InputError
from mech.generate import Sampling, generate, stop_ids
from mech.interventions import Ablate, Add, Cap, Clamp, Patch, increments, intervene, orthogonalised
from mech.models import ChatModel
from mech.score import response_logprobs
from mech.sites import site_width
from probes.direction import Direction
from tests.architectures import random_model
from tests.plain_hooks import LAYER, edited_logits, response_scores


@pytest.mark.parametrize("positions", ["all", "prompt", "prompt_last", "response"])
def test_add_in_scoring_is_the_same_addition_by_hand(
    model: ChatModel, rows: list[Encoded], vector: Tensor, positions: str
) -> None:
    with intervene(model, Add(vector, layers=[LAYER], coefficient=0.5, positions=positions)):  # type: ignore[arg-type]
        ours = response_logprobs(model, rows, token_budget=200)
    for row, score in zip(rows, ours, strict=True):
        spans = {"all": (0, len(row.ids)), "prompt_last": (row.n_prompt - 1, row.n_prompt), **row.spans}
        start, stop = spans[positions]
        mask = torch.zeros(1, len(row.ids), 1)
        mask[:, start:stop] = 1
        expected = response_scores(edited_logits(model, row, lambda h, m=mask: h + m * 0.5 * vector), row)
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


def test_ablate_takes_the_direction_out_and_cap_bounds_it(
    model: ChatModel, rows: list[Encoded], vector: Tensor
) -> None:
    unit = (vector / vector.norm()).numpy()
    plain = capture(model, rows)["resid_post", "prompt_last"][:, LAYER] @ unit
    with intervene(model, Ablate(vector, layers=[LAYER])):
        ablated = capture(model, rows)["resid_post", "prompt_last"][:, LAYER]
    np.testing.assert_allclose(ablated @ unit, 0, atol=1e-4)
    middle = float(np.median(plain))
    with intervene(model, Cap(vector, layers=[LAYER], ceiling=middle)):
        np.testing.assert_allclose(
            capture(model, rows)["resid_post", "prompt_last"][:, LAYER] @ unit,
            np.minimum(plain, middle),
            atol=1e-4,
        )
    with intervene(model, Cap(vector, layers=[LAYER], floor=middle)):
        np.testing.assert_allclose(
            capture(model, rows)["resid_post", "prompt_last"][:, LAYER] @ unit,
            np.maximum(plain, middle),
            atol=1e-4,
        )


def test_a_span_is_taken_out_whole(model: ChatModel, rows: list[Encoded]) -> None:
    """Against numpy's projection; directions that are not orthogonal, ablated one after the other, leave a part."""
    rng = np.random.default_rng(4)
    by_layer = rng.standard_normal((3, model.n_layers, model.d_model)).astype(np.float32)
    by_layer[1] += by_layer[0]
    vectors = [by_layer[0], torch.from_numpy(by_layer[1]), by_layer[2]]
    plain = capture(model, rows)["resid_post", "prompt_last"][:, LAYER]
    q, _ = np.linalg.qr(by_layer[:, LAYER].T)
    found = orthogonalised(vectors)
    np.testing.assert_allclose(
        found[0], by_layer[0] / np.linalg.norm(by_layer[0], axis=-1, keepdims=True), atol=1e-6
    )
    with intervene(model, *(Ablate(v, layers=[LAYER]) for v in found)):
        ablated = capture(model, rows)["resid_post", "prompt_last"][:, LAYER]
    np.testing.assert_allclose(ablated, plain - plain @ q @ q.T, atol=1e-4)
    with intervene(model, *(Ablate(v, layers=[LAYER]) for v in vectors)):
        one_by_one = capture(model, rows)["resid_post", "prompt_last"][:, LAYER]
    assert np.abs(one_by_one @ q).max() > 100 * np.abs(ablated @ q).max()


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        ([np.eye(4)[0], np.eye(4)[1], np.array([1.0, -2, 0, 0])], "vector 2 lies in the span"),
        ([np.eye(4)[0], np.zeros(4)], "one of the vectors is zero or not finite"),
        ([], "no common span"),
        ([np.ones(4), np.ones((3, 5))], "no common span"),
        ([np.ones((2, 4)), np.ones((3, 4))], "no common span"),
    ],
)
def test_vectors_without_a_span_are_refused(vectors: list[np.ndarray], said: str) -> None:
    with pytest.raises(InputError, match=said):
        orthogonalised(vectors)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["cohere2", "falcon", "gpt_oss", "granite", "llama4", "opt", "qwen3_moe"])
def test_generation_on_other_architectures_is_steered_as_by_hand(
    model: ChatModel, name: str, vector: Tensor, *, cache: bool
) -> None:
    """Token by token without a cache: the answer's own tokens are moved; in Granite by what its block adds of a part."""
    other = random_model(name, model)
    other.hf.generation_config.use_cache = cache  # some models ask for none
    site = "attn_out" if name == "granite" else "resid_post"
    prompts = [other.template.encode_prompt([{"role": "user", "content": "Who? " * n}]) for n in (1, 4)]
    part, scale = other.blocks[LAYER], 1.0
    if site == "attn_out":
        part, scale = part.self_attn, part.residual_multiplier  # type: ignore[assignment]
    with intervene(other, Add(vector, [LAYER], site=site, positions="generated")):  # type: ignore[arg-type]
        texts = generate(other, prompts, Sampling(max_new_tokens=6))
    changed = False
    for prompt, text in zip(prompts, texts, strict=True):

        def move(_m: object, _i: object, out: object, start: int = prompt.n_prompt) -> object:
            h = (out[0] if isinstance(out, tuple) else out).clone()  # type: ignore[attr-defined]
            h[:, start:] += vector / scale
            return (h, *out[1:]) if isinstance(out, tuple) else h

        said: dict[bool, list[int]] = {}
        for moved in (True, False):
            ids = list(prompt.ids)
            handle = part.register_forward_hook(move) if moved else None
            for _ in range(6):
                with torch.no_grad():
                    ids.append(
                        int(other.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                    )
            if handle:
                handle.remove()
            said[moved] = ids[prompt.n_prompt :]
        stop = next((i for i, t in enumerate(said[True]) if t in stop_ids(other)), 6)
        assert text == other.tokenizer.decode(said[True][:stop], skip_special_tokens=True)
        changed |= said[True] != said[False]
    assert changed


def test_patch_puts_another_runs_stream_in_place(model: ChatModel, rows: list[Encoded]) -> None:
    ids, other = torch.tensor([rows[0].ids]), torch.tensor([rows[3].ids])
    found: list[Tensor] = []
    handle = model.blocks[LAYER].register_forward_hook(lambda _m, _i, out: found.append(out.detach()))
    expected = model.hf(input_ids=other).logits
    handle.remove()
    assert ids.shape == other.shape
    with intervene(model, Patch(torch.stack(found), layers=[LAYER])):
        torch.testing.assert_close(model.hf(input_ids=ids).logits, expected)
    with (
        pytest.raises(InputError, match="Patch: values have shape"),
        intervene(model, Patch(torch.stack(found), layers=[LAYER])),
    ):
        model.hf(input_ids=ids[:, :-1])


def test_several_act_in_the_order_given(model: ChatModel, rows: list[Encoded], vector: Tensor) -> None:
    unit = (vector / vector.norm()).numpy()
    with intervene(model, Ablate(vector, layers=[LAYER]), Add(vector, layers=[LAYER])):
        h = capture(model, rows)["resid_post", "prompt_last"][:, LAYER]
    np.testing.assert_allclose(h @ unit, float(vector.norm()), rtol=1e-4)
    with intervene(model, Add(vector, layers=[LAYER])), intervene(model, Ablate(vector, layers=[LAYER])):
        h = capture(model, rows)["resid_post", "prompt_last"][:, LAYER]
    np.testing.assert_allclose(h @ unit, 0, atol=1e-4)


def test_a_vector_by_layer_is_indexed_by_layer(model: ChatModel, rows: list[Encoded], vector: Tensor) -> None:
    by_layer = torch.stack([torch.full_like(vector, 9.0), vector, torch.full_like(vector, 7.0)])
    results = []
    for given in (vector, by_layer, by_layer.numpy()):
        with intervene(model, Add(given, layers=[LAYER])):
            results.append(capture(model, rows)["resid_post", "prompt_last"])
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_outputs_are_bit_identical_afterwards_also_after_an_error(
    model: ChatModel, rows: list[Encoded], vector: Tensor
) -> None:
    ids = torch.tensor([rows[0].ids])
    before = model.hf(input_ids=ids).logits
    with intervene(model, Add(vector, layers=[0, 1, 2])):
        assert not torch.equal(before, model.hf(input_ids=ids).logits)
    assert torch.equal(before, model.hf(input_ids=ids).logits)
    with pytest.raises(RuntimeError, match="midway"), intervene(model, Add(vector, layers=[0])):
        raise RuntimeError("midway")
    assert torch.equal(before, model.hf(input_ids=ids).logits)
    assert not any(block._forward_hooks for block in model.blocks)


def test_an_intervention_that_meets_nothing_is_an_error(model: ChatModel, vector: Tensor) -> None:
    with pytest.raises(GuardError, match="Add at layer 1"), intervene(model, Add(vector, layers=[LAYER])):
        pass


def test_what_does_not_fit_is_refused(model: ChatModel, vector: Tensor) -> None:
    def untyped(name: str, value: object) -> Add:
        """As a notebook gives it: these tests check types, users' sessions do not."""
        made = Add(vector, layers=[0])
        object.__setattr__(made, name, value)
        return made

    for wrong, message in (
        (Add(vector[:-1], layers=[0]), "does not fit this model"),
        (Add(vector, layers=[9]), "layers 0 to 2"),
        (Add(vector, layers=[]), "no layers named"),
        (Add(vector * 0, layers=[0]), "zero or not finite"),
        (Add(torch.stack([vector] * 2), layers=[0]), "does not fit this model"),
        (Ablate(vector, layers=[0, 1, 0]), "name one twice"),
        (untyped("layers", 1), r"layers are a list: layers=\[1\]"),
        (
            untyped("vector", Direction("d", vector[None].numpy(), vector[:1].numpy(), 2)),
            r"direction\.vectors",
        ),
    ):
        with pytest.raises(InputError, match=message), intervene(model, wrong):
            pass
    with pytest.raises(InputError, match="a ceiling, a floor, or both"):
        Cap(vector, layers=[0])
    with pytest.raises(InputError, match="above the ceiling"):
        Cap(vector, layers=[0], floor=2.0, ceiling=1.0)


def test_a_vector_that_is_being_learned_gets_its_gradient_on_every_pass(
    model: ChatModel, rows: list[Encoded], vector: Tensor
) -> None:
    """What is prepared once would be freed with the first pass's graph."""
    learned = vector.clone().requires_grad_()
    ids, found = torch.tensor([rows[0].ids]), []
    with intervene(model, Add(learned, layers=[LAYER], coefficient=0.5)):
        for _ in range(2):
            learned.grad = None
            model.hf(input_ids=ids).logits.logsumexp(-1).sum().backward()
            found.append(learned.grad)
    torch.testing.assert_close(found[0], found[1])
    assert found[0].abs().sum() > 0


def test_clamp_sets_the_projection_and_nothing_else(
    model: ChatModel, rows: list[Encoded], vector: Tensor
) -> None:
    unit = (vector / vector.norm()).numpy()
    plain = capture(model, rows)["resid_post", "prompt_last"][:, LAYER]
    with intervene(model, Clamp(vector, layers=[LAYER], value=-2.5)):
        clamped = capture(model, rows)["resid_post", "prompt_last"][:, LAYER]
    np.testing.assert_allclose(clamped @ unit, -2.5, atol=1e-4)
    across = np.eye(len(unit)) - np.outer(unit, unit)
    np.testing.assert_allclose(clamped @ across, plain @ across, atol=1e-4)


def test_a_relative_strength_is_a_fraction_of_each_tokens_norm(
    model: ChatModel, rows: list[Encoded], vector: Tensor
) -> None:
    plain = capture(model, rows, poolings=["tokens"])["resid_post", "tokens"]
    with intervene(model, Add(vector, layers=[LAYER], coefficient=0.1, relative=True)):
        moved = capture(model, rows, poolings=["tokens"])["resid_post", "tokens"]
    for before, after in zip(plain, moved, strict=True):
        change = after[:, LAYER] - before[:, LAYER]
        sizes = np.linalg.norm(before[:, LAYER], axis=1)
        np.testing.assert_allclose(np.linalg.norm(change, axis=1), 0.1 * sizes, rtol=1e-3)


def test_increments_add_up_to_the_vectors() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 7))
    np.testing.assert_allclose(np.cumsum(increments(vectors), axis=0), vectors)


def test_heads_can_be_intervened_on(model: ChatModel, rows: list[Encoded]) -> None:
    vector = torch.randn(site_width(model, "attn_head_out"), generator=torch.Generator().manual_seed(3))
    unit = (vector / vector.norm()).numpy()
    with intervene(model, Ablate(vector, layers=[LAYER], site="attn_head_out")):
        heads = capture(model, rows, sites=["attn_head_out"])["attn_head_out", "prompt_last"]
    np.testing.assert_allclose(heads[:, LAYER] @ unit, 0, atol=1e-4)


def test_add_is_nnsights_and_transformer_lenss_addition(
    model: ChatModel, rows: list[Encoded], vector: Tensor
) -> None:
    import nnsight

    row = rows[0]
    ids = torch.tensor([row.ids])
    with intervene(model, Add(vector, layers=[LAYER], coefficient=0.7)), torch.no_grad():
        ours = model.hf(input_ids=ids).logits
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = model.to_nnsight()
        with traced.trace(input_ids=ids):
            traced.model.layers[LAYER].output[:] = traced.model.layers[LAYER].output + 0.7 * vector
            theirs = nnsight.save(traced.output.logits)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        bridge = model.to_transformer_lens()
        name = to_transformer_lens_name("resid_post", LAYER)
        lens = bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda h, hook: h + 0.7 * vector)])
    torch.testing.assert_close(lens, ours, rtol=1e-3, atol=1e-4)

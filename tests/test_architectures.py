"""Capture and packing on every architecture, found by structure, against plain hooks."""

import copy
from unittest.mock import patch

import numpy as np
import pytest
import torch

from activations.capture import capture
from mech.errors import InputError
from mech.hooks import odd_blocks
from mech.interventions import Add, intervene
from mech.lens import final_norm
from mech.models import ChatModel
from mech.packed_attention import attends_to_everything, can_pack
from mech.packing import Pack
from mech.score import next_token_logits
from mech.sites import SITES
from tests.architectures import (
    GROUPED,
    NEARSIGHTED,
    ODD,
    OWN_ATTENTION,
    WITHOUT_A_PART,
    architectures,
    made,
    random_model,
)
from tests.plain_hooks import assert_close, blocks_output, conversations


@pytest.mark.parametrize("name", sorted(architectures()))
def test_capture_equals_the_blocks_outputs_on_every_architecture(name: str, model: ChatModel) -> None:
    other = random_model(name, model)
    rows = conversations(other)
    assert attends_to_everything(other) == (name not in NEARSIGHTED)
    assert can_pack(other) == (name not in (*NEARSIGHTED, *OWN_ATTENTION))
    ours = capture(other, rows, poolings=["prompt_last", "response_mean"], token_budget=200)
    for i, row in enumerate(rows):
        for layer, h in enumerate(blocks_output(other, row)):
            start, stop = row.spans["response"]
            assert_close(ours["resid_post", "prompt_last"][i, layer], h[row.n_prompt - 1].numpy())
            assert_close(ours["resid_post", "response_mean"][i, layer], h[start:stop].mean(0).numpy())
    logits = next_token_logits(other, rows)
    plain = torch.stack(
        [other.hf(input_ids=torch.tensor([r.ids[: r.n_prompt]])).logits[0, -1].detach() for r in rows]
    )
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-4)
    last = torch.as_tensor(ours["resid_post", "prompt_last"][:, -1])
    with torch.no_grad():
        lens = other.logits(final_norm(other)(last))
    torch.testing.assert_close(lens, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(architectures()))
def test_half_precision_packs_where_float32_does(name: str, model: ChatModel) -> None:
    """Rounding in bfloat16 is as large as what wrong positions change, so it is not what is looked at."""
    half = random_model(name, model)
    half.hf.to(torch.bfloat16)
    with patch.object(Pack, "tensors", _through_the_pack):
        assert not can_pack(half)
    del vars(half)["_can_pack"]
    assert can_pack(half) == (name not in (*NEARSIGHTED, *OWN_ATTENTION))
    assert not odd_blocks(half) or name in ODD
    assert {p.dtype for p in half.hf.parameters()} == {torch.bfloat16}
    assert len(half.blocks) == 3


def _through_the_pack(pack: Pack, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A pack's tokens with wrong positions: counted through all rows."""
    ids = torch.zeros(1, len(pack), dtype=torch.long)
    for row, places in zip(pack.rows, pack.places, strict=True):
        ids[0, list(places)] = torch.tensor(row)
    return ids.to(device), torch.arange(len(pack), device=device).unsqueeze(0)


@pytest.mark.parametrize("name", sorted(set(architectures()) - {*ODD, *WITHOUT_A_PART}))
def test_what_the_parts_add_is_what_the_block_adds(name: str, model: ChatModel) -> None:
    other = random_model(name, model)
    h = capture(other, conversations(other, 3), poolings=["prompt_last"], sites=list(SITES))
    parts = {site: h[site, "prompt_last"] for site in SITES}
    assert_close(parts["resid_pre"] + parts["attn_out"] + parts["mlp_out"], parts["resid_post"])
    assert_close(parts["resid_pre"][:, 1:], parts["resid_post"][:, :-1])


@pytest.mark.parametrize("name", [*ODD, *WITHOUT_A_PART])
def test_parts_that_are_not_what_the_block_adds_are_refused(name: str, model: ChatModel) -> None:
    other = random_model(name, model)
    said = "mlp_out is not supported: what its attention" if name in ODD else "no part for mlp_out; its parts"
    with pytest.raises(InputError, match=said):
        capture(other, conversations(other, 2), sites=["mlp_out"])
    with pytest.raises(InputError, match=said), intervene(other, Add(np.ones(32), [1], site="mlp_out")):
        other.hf(input_ids=torch.tensor([[5, 6]]))


def test_gemma_4_differs_from_hugging_face_by_rounding_alone(model: ChatModel) -> None:
    """Its attention multiplies scores by 1 over heads of 512: rounding grows as in no other architecture, on both sides alike."""
    from transformers import Gemma4TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    single = made(Gemma4TextConfig(**GROUPED, sliding_window=8, layer_types=kinds), model)
    double = ChatModel(copy.deepcopy(single.hf).double(), model.tokenizer, model.checkpoint)
    rows = conversations(single, 4)
    ours, exact = (capture(m, rows, poolings=["tokens"])["resid_post", "tokens"] for m in (single, double))
    for i, row in enumerate(rows):
        for layer, (theirs, true) in enumerate(
            zip(blocks_output(single, row), blocks_output(double, row), strict=True)
        ):
            scale = float(true.abs().max())
            assert np.abs(exact[i][:, layer] - true.numpy()).max() <= 1e-6 * scale
            rounding = float((theirs - true).abs().max())
            assert np.abs(ours[i][:, layer] - true.numpy()).max() <= 3 * rounding + 1e-6 * scale


def test_streams_and_heads_that_differ_are_refused(model: ChatModel) -> None:
    from transformers import Gemma3nTextConfig

    several = Gemma3nTextConfig(**GROUPED, num_kv_shared_layers=0, layer_types=["full_attention"] * 3, laurel_rank=4,
                                vocab_size_per_layer_input=200, hidden_size_per_layer_input=8, altup_num_inputs=2)  # fmt: skip
    other = made(several, model)
    with pytest.raises(InputError, match=r"resid_post at layer 0 has shape .* not \[batch, sequence, d\]"):
        capture(other, conversations(other, 2))
    uneven = ChatModel(copy.deepcopy(model.hf), model.tokenizer, model.checkpoint)
    uneven.blocks[2].self_attn.o_proj = torch.nn.Linear(64, 32)
    with pytest.raises(InputError, match=r"heads differ .64 numbers at layer 2, 32 at layer 0"):
        capture(uneven, conversations(uneven, 2), sites=["attn_head_out"])

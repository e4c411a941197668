"""Capture and packing on every architecture, found by structure, against plain hooks."""

from unittest.mock import patch

import pytest
import torch

from activations.capture import capture
from mech.models import ChatModel
from mech.packed_attention import attends_to_everything, can_pack
from mech.packing import Pack
from mech.score import next_token_logits
from mech.sites import SITES
from tests.architectures import architectures, random_model
from tests.plain_hooks import assert_close, blocks_output, conversations


@pytest.mark.parametrize("name", sorted(architectures()))
def test_capture_equals_the_blocks_outputs_on_every_architecture(name: str, model: ChatModel) -> None:
    other = random_model(name, model)
    rows = conversations(other)
    assert attends_to_everything(other) == (name not in ("mistral-sliding", "gemma2", "gemma3"))
    assert can_pack(other) == attends_to_everything(other)
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


@pytest.mark.parametrize("name", sorted(architectures()))
def test_half_precision_packs_where_float32_does(name: str, model: ChatModel) -> None:
    """Rounding in bfloat16 is as large as what wrong positions change, so it is not what is looked at."""
    half = random_model(name, model)
    half.hf.to(torch.bfloat16)
    with patch.object(Pack, "tensors", _through_the_pack):
        assert not can_pack(half)
    del vars(half)["_can_pack"]
    assert can_pack(half) == attends_to_everything(half)
    assert {p.dtype for p in half.hf.parameters()} == {torch.bfloat16}
    assert len(half.blocks) == 3


def _through_the_pack(pack: Pack, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A pack's tokens with wrong positions: counted through all rows."""
    ids = torch.zeros(1, len(pack), dtype=torch.long)
    for row, places in zip(pack.rows, pack.places, strict=True):
        ids[0, list(places)] = torch.tensor(row)
    return ids.to(device), torch.arange(len(pack), device=device).unsqueeze(0)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3", "glm4", "gpt2", "gpt_neox", "mixtral", "olmo2", "qwen3", "seed_oss"]
)
def test_what_the_parts_add_is_what_the_block_adds(name: str, model: ChatModel) -> None:
    other = random_model(name, model)
    h = capture(other, conversations(other, 3), poolings=["prompt_last"], sites=list(SITES))
    parts = {site: h[site, "prompt_last"] for site in SITES}
    assert_close(parts["resid_pre"] + parts["attn_out"] + parts["mlp_out"], parts["resid_post"])
    assert_close(parts["resid_pre"][:, 1:], parts["resid_post"][:, :-1])

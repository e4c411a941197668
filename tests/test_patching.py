"""Patching between base and finetuned: everything patched is the other model, and a planted change is found where it is."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from mech.adapters import adapter_layers
from mech.errors import InputError
from mech.models import ChatModel
from mech.patching import answer_logprob, logit_difference, patch_between
from mech.score import response_logprobs
from tests.plain_hooks import conversations


def test_patching_everything_at_the_last_layer_is_the_other_model(live: ChatModel) -> None:
    row = conversations(live, 1)[0]
    found = patch_between(live, row, answer_logprob(row), spans=[(0, len(row.ids)), (0, row.n_prompt - 1)])
    with adapter_layers(live, []):
        expected = float(response_logprobs(live, [row])[0].sum())
    assert found.base == pytest.approx(expected, rel=1e-4)
    assert found.into_finetuned[-1, 0] == pytest.approx(found.base, rel=1e-5)
    assert found.into_base[-1, 0] == pytest.approx(found.finetuned, rel=1e-5)
    assert found.undone[-1, 0] == pytest.approx(1, abs=1e-4)
    # At the last layer the prompt's earlier tokens reach nobody any more.
    assert found.into_finetuned[-1, 1] == pytest.approx(found.finetuned, rel=1e-5)
    assert found.undone.shape == (3, 2)


def test_a_planted_change_is_found_at_its_layer(folder: Path, live: ChatModel) -> None:
    """Only block 1's adapter is on: the base's stream put in above it undoes everything, below it nothing."""
    only = copy.deepcopy(live)
    with torch.no_grad():
        for update in (0, 2):
            for name, p in only.blocks[update].named_parameters():
                if "lora_B" in name:
                    p.zero_()
    row = conversations(live, 2)[1]
    found = patch_between(only, row, logit_difference(5, 9))
    np.testing.assert_allclose(found.undone[:, 0], [0, 1, 1], atol=1e-3)
    np.testing.assert_allclose(found.brought[:, 0], [0, 1, 1], atol=1e-3)
    with pytest.raises(InputError, match="lies outside the row"):
        patch_between(only, row, logit_difference(5, 9), spans=[(0, 999)])

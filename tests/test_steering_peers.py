"""`Add` is steering-vectors' and repeng's addition: same vector, layers and strength, same logits.

They need an older transformers than ours, so they run in an interpreter of their own, named by SGTR_MECH_STEERING_PEERS
(docs/steering.md says how to make one).
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mech.interventions import Add, intervene
from mech.models import load_model
from mech.positions import declared
from probes.direction import Direction
from probes.files import write_direction
from tests.tiny_study import save_model

PEERS = os.environ.get("SGTR_MECH_STEERING_PEERS")


@pytest.mark.skipif(
    not PEERS, reason="SGTR_MECH_STEERING_PEERS names no interpreter with steering-vectors and repeng"
)
@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_add_is_the_peers_addition(tmp_path: Path, layers: list[int]) -> None:
    model = load_model(str(save_model(tmp_path / "m")))
    vectors = 3 * np.random.default_rng(0).standard_normal((3, model.d_model)).astype(np.float32)
    vectors[0] = 0  # a control-vector file has no layer 0
    ids, first, coefficient = (
        torch.tensor([model.template.ids("the cat went to see the dog by the river")]),
        4,
        1.5,
    )
    save_file({"ids": ids, "vectors": torch.from_numpy(vectors)}, tmp_path / "given.safetensors")
    write_direction(Direction("v", vectors, np.ones(3, np.float32), 2), tmp_path / "control.gguf")
    (tmp_path / "asked.json").write_text(
        json.dumps({"layers": layers, "coefficient": coefficient, "first": first})
    )
    script = Path(__file__).with_name("peer_steering.py")
    done = subprocess.run([str(PEERS), str(script), str(tmp_path)], capture_output=True, text=True, check=False,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peers = load_file(tmp_path / "peers.safetensors")
    late = torch.arange(ids.shape[1])[None] >= first
    ours = {"plain": model.hf(input_ids=ids).logits}
    with intervene(model, Add(vectors, layers=layers, coefficient=coefficient)):
        ours["repeng"] = ours["steering_vectors"] = model.hf(input_ids=ids).logits
    with (
        intervene(model, Add(vectors, layers=layers, coefficient=coefficient, positions="response")),
        declared({"response": late}),
    ):
        ours["steering_vectors_late"] = model.hf(input_ids=ids).logits
    assert (ours["repeng"] - ours["plain"]).abs().max() > 0.1
    for name, logits in ours.items():
        worst = float((logits - peers[name]).abs().max().detach())
        print(f"layers {layers}: largest difference of a logit from {name} {worst:.1e}")
        assert worst < 1e-5, name

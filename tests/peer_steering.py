"""Run by another interpreter, which has steering-vectors and repeng: the logits that these libraries give under steering.

    PYTHON tests/peer_steering.py FOLDER

FOLDER holds a model (`m`), `given.safetensors` (ids [1, n], vectors [layers, d]), `control.gguf` (the same vectors) and
`asked.json` (coefficient, layers, first). Written: `peers.safetensors`, logits by library. Nothing of ours is imported.
"""

import json
import sys
from pathlib import Path

import torch
from repeng import ControlModel, ControlVector
from safetensors.torch import load_file, save_file
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(folder: Path) -> None:
    given = load_file(folder / "given.safetensors")
    asked = json.loads((folder / "asked.json").read_text())
    ids, layers, coefficient = given["ids"], asked["layers"], asked["coefficient"]
    model = AutoModelForCausalLM.from_pretrained(folder / "m", dtype=torch.float32).eval()
    found = {"plain": model(ids).logits}
    steering = SteeringVector({layer: given["vectors"][layer] for layer in layers})
    with steering.apply(model, multiplier=coefficient):
        found["steering_vectors"] = model(ids).logits
    with steering.apply(model, multiplier=coefficient, min_token_index=asked["first"]):
        found["steering_vectors_late"] = model(ids).logits
    controlled = ControlModel(model, layers)
    controlled.set_control(ControlVector.import_gguf(folder / "control.gguf"), coefficient)
    found["repeng"] = controlled(ids).logits
    save_file({name: logits.contiguous() for name, logits in found.items()}, folder / "peers.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Kills captures at random moments; run as a program, for it forks: `python -m tests.kill_captures FOLDER KILLS`.

Prints JSON: how often a capture was killed, how often it was already done, and whether what it left in the end is, byte for
byte, what an undisturbed capture leaves.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from activations.capture import Reading
from activations.capture_store import Storing, capture_store
from activations.store import ActivationStore
from activations.store_format import Rows
from mech.models import ChatModel, load_model
from tests.tiny_study import save_model

N = 60


def run(folder: Path, model: ChatModel) -> None:
    """One capture: seven shards, two poolings, every token, notes."""
    turns = [[{"role": "user", "content": f"Number {i * i}?"}, {"role": "assistant", "content": "the cat " * (1 + i % 5)}] for i in range(N)]  # fmt: skip
    encoded = [model.template.encode(t) for t in turns]
    rows = Rows([str(i) for i in range(N)], [f"q{i // 2}" for i in range(N)], {"sign": np.arange(N)},
                [np.array(e.ids) for e in encoded])  # fmt: skip
    reading = Reading(("prompt_last", "tokens"), ("resid_post", "attn_head_out"), (0, 2), frozenset(("surprisal", "norms")))  # fmt: skip
    capture_store(folder, model, rows, encoded, reading, storing=Storing(shard_rows=9, token_budget=256))


def contents(folder: Path) -> dict[str, bytes]:
    """Every dataset's bytes, and the folder's files."""
    found: dict[str, bytes] = {"": " ".join(sorted(p.name for p in folder.iterdir())).encode()}
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path, "r") as file:
            file.visititems(lambda name, item, of=path.name: found.update({f"{of}/{name}": item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None)  # fmt: skip
    return found


def main() -> None:
    """Kill, start again, kill again, and compare."""
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    model = load_model(str(save_model(folder / "model")))
    start = time.perf_counter()
    run(folder / "undisturbed", model)
    takes = time.perf_counter() - start
    expected, rng = contents(folder / "undisturbed"), random.Random(0)
    killed = finished = different = runs = 0
    while killed < kills:
        target = folder / f"killed{runs}"
        runs += 1
        while True:
            child = os.fork()
            if not child:
                run(target, model)
                os._exit(0)
            time.sleep(rng.uniform(0, takes))
            os.kill(child, signal.SIGKILL)
            if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                killed += 1
            if (target / "manifest.json").is_file():
                finished += 1
                break
        run(target, model)  # finds everything there
        with ActivationStore.open(target) as store:
            different += store.n_rows != N or bool(store.verify())
        different += contents(target) != expected
    print(json.dumps({"killed": killed, "finished": finished, "different": different}))


if __name__ == "__main__":
    main()

"""How fast all layers' residual stream is captured, beside the tools one would otherwise take, in float32 and in bfloat16.

    python bench/capture.py --json capture.json
    python bench/capture.py --system-prompt none      # rows without a shared beginning
    python bench/capture.py --dtypes float32          # that alone

Every side captures the response-mean of every block's output, for the same rows, with the same model in memory, in turns. Times are
medians over rounds; `ours is faster by` is the median over rounds of a peer's time over ours in the same round and precision. Peers take
the rows as they come, eight at a time. Peak memory is each side's own, in a process of its own, above the loaded model. `bare forward` is
the least that a pass can cost: the blocks alone, batched by length, nothing captured. nnsight and TransformerLens run in the first
precision only.

Every side is compared with Hugging Face's `hidden_states` in the first precision before it is timed. What a lower precision costs is said
in three numbers: the largest difference from that reference, relative to its layer's largest entry; the median over rows and layers
of a vector's relative distance from it; and the smallest cosine over layers between the first trait's direction (mean of the rows for it
minus mean of those against it) and the reference's.
"""

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from table import show, write_json

SIDES = ("ours", "hidden_states", "nnsight", "transformer_lens", "bare forward")
IN_EVERY_DTYPE = ("ours", "hidden_states", "bare forward")
BATCH = 8
COLUMNS = (
    ("side", "side", ""),
    ("dtype", "dtype", ""),
    ("tokens_per_s", "tokens/s", ".0f"),
    ("ratio", "ours is faster by", ".2f"),
    ("mb_above_model", "MB above model", ".0f"),
    ("largest", "largest", ".1e"),
    ("median", "median", ".1e"),
    ("cosine", "cosine", ".6f"),
)

Run = tuple[str, str]
"""A side and its precision."""


def main() -> None:
    """Run the sides in turns, print the table, and write it as JSON where asked."""
    args = arguments()
    if args.side:
        model, rows, _ = load(args, args.dtypes[0])
        print(json.dumps(peak_above_model(args.side, model, rows)))
        return
    runs: dict[Run, Callable[[], np.ndarray | None]] = {}
    for dtype in args.dtypes:
        model, rows, signs = load(args, dtype)
        for side in SIDES if dtype == args.dtypes[0] else IN_EVERY_DTYPE:
            runs[side, dtype] = prepare(side, model, rows)
    differences = compare({which: run() for which, run in runs.items()}, signs)  # also warms every side up
    times: dict[Run, list[float]] = {which: [] for which in runs}
    for _ in range(args.rounds):
        for which, run in runs.items():
            start = time.perf_counter()
            run()
            times[which].append(time.perf_counter() - start)
    report(args, times, differences, len(rows), sum(len(r.ids) for r in rows))


def report(
    args: argparse.Namespace,
    times: dict[Run, list[float]],
    differences: dict[Run, dict[str, float]],
    n_rows: int,
    tokens: int,
) -> None:
    """Print the table, and write it as JSON where asked."""
    table = [
        {
            "side": side,
            "dtype": dtype,
            "tokens_per_s": tokens / median(times[side, dtype]),
            "ratio": median(t / o for t, o in zip(times[side, dtype], times["ours", dtype], strict=True)),
            "mb_above_model": memory(args, side, dtype),
            **differences.get((side, dtype), {}),
        }
        for side, dtype in times
    ]
    versions = ("torch", "transformers", "nnsight", "transformer-lens")
    machine = ", ".join(
        [platform.machine(), f"{os.cpu_count()} cores", *(f"{name} {version(name)}" for name in versions)]
    )
    print(
        f"{args.model}, {n_rows} rows, {tokens} tokens, {args.system_prompt}, {args.rounds} rounds; {machine}"
    )
    show(table, COLUMNS)
    facts = {k: v for k, v in vars(args).items() if k not in ("json", "side")}
    seconds = {f"{side} {dtype}": of for (side, dtype), of in times.items()}
    write_json(args.json, {**facts, "machine": machine, "table": table, "seconds": seconds})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--system-prompt", default="default", help="`none` leaves rows without a shared beginning"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="the first is the reference"
    )
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def load(args: argparse.Namespace, dtype: str) -> tuple[Any, list[Any], np.ndarray]:
    """The model, conversations of about a hundred tokens, and a sign for each.

    Conversations are written answers to the traits' questions; the sign is +1 or -1 for those of the first trait, else 0.
    """
    from mech.chat import SystemPrompt
    from mech.models import load_model
    from probes.persona import load_trait, text_contrast

    model = load_model(args.model, dtype=dtype)
    model.check_head()  # a forward pass: weights that are mapped from the file are now in memory
    condition = SystemPrompt.parse(args.system_prompt)
    rows = [
        (r.encoded, r.sign * (not i))
        for i, t in enumerate(("evil", "impolite", "humorous", "optimistic"))
        for r in text_contrast(model.template, load_trait(t), condition)
    ]
    encoded, signs = zip(*rows[: args.rows], strict=True)
    return model, list(encoded), np.array(signs)


def prepare(side: str, model: Any, rows: Sequence[Any]) -> Callable[[], np.ndarray | None]:
    """A function that captures all rows once: [rows, layers, d], or None for the bare forward."""
    makers = {
        "ours": lambda: lambda: ours(model, rows),
        "hidden_states": lambda: lambda: hidden_states(model, rows),
        "nnsight": lambda: nnsight_side(model, rows),
        "transformer_lens": lambda: transformer_lens_side(model, rows),
        "bare forward": lambda: lambda: bare(model, rows),
    }
    return makers[side]()


def ours(model: Any, rows: Sequence[Any]) -> np.ndarray:
    """`activations.capture`."""
    from activations.capture import capture

    return capture(model, rows, poolings=["response_mean"])["resid_post", "response_mean"]


def batches(model: Any, rows: Sequence[Any], *, by_length: bool = False) -> Any:
    """Rows eight at a time, padded on the right, with averaging weights over each response."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids)) if by_length else list(range(len(rows)))
    for start in range(0, len(order), BATCH):
        members = order[start : start + BATCH]
        longest = max(len(rows[i].ids) for i in members)
        ids = torch.full((len(members), longest), model.tokenizer.pad_token_id or 0)
        mask, weights = torch.zeros_like(ids), torch.zeros(len(members), longest)
        for at, i in enumerate(members):
            begin, end = rows[i].spans["response"]
            ids[at, : len(rows[i].ids)], mask[at, : len(rows[i].ids)] = torch.tensor(rows[i].ids), 1
            weights[at, begin:end] = 1 / (end - begin)
        yield members, ids, mask, weights


def pooled(h: Any, weights: Any) -> Any:
    """Mean over each row's response, in float32."""
    return (h.float() * weights.unsqueeze(-1)).sum(1)


def hidden_states(model: Any, rows: Sequence[Any]) -> np.ndarray:
    """`output_hidden_states=True`, whose last entry is after the final norm: that layer is read by a hook."""
    import torch

    found = np.zeros((len(rows), model.n_layers, model.d_model), dtype=np.float32)
    last: list[Any] = []
    handle = model.blocks[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        with torch.no_grad():
            for members, ids, mask, weights in batches(model, rows):
                states = model.hf(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
                stream = [*states[1:-1], last.pop()]
                found[members] = torch.stack([pooled(h, weights) for h in stream], 1).numpy()
    finally:
        handle.remove()
    return found


def nnsight_side(model: Any, rows: Sequence[Any]) -> Callable[[], np.ndarray]:
    """Nnsight's wrapper of the same model, every block's output saved."""
    import nnsight
    import torch
    from nnsight import TransformersModel

    traced = TransformersModel(model.hf, tokenizer=copy.deepcopy(model.tokenizer), task="text-generation")

    def run() -> np.ndarray:
        found = np.zeros((len(rows), model.n_layers, model.d_model), dtype=np.float32)
        with torch.no_grad():
            for members, ids, mask, weights in batches(model, rows):
                with traced.trace({"input_ids": ids, "attention_mask": mask}):
                    stream = nnsight.save([block.output for block in traced.model.layers])
                kept = [h[0] if isinstance(h, tuple) else h for h in stream]
                found[members] = torch.stack([pooled(h, weights) for h in kept], 1).numpy()
        return found

    return run


def transformer_lens_side(model: Any, rows: Sequence[Any]) -> Callable[[], np.ndarray]:
    """TransformerLens's bridge around a copy (it changes the model that it is given)."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        str(model.checkpoint.path),
        hf_model=copy.deepcopy(model.hf),
        tokenizer=copy.deepcopy(model.tokenizer),
        device="cpu",
    )
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]

    def run() -> np.ndarray:
        found = np.zeros((len(rows), model.n_layers, model.d_model), dtype=np.float32)
        with torch.no_grad():
            for members, ids, mask, weights in batches(model, rows):
                _, cache = bridge.run_with_cache(ids, attention_mask=mask, names_filter=lambda n: n in names)
                found[members] = torch.stack([pooled(cache[n], weights) for n in names], 1).numpy()
        return found

    return run


def bare(model: Any, rows: Sequence[Any]) -> None:
    """The blocks alone, rows of similar length together: what a pass costs at least."""
    import torch

    with torch.no_grad():
        for _, ids, mask, _ in batches(model, rows, by_length=True):
            model.decoder(input_ids=ids, attention_mask=mask, use_cache=False)


def compare(found: dict[Run, np.ndarray | None], signs: np.ndarray) -> dict[Run, dict[str, float]]:
    """How far each run is from `hidden_states` in the first precision (see the top of this file)."""
    first = next(iter(found))[1]
    reference = found["hidden_states", first]
    assert reference is not None
    scale = np.abs(reference).max(axis=(0, 2), keepdims=True)
    length = np.linalg.norm(reference, axis=-1)

    def direction(h: np.ndarray) -> np.ndarray:
        difference = h[signs > 0].mean(0) - h[signs < 0].mean(0)
        return difference / np.linalg.norm(difference, axis=-1, keepdims=True)

    return {
        which: {
            "largest": float((np.abs(h - reference) / scale).max()),
            "median": float(np.median(np.linalg.norm(h - reference, axis=-1) / length)),
            "cosine": float((direction(h) * direction(reference)).sum(-1).min()),
        }
        for which, h in found.items()
        if h is not None and which != ("hidden_states", first)
    }


def memory(args: argparse.Namespace, side: str, dtype: str) -> float:
    """Peak megabytes above the loaded model, in a fresh process."""
    own = ("json", "side", "dtypes")
    given = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k not in own]
    done = subprocess.run(
        [sys.executable, __file__, *given, f"--side={side}", f"--dtypes={dtype}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_above_model(side: str, model: Any, rows: Sequence[Any]) -> float:
    """Megabytes by which one run raises this process's largest resident size."""
    run = prepare(side, model, rows)  # a peer's own copy of the model is made here
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that loading left behind
    loaded = resident("VmRSS")
    run()
    return (resident("VmHWM") - loaded) / 1024


def resident(field: str) -> int:
    """A line of this process's status (Linux), in kilobytes: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()

"""How fast all layers' residual stream is captured, beside the tools one would otherwise take, in float32 and in bfloat16.

    python bench/capture.py --json capture.json
    python bench/capture.py --system-prompt none      # rows without a shared beginning
    python bench/capture.py --dtypes float32          # that alone
    python bench/capture.py --device cuda --shape qwen2.5-32b --dtypes bfloat16 --rows 320

Every side captures the response-mean of every block's output, for the same rows, with the same model in memory, in turns. Times are
medians over rounds; `ours is faster by` is the median over rounds of a peer's time over ours in the same round and precision. Peers take
the rows as they come, eight at a time. Peak memory is each side's own above the loaded model (and a peer's copy of it): of a process of its
own, or of the GPU's allocator. `bare forward` is the least that a pass can cost: the blocks alone, batched by length, nothing captured.
nnsight and TransformerLens run in the first precision only.

Every side is compared with Hugging Face's `hidden_states` in the first precision before it is timed. What a lower precision costs is said
in three numbers: the largest difference from that reference, relative to its layer's largest entry; the median over rows and layers
of a vector's relative distance from it; and the smallest cosine over layers between the first trait's direction (mean of the rows for it
minus mean of those against it) and the reference's.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from capture_sides import SIDES, load, prepare
from shapes import SHAPES, machine_named, peak_above
from table import show, write_json

IN_EVERY_DTYPE = ("ours", "hidden_states", "bare forward")
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
        run = prepare(
            args.side, model, rows, args.token_budget
        )  # a peer's own copy of the model is made here
        print(json.dumps(peak_above(args.device, run)))
        return
    runs: dict[Run, Callable[[], np.ndarray | None]] = {}
    for dtype in args.dtypes:
        model, rows, signs = load(args, dtype)
        for side in args.sides:
            if side in IN_EVERY_DTYPE or dtype == args.dtypes[0]:
                runs[side, dtype] = prepare(side, model, rows, args.token_budget)
    differences = compare({which: run() for which, run in runs.items()}, signs)  # also warms every side up
    times: dict[Run, list[float]] = {which: [] for which in runs}
    for _ in range(args.rounds):
        for which, run in runs.items():
            start = time.perf_counter()
            run()
            times[which].append(time.perf_counter() - start)
    peaks = {(side, dtype): memory(args, side, dtype, run) for (side, dtype), run in runs.items()}
    report(args, times, peaks, differences, rows)


def report(
    args: argparse.Namespace,
    times: dict[Run, list[float]],
    peaks: dict[Run, float],
    differences: dict[Run, dict[str, float]],
    rows: Sequence[Any],
) -> None:
    """Print the table, and write it as JSON where asked."""
    tokens = sum(len(r.ids) for r in rows)
    table = [
        {
            "side": side,
            "dtype": dtype,
            "tokens_per_s": tokens / median(of),
            "ratio": median(t / o for t, o in zip(of, times["ours", dtype], strict=True)),
            "mb_above_model": peaks[side, dtype],
            **differences.get((side, dtype), {}),
        }
        for (side, dtype), of in times.items()
    ]
    machine = machine_named(args.device, "nnsight", "transformer-lens")
    what = f"{args.shape or args.model}, {len(rows)} rows, {tokens} tokens, {args.system_prompt}, {args.rounds} rounds"
    print(f"{what}; {machine}")
    show(table, COLUMNS)
    facts = {k: v for k, v in vars(args).items() if k not in ("json", "side")}
    seconds = {f"{side} {dtype}": of for (side, dtype), of in times.items()}
    write_json(args.json, {**facts, "machine": machine, "table": table, "seconds": seconds})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights of this shape, with --model's tokenizer"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--system-prompt", default="default", help="`none`: rows without a shared beginning")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="the first is the reference"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--token-budget", type=int, default=1024, help="tokens a pass, ours alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


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


def memory(args: argparse.Namespace, side: str, dtype: str, run: Callable[[], object]) -> float:
    """Peak megabytes above the loaded model: on a GPU of this very run, else of one in a fresh process."""
    if args.device.startswith("cuda"):
        return peak_above(args.device, run)
    own = ("json", "side", "dtypes", "sides")
    given = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k not in own and v is not None]
    done = subprocess.run(
        [sys.executable, __file__, *given, f"--side={side}", f"--dtypes={dtype}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()

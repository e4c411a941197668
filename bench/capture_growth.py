"""How the cost of a capture grows with rows, layers and length; and every token of every layer, written to disk.

    python bench/capture_growth.py --json growth.json

Growth: `activations.capture` and Hugging Face's `output_hidden_states` at a base size and at twice its rows, layers and length, in
turns, median ratios within rounds. Memory: peak above the loaded model of `capture_store`, each number of rows in a process of its
own. Disk: `capture_store` with the pooling `tokens`, the same forward passes with nothing kept, the same shard written by the
thread that computes, and the same bytes written plainly (with fsync).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from capture_sides import hidden_states, load
from shapes import SHAPES, machine_named, peak_above
from table import show, write_json

BASE_ROWS = 32


def main() -> None:
    """Run everything, print the tables, and write them as JSON where asked."""
    args = arguments()
    model, conversations, _ = load(args, args.dtype)
    if args.rows_in_memory:
        print(json.dumps(peak_of_store(args, model, repeated(conversations, args.rows_in_memory))))
        return
    found = {
        "growth": growth(args, model, conversations),
        "memory": memory(args, model, conversations),
        "disk": disk(args, model, conversations),
    }
    machine = machine_named(args.device)
    print(f"{args.shape or args.model}, {args.dtype}, {args.rounds} rounds; {machine}")
    for what, ratios in found["growth"].items():
        print(f"{what:<12}" + "".join(f"  {side} {ratio:.2f} x" for side, ratio in ratios.items()))
    for rows, mb in found["memory"].items():
        print(f"{rows:>5} rows     {mb:.0f} MB above the model")
    disks = [{"side": side, **facts} for side, facts in found["disk"].items()]
    show(disks, (("side", "every token to disk", ""), ("seconds", "s", ".2f"), ("mb_per_s", "MB/s", ".0f")))
    facts = {k: v for k, v in vars(args).items() if k not in ("json", "rows_in_memory")}
    write_json(args.json, {**facts, "machine": machine, **found})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--system-prompt", default="default")
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights of this shape, with --model's tokenizer"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=4 * BASE_ROWS, help="conversations to take rows from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows-in-memory", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run by round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def growth(args: argparse.Namespace, model: Any, rows: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Time at twice the rows, layers or length over the time at the base."""
    from activations.capture import capture

    half = tuple(range(model.n_layers // 2))

    def ours(some: Sequence[Any], layers: Sequence[int]) -> Callable[[], Any]:
        return lambda: capture(model, some, poolings=["response_mean"], layers=layers)

    def theirs(some: Sequence[Any]) -> Callable[[], Any]:
        return lambda: hidden_states(model, some)

    few, many, long = (
        rows[:BASE_ROWS],
        rows[: 2 * BASE_ROWS],
        [twice_as_long(model, r) for r in rows[:BASE_ROWS]],
    )
    runs = {
        "base": ours(few, half),
        "rows": ours(many, half),
        "layers": ours(few, range(model.n_layers)),
        "length": ours(long, half),
        "hf base": theirs(few),
        "hf rows": theirs(many),
        "hf length": theirs(long),
    }
    times = timed(runs, args.rounds)

    def ratio(name: str, base: str) -> float:
        return median(a / b for a, b in zip(times[name], times[base], strict=True))

    return {
        "rows x 2": {"ours": ratio("rows", "base"), "hidden_states": ratio("hf rows", "hf base")},
        "layers x 2": {"ours": ratio("layers", "base")},
        "length x 2": {"ours": ratio("length", "base"), "hidden_states": ratio("hf length", "hf base")},
    }  # fmt: skip


def twice_as_long(model: Any, row: Any) -> Any:
    """The row with its answer lengthened until it has twice as many tokens."""
    extra = tuple(np.random.default_rng(len(row.ids)).integers(100, 10_000, len(row.ids)).tolist())
    return replace(row, ids=row.ids + extra, n_response=row.n_response + len(extra))


def repeated(rows: Sequence[Any], n: int) -> list[Any]:
    """So many rows, none of them like another: a first token of its own keeps rows from being run once for several."""
    return [replace(rows[i % len(rows)], ids=(100 + i, *rows[i % len(rows)].ids[1:])) for i in range(n)]


def memory(args: argparse.Namespace, model: Any, conversations: Sequence[Any]) -> dict[int, float]:
    """Peak megabytes above the model by number of rows, off a GPU each in a fresh process.

    The C library keeps freed blocks of many sizes for later, 40 to 400 MB of them by chance: it is told to give large ones back.
    """
    frugal = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    given = [f"--model={args.model}", f"--dtype={args.dtype}", f"--system-prompt={args.system_prompt}"]
    sizes = [factor * BASE_ROWS for factor in (2, 4, 8, 16)]
    if args.device.startswith("cuda"):
        return {n: peak_of_store(args, model, repeated(conversations, n)) for n in sizes}
    found = {}
    for n in sizes:
        done = subprocess.run(
            [sys.executable, __file__, *given, f"--rows-in-memory={n}"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | frugal,
        )
        if done.returncode:
            raise SystemExit(f"{n} rows failed:\n{done.stderr[-3000:]}")
        found[n] = float(json.loads(done.stdout.splitlines()[-1]))
    return found


def peak_of_store(args: argparse.Namespace, model: Any, rows: Sequence[Any]) -> float:
    """Megabytes by which capturing into a folder raises what is held."""
    with tempfile.TemporaryDirectory() as folder:
        to_store(model, rows[:2], "response_mean", Path(folder) / "warm")
        return peak_above(args.device, lambda: to_store(model, rows, "response_mean", Path(folder) / "store"))


def named(rows: Sequence[Any]) -> Any:
    """Names for rows that have none."""
    from activations.store import Rows

    ids = tuple(f"r{i}" for i in range(len(rows)))
    return Rows(ids, ids, {}, tuple(np.array(r.ids) for r in rows))


def to_store(model: Any, rows: Sequence[Any], pooling: str, folder: Path) -> None:
    """`capture_store`: all layers, float32."""
    from activations.capture import Reading
    from activations.capture_store import capture_store

    reading = Reading((pooling,), ("resid_post",), tuple(range(model.n_layers)))
    capture_store(folder, model, named(rows), rows, reading)


def in_one_thread(model: Any, rows: Sequence[Any], path: Path) -> None:
    """The same shard, written between forward passes."""
    from activations.capture import Reading, capture_into
    from activations.store import ShardWriter

    reading = Reading(("tokens",), ("resid_post",), tuple(range(model.n_layers)))
    writer = ShardWriter(
        path, metadata={}, rows=named(rows), sites=reading.sites, poolings=reading.poolings, layers=reading.layers,
        d_model=model.d_model,
    )  # fmt: skip
    with writer as sink:
        capture_into(sink, model, rows, reading)


class Nowhere:
    """A sink that keeps nothing."""

    def write(self, *_: Any) -> None:
        """Drop it."""

    def note(self, *_: Any) -> None:
        """Drop it."""


def disk(args: argparse.Namespace, model: Any, rows: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Seconds and MB/s of every token of every layer of the base rows, on the temporary folder's disk."""
    from activations.capture import Reading, capture_into

    some = rows[:BASE_ROWS]
    reading = Reading(("tokens",), ("resid_post",), tuple(range(model.n_layers)))
    total = sum(len(r.ids) for r in some) * model.n_layers * model.d_model * 4
    block = np.random.default_rng(0).bytes(1 << 20)
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), iter(range(10**6))

        def plain() -> None:
            with (folder / f"plain{next(count)}").open("wb") as out:
                for _ in range(total >> 20):
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())

        runs = {
            "capture_store": lambda: to_store(model, some, "tokens", folder / f"store{next(count)}"),
            "one thread": lambda: in_one_thread(model, some, folder / f"one{next(count)}.h5"),
            "forward passes alone": lambda: capture_into(Nowhere(), model, some, reading),
            "plain write and fsync": plain,
        }
        times = timed(runs, args.rounds)
    return {
        side: {"seconds": median(taken), "mb_per_s": total / 1e6 / median(taken)}
        for side, taken in times.items()
    }


if __name__ == "__main__":
    main()

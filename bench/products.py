"""How fast this machine multiplies matrices in float32 by oneDNN (`mech.products`) and as torch does by itself.

    python bench/products.py --json products.json

Shapes are those of a pass: tokens × width into width, into thrice width, into a LoRA's rank, and back. Both sides take turns in
one run, on one thread; times are the process's own, medians over rounds, `ratio` the median within rounds.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from table import show, write_json

from mech.products import product

COLUMNS = (
    ("product", "product", ""),
    ("torch", "torch, GFLOP/s", ".0f"),
    ("onednn", "oneDNN, GFLOP/s", ".0f"),
    ("ratio", "ratio", ".2f"),
)


def main() -> None:
    """Run, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[400, 1000])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = [
        row for n in args.tokens for d_in, d_out in shapes(args) for row in compare(args, n, d_in, d_out)
    ]
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}"
    print(machine)
    show(table, COLUMNS)
    write_json(args.json, {"machine": machine, "table": table})


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Input and output widths."""
    d = args.width
    return [(d, d), (d, 3 * d), (3 * d, d), (d, args.rank)]


def compare(args: argparse.Namespace, tokens: int, d_in: int, d_out: int) -> list[dict[str, object]]:
    """Forward (x Wᵀ) and back (dy W)."""
    rng = torch.Generator().manual_seed(0)
    x, dy = torch.randn(tokens, d_in, generator=rng), torch.randn(tokens, d_out, generator=rng)
    weight = torch.randn(d_out, d_in, generator=rng)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (lambda: x @ weight.T, lambda: product(x, weight)),
        "back": (lambda: dy @ weight, lambda: product(dy, weight.T)),
    }
    work = 2 * tokens * d_in * d_out / 1e9
    found = []
    for name, sides in pairs.items():
        times = turns(sides, args.rounds)
        found.append({
            "product": f"{tokens} x {d_in} x {d_out}, {name}",
            "torch": work / median(times[0]),
            "onednn": work / median(times[1]),
            "ratio": median(a / b for a, b in zip(*times, strict=True)),
        })  # fmt: skip
    return found


def turns(sides: tuple[Callable[[], object], Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each side, taking turns after one run that does not count."""
    times: list[list[float]] = [[], []]
    for run in sides:
        run()
    for _ in range(rounds):
        for kept, run in zip(times, sides, strict=True):
            start = time.thread_time()
            for _ in range(3):
                run()
            kept.append(max((time.thread_time() - start) / 3, 1e-9))
    return times


if __name__ == "__main__":
    main()
